"""`auto`: the codec that moves the most RAM per second, by cost, gain and the drain of the channel.

The worker encodes while ZeroMQ's thread sends, and all share the host's CPUs: so a byte of RAM
takes the longest of encoding it, sending what is left of it, and the CPU time for it on all CPUs.
Cost and gain are those of the pages that looked worth it. A probe encodes the pages of one batch a
second time, so that two codecs are compared on the same pages; what was seen in use counts for
longer. A channel that is not full does not tell what it could drain: then the drain is believed to
grow, and the next full queue says what it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from engine.compress.codecs import Lz4, Zstd
from engine.compress.policy import Arm, Done, Probe

MS: Final = 1_000_000
#: Weakest first; each takes several times longer than the one before, and leaves less.
LADDER: Final = (
    Arm("none"),
    Arm("lz4", 1, Lz4),
    Arm("zstd", 1, Zstd),
    Arm("zstd", 3, Zstd),
    Arm("zstd", 7, Zstd),
)
#: What is known of a codec is looked at again after so long; after it was in use, a while later.
PROBE_AGE_NS: Final = 400 * MS
USE_AGE_NS: Final = 3_000 * MS
#: Probes take at most this part of the time, and so much at once at the start.
PROBE_SHARE: Final = 0.02
PROBE_START_NS: Final = 80 * MS
#: Another codec must promise so much more: each change costs what is queued.
GAIN_MIN: Final = 1.04
#: The channel is full when so much of the time is waiting for it.
FULL_SHARE: Final = 0.08
WINDOW_NS: Final = 100 * MS
#: Packets that ZeroMQ has taken and not sent: the queue, and the one that is being sent.
QUEUED_PACKETS: Final = 3
#: While the channel is not full, its drain is believed to be so much more each window...
GROWTH: Final = 1.5
#: ...but after a belief that was wrong, not for so long; doubled each time, up to the maximum.
PATIENCE_NS: Final = 200 * MS
PATIENCE_MAX_NS: Final = 1_600 * MS
LEARNING: Final = 0.3


@dataclass(slots=True)
class Knowledge:
    """What one codec does with a byte that is worth trying; nothing before it was tried."""

    encode_ns: float = 0.0
    left: float = 1.0
    probed_ns: int = 0
    used_ns: int = 0
    busy_ns: float = 0.0  #: of all CPUs for a byte of RAM, seen in use

    @property
    def is_known(self) -> bool:
        return bool(self.probed_ns or self.used_ns)

    def learn(self, encode_ns: float, left: float, weight: float) -> None:
        weight = weight if self.is_known else 1.0
        self.encode_ns += weight * (encode_ns - self.encode_ns)
        self.left += weight * (left - self.left)


@dataclass(slots=True)
class Drain:
    """What the channel takes, in bytes per ns; 0 until it was full once."""

    rate: float = 0.0
    is_full: bool = False
    _window: deque[tuple[Done, int]] = field(default_factory=deque)
    _queued: deque[int] = field(default_factory=deque)
    _patience_ns: int = PATIENCE_NS
    _grows_at_ns: int = 0
    _believed: float = 0.0  #: grown to, and not yet seen

    def learn(self, done: Done) -> None:
        """Take one batch into account: when it was taken, one that was queued before had left."""
        self._queued.append(done.wire_bytes)
        has_left = self._queued.popleft() if len(self._queued) > QUEUED_PACKETS else 0
        window = self._window
        window.append((done, has_left or done.wire_bytes))
        while len(window) > 2 and window[0][0].at_ns < done.at_ns - WINDOW_NS:
            window.popleft()
        total_ns = sum(one.total_ns for one, _ in window)
        self.is_full = sum(one.waited_ns for one, _ in window) > FULL_SHARE * total_ns
        seen = sum(left for _, left in window) / max(1, total_ns)
        if self.is_full:
            self._measured(done.at_ns, seen)
        elif self.rate and done.at_ns >= self._grows_at_ns:
            self.rate = self._believed = max(seen, self.rate * GROWTH)
            self._grows_at_ns = done.at_ns + WINDOW_NS

    def _measured(self, now_ns: int, seen: float) -> None:
        if self._believed:
            was_wrong = seen * GROWTH < self._believed
            longer_ns = min(2 * self._patience_ns, PATIENCE_MAX_NS)
            self._patience_ns = longer_ns if was_wrong else PATIENCE_NS
            self._believed = 0.0
        self.rate = seen
        self._grows_at_ns = now_ns + self._patience_ns


class Auto:
    """Decides for one channel; the same history gives the same choices."""

    def __init__(self, channels: int, cpus: int, cpu_percent: int = 100) -> None:
        """:param channels: that do as this one does.
        :param cpu_percent: of `cpus` that encoding may take on all channels."""
        self.drain = Drain()
        self._channels, self._cpus = channels, cpus
        self._cpu_share = cpu_percent / 100 * cpus / channels
        self._arms = tuple(arm.made() for arm in LADDER)
        self._known = [Knowledge() for _ in LADDER]
        self._known[0].used_ns = 1
        self._current = 0
        self._worth = 1.0  #: part of the RAM that looks worth trying
        self._began_ns = self._encoded_ns = self._probes_ns = 0

    # -- choices ---------------------------------------------------------------------------------

    def choose(self, now_ns: int) -> Arm:
        """The next batch's; the first codec is tried by using it for one batch."""
        self._began_ns = self._began_ns or now_ns
        if self._encoded_ns > self._cpu_share * (now_ns - self._began_ns) + PROBE_START_NS:
            return self._arms[0]
        best = min(range(len(self._arms)), key=self._ns_per_byte)
        if self._ns_per_byte(best) * GAIN_MIN < self._ns_per_byte(self._current):
            self._current = best
        if self._current == 0 and self.drain.is_full and self._is_due(1, now_ns):
            return self._arms[1]
        return self._arms[self._current]

    def probe(self, now_ns: int) -> Arm | None:
        """What to encode the pages of the batch with a second time, to learn."""
        if not self._current:
            return None
        index = self._current - 1
        if self.drain.is_full:
            index = self._current + 1
            while index < len(self._arms) and not self._is_due(index, now_ns):
                index += 1
            if index == len(self._arms) or not self._waits_for_drain(index - 1):
                return None
        return self._arms[index] if index and self._is_due(index, now_ns) else None

    def _is_due(self, index: int, now_ns: int) -> bool:
        known = self._known[index]
        is_old = now_ns > known.probed_ns + PROBE_AGE_NS and now_ns > known.used_ns + USE_AGE_NS
        allowed_ns = PROBE_START_NS + PROBE_SHARE * (now_ns - self._began_ns)
        return (is_old or not known.is_known) and self._probes_ns < allowed_ns

    def _waits_for_drain(self, index: int) -> bool:
        known = self._known[index]
        return known.is_known and self._wire_ns(index) > self._worth * known.encode_ns

    def _wire_ns(self, index: int) -> float:
        left = 1.0 - self._worth * (1.0 - self._known[index].left)
        return left / self.drain.rate if self.drain.rate else 0.0

    def _ns_per_byte(self, index: int) -> float:
        """What a byte of RAM takes; the least is best, and of equals the weakest codec."""
        known = self._known[index]
        if not known.is_known:
            return float("inf")
        return max(
            self._worth * known.encode_ns, self._wire_ns(index), self._busy_ns(index) / self._cpus
        )

    def _busy_ns(self, index: int) -> float:
        """CPU time of the host for a byte of RAM: as it is now, and what another codec adds."""
        known, used = self._known[index], self._known[self._current]
        more = self._channels * self._worth * (known.encode_ns - used.encode_ns)
        return max(known.busy_ns, used.busy_ns + more) if used.busy_ns else 0.0

    # -- experience ------------------------------------------------------------------------------

    def learn(self, done: Done) -> None:
        """What became of a batch."""
        self.drain.learn(done)
        self._encoded_ns += done.cpu_ns
        if done.arm is self._arms[self._current]:
            busy_ns = done.busy_share * self._cpus * done.total_ns / done.ram_bytes
            used = self._known[self._current]
            used.busy_ns += (LEARNING if used.busy_ns else 1.0) * (busy_ns - used.busy_ns)
        if not done.tried_bytes:
            return
        self._worth += LEARNING * (done.tried_bytes / done.ram_bytes - self._worth)
        known = self._known[self._arms.index(done.arm)]
        known.learn(
            done.encode_ns / done.tried_bytes, done.encoded_bytes / done.tried_bytes, LEARNING
        )
        if self._arms[self._current] is done.arm:
            known.used_ns = done.at_ns
        else:
            known.probed_ns = done.at_ns
            self._probes_ns += done.encode_ns

    def learn_probe(self, probe: Probe) -> None:
        """The same pages by two codecs: what is known of the one in use says how unusual they
        were."""
        used, known = (
            self._known[self._arms.index(probe.used)],
            self._known[self._arms.index(probe.arm)],
        )
        left = used.left * probe.encoded_bytes / max(1, probe.used_bytes)
        known.learn(probe.encode_ns / probe.tried_bytes, left, 0.5)
        known.probed_ns = probe.at_ns
        self._probes_ns += probe.encode_ns
        self._encoded_ns += probe.cpu_ns
