"""A simulated migration for `auto`: two channels with a policy each, their queues, one link, and
the host's CPUs; between two events everything flows at constant rates."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from engine.compress.auto import LADDER, Auto
from engine.compress.policy import Arm, Done, Policy, Probe
from engine.multifd.hostload import HostLoad

MIB: Final = 2**20
BATCH_BYTES: Final = 2 * MIB
SAMPLE_BYTES: Final = 256 * 1024
CHANNELS: Final = 2
CPUS: Final = 2
#: ZeroMQ's queue, and the packet that it is writing to the kernel.
QUEUED_PACKETS: Final = 3
#: As long as so many packets wait to be decoded, the receiver's kernel takes no more.
RECEIVED_PACKETS: Final = 4
TICK_NS: Final = 10_000_000
#: CPU time that a byte of RAM and a byte on the wire cost, on each side.
RAM_NS: Final = 0.2
WIRE_NS: Final = 0.3
PACING_NS: Final = 5_000_000
BURST_NS: Final = 20_000_000
PACED_BYTES_MIN: Final = 16 * 4096
NEVER: Final = float("inf")

Contents = tuple[tuple[float, float], ...]
#: What is left of a byte and the ns to encode it, by ladder; decoding takes a third of that.
TEXT: Final[Contents] = ((1.0, 0.0), (0.55, 1.8), (0.38, 2.9), (0.34, 4.2), (0.31, 16.0))
HEAP: Final[Contents] = ((1.0, 0.0), (0.45, 2.2), (0.30, 3.2), (0.28, 6.0), (0.27, 20.0))
#: Letters without repetition: only an entropy coder makes it shorter.
LETTERS: Final[Contents] = ((1.0, 0.0), (1.0, 1.2), (0.76, 2.5), (0.75, 4.5), (0.75, 9.0))

Worth = Callable[[int], float]  #: by the byte of a channel's RAM


def in_runs(seed: int) -> Worth:
    """Stretches of 10 to 60 MiB that are all noise, or nearly all worth trying."""
    made = random.Random(seed)
    ends = [0]
    while ends[-1] < 8192 * MIB:
        ends.append(ends[-1] + made.randint(10, 60) * MIB)

    def worth(offset: int) -> float:
        place = next(i for i, end in enumerate(ends) if end > offset % ends[-1])
        return 0.95 if place % 2 else 0.0

    return worth


def in_batches(seed: int, part: float) -> Worth:
    """This part of the batches is nearly all worth trying, the others are all noise."""
    made = random.Random(seed)
    worth = [0.95 if made.random() < part else 0.0 for _ in range(512)]
    return lambda offset: worth[offset // BATCH_BYTES % len(worth)]


class Load(HostLoad):
    """/proc/stat of the simulated host: ticks of 10 ms."""

    def __init__(self, world: World) -> None:
        super().__init__(CHANNELS)
        self._cpus = float(CPUS)
        self._world = world

    def _ticks(self) -> tuple[int, int]:
        shares = [self._world.idle_ns / CPUS + i * TICK_NS / CPUS for i in range(CPUS)]
        idle = sum(int(share / TICK_NS) for share in shares)
        return idle, CPUS * int(self._world.now_ns / TICK_NS)


@dataclass
class Lane:
    """One channel: the sender's thread, the queue, the receiver."""

    policy: Policy
    chance: random.Random
    offset: int = 0
    cpu_ns: float = 0.0  #: of the sender so far
    probed_ns: int = 0  #: of that, since the last batch
    work_ns: float = 0.0  #: CPU time that the sender's next step needs
    until_ns: float = 0.0  #: the bandwidth limit holds it so long
    packet: int = 0  #: waits for room
    queue: deque[float] = field(default_factory=deque)
    decoding: deque[float] = field(default_factory=deque)  #: CPU time that each packet needs
    costs: deque[float] = field(default_factory=deque)  #: and will need, by queued packet
    steps: Iterator[None] = field(default_factory=lambda: iter(()))
    is_done: bool = False

    def to_room(self, kernel_bytes: int) -> float:
        """Bytes that must leave before the next packet is taken."""
        index = len(self.queue) - QUEUED_PACKETS
        return sum(list(self.queue)[: index + 1]) - kernel_bytes if index >= 0 else 0.0


@dataclass
class World:
    """:ivar others: threads of other processes that never sleep.
    :ivar is_local: the receivers use the same CPUs.
    :ivar decode_factor: the receivers are so much slower.
    :ivar limit: max-bandwidth in bytes per ns; 0 is none."""

    gbit: float
    contents: Contents = TEXT
    worth: Worth = lambda _offset: 0.85
    seed: int = 1
    others: int = 0
    is_local: bool = True
    decode_factor: float = 1.0
    limit: float = 0.0
    kernel_bytes: int = 2 * MIB
    now_ns: float = 1_000_000.0
    idle_ns: float = 0.0
    sold_ns: float = 0.0
    encoded_ns: float = 0.0  #: CPU time of all codecs, `probed_ns` of it for probes
    probed_ns: float = 0.0
    probes: int = 0
    moved: int = 0
    choices: list[tuple[float, str]] = field(default_factory=list)  #: of the first channel
    lanes: list[Lane] = field(default_factory=list)

    def start(self, policy: Callable[[], Policy]) -> World:
        self.lanes = [
            Lane(policy(), random.Random(self.seed * CHANNELS + i)) for i in range(CHANNELS)
        ]
        self.loads = [Load(self) for _ in self.lanes]
        return self

    # -- time ------------------------------------------------------------------------------------

    def move(self, ram_bytes: int, batch_bytes: int = BATCH_BYTES) -> float:
        """One round; return the ns until all of it is placed."""
        began_ns = self.now_ns
        for lane, load in zip(self.lanes, self.loads, strict=True):
            lane.steps, lane.is_done = self._send(lane, load, ram_bytes, batch_bytes), False
            self._resume(lane)
        while any(not lane.is_done or lane.queue or lane.decoding for lane in self.lanes):
            self._advance()
        return self.now_ns - began_ns

    def move_until(self, when_ns: float) -> None:
        while self.now_ns < when_ns:
            self.move(int(CHANNELS * 64 * MIB))

    def _advance(self) -> None:
        """To the next event."""
        senders = [lane for lane in self.lanes if lane.work_ns > 0]
        receivers = [lane for lane in self.lanes if lane.decoding]
        threads = len(senders) + self.others + (len(receivers) if self.is_local else 0)
        speed = min(1.0, CPUS / max(1, threads))
        decode_speed = (speed if self.is_local else 1.0) / self.decode_factor
        sending = [x for x in self.lanes if x.queue and len(x.decoding) < RECEIVED_PACKETS]
        rate = self.gbit * 0.125 / max(1, len(sending))
        step_ns = min(
            [lane.work_ns / speed for lane in senders]
            + [lane.decoding[0] / decode_speed for lane in receivers]
            + [lane.queue[0] / rate for lane in sending]
            + [max(1.0, x.to_room(self.kernel_bytes) / rate) for x in self.lanes
               if self._waits(x) and (x in sending or x.to_room(self.kernel_bytes) < 1)]
            + [x.until_ns - self.now_ns for x in self.lanes if x.until_ns > self.now_ns]
        )  # fmt: skip
        step_ns = max(1.0, step_ns)
        self.now_ns += step_ns
        self.idle_ns += step_ns * max(0, CPUS - threads)
        for lane in receivers:
            lane.decoding[0] -= step_ns * decode_speed
            if lane.decoding[0] < 1:
                lane.decoding.popleft()
        for lane in sending:
            lane.queue[0] -= step_ns * rate
            if lane.queue[0] < 1:
                lane.queue.popleft()
                lane.decoding.append(lane.costs.popleft())
        for lane in senders:
            lane.work_ns -= step_ns * speed
            lane.cpu_ns += step_ns * speed
        for lane in self.lanes:
            is_free = not self._waits(lane) or lane.to_room(self.kernel_bytes) < 1
            is_ready = not lane.is_done and lane.work_ns < 1 and lane.until_ns <= self.now_ns
            if is_ready and is_free:
                self._resume(lane)

    def _waits(self, lane: Lane) -> bool:
        return bool(lane.packet) and lane.until_ns <= self.now_ns

    def _resume(self, lane: Lane) -> None:
        lane.work_ns = 0.0
        lane.is_done = next(lane.steps, self) is self

    # -- one channel -----------------------------------------------------------------------------

    def _send(self, lane: Lane, load: Load, ram_bytes: int, batch_bytes: int) -> Iterator[None]:
        """What the sender does; each step ends when what it needs is there."""
        ended_ns, ended_cpu_ns, left = self.now_ns, lane.cpu_ns, ram_bytes // CHANNELS
        if self.limit:
            batch_bytes = max(PACED_BYTES_MIN, min(batch_bytes, int(self.limit * PACING_NS)))
        while left > 0:
            ram = min(left, batch_bytes)
            left -= ram
            arm = lane.policy.choose(int(self.now_ns))
            index, unlike = self._index(arm), lane.chance.uniform(0.85, 1.15)
            worth = self.worth(lane.offset) * lane.chance.uniform(0.9, 1.1)
            tried, lane.offset = int(ram * min(1.0, worth)) if index else 0, lane.offset + ram
            encoded = min(tried, int(tried * self.contents[index][0] * unlike))
            codec_ns, wire = tried * self.contents[index][1] * unlike, ram - tried + encoded
            if lane is self.lanes[0]:
                self.choices.append((self.now_ns, f"{arm.name} {arm.level}"))
            lane.work_ns = codec_ns + RAM_NS * ram + WIRE_NS * wire
            yield
            waits_ns = self.now_ns
            lane.packet = wire
            paced_ns = 0.0
            if self.limit:
                self.sold_ns = max(self.sold_ns, self.now_ns - BURST_NS)
                lane.until_ns, self.sold_ns = self.sold_ns, self.sold_ns + wire / self.limit
                paced_ns = lane.until_ns - self.now_ns
            yield
            lane.packet = 0
            lane.queue.append(wire)
            lane.costs.append(codec_ns / 3 + RAM_NS * ram + WIRE_NS * wire)
            self.encoded_ns += codec_ns
            self.moved += ram
            probed_ns, lane.probed_ns = lane.probed_ns, 0
            lane.policy.learn(
                Done(
                    arm, int(self.now_ns), ram, tried, encoded, wire, int(codec_ns),
                    int(self.now_ns - ended_ns), int(lane.cpu_ns - ended_cpu_ns),
                    int(lane.cpu_ns - ended_cpu_ns), int(self.now_ns - waits_ns),
                    self.limit / CHANNELS if 2 * paced_ns > self.now_ns - waits_ns else 0.0,
                    load.fair_share(int(self.now_ns), self._cpu_ns), probed_ns=probed_ns,
                )
            )  # fmt: skip
            ended_ns, ended_cpu_ns = self.now_ns, lane.cpu_ns
            can_be = index == 0 or tried > 0
            if can_be and (other := lane.policy.probe(int(self.now_ns))) is not None:
                if index == 0:
                    ram = min(ram, SAMPLE_BYTES)
                    tried = encoded = int(ram * min(1.0, worth))
                left_of, cost_ns = self.contents[self._index(other)]
                lane.work_ns = tried * cost_ns * unlike
                self.encoded_ns += lane.work_ns
                self.probed_ns += lane.work_ns
                self.probes += 1
                lane.probed_ns = int(lane.work_ns)
                spent_ns, shorter = int(lane.work_ns), min(tried, int(tried * left_of * unlike))
                yield
                lane.policy.learn_probe(
                    Probe(other, arm, int(self.now_ns), ram, tried, shorter, encoded, spent_ns)
                )

    def _cpu_ns(self) -> int:
        return int(sum(lane.cpu_ns for lane in self.lanes))

    def _index(self, arm: Arm) -> int:
        return LADDER.index(arm)


def auto(cpu_percent: int = 100) -> Auto:
    return Auto(CHANNELS, CPUS, cpu_percent)
