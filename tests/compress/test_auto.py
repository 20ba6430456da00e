"""`auto` against a simulated link and CPUs: it must be about as fast as the best fixed codec."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from engine.compress.auto import LADDER, Auto
from engine.compress.policy import Arm, Done, Probe

BATCH_BYTES = 2 * 1024 * 1024
CHANNELS = CPUS = 2
GBIT = 0.125 / CHANNELS  #: bytes per ns of one channel, for a link of 1 Gbit/s

#: What is left and ns to encode a byte, by ladder; decoding takes a third of that.
TEXT = ((1.0, 0.0), (0.55, 1.8), (0.38, 2.9), (0.34, 4.2), (0.31, 16.0))
HEAP = ((1.0, 0.0), (0.45, 2.2), (0.30, 3.2), (0.28, 6.0), (0.27, 20.0))
BASE_NS = 1.0  #: CPU time for a byte of RAM without any codec, both sides


@dataclass
class World:
    """Both channels do the same; one is simulated."""

    drain: float
    contents: tuple[tuple[float, float], ...] = TEXT
    worth: float = 0.85
    seed: int = 1
    now_ns: int = 1_000_000
    choices: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def ns_per_byte(self, index: int) -> float:
        left, encode_ns = self.contents[index]
        cpu_ns = CHANNELS * (BASE_NS + self.worth * encode_ns * 4 / 3) / CPUS
        return max(self.worth * encode_ns, self._left(left) / self.drain, cpu_ns)

    def _left(self, left: float) -> float:
        return 1.0 - self.worth * (1.0 - left)

    def best_ns(self) -> float:
        return min(self.ns_per_byte(index) for index in range(len(LADDER)))

    def run(self, policy: Auto, ram_bytes: int) -> float:
        """Move so much RAM; return the ns that it took."""
        began_ns, moved = self.now_ns, 0
        while moved < ram_bytes:
            moved += BATCH_BYTES
            self.step(policy)
        return self.now_ns - began_ns

    def step(self, policy: Auto) -> None:
        """One batch; its content is a little unlike the others'."""
        arm = policy.choose(self.now_ns)
        index = LADDER.index(Arm(arm.name, arm.level, arm.kind))
        self.choices.append((self.now_ns, f"{arm.name} {arm.level}"))
        unlike = self._random.uniform(0.85, 1.15)
        left, encode_ns = self.contents[index]
        tried = int(BATCH_BYTES * self.worth * self._random.uniform(0.9, 1.1)) if index else 0
        encoding_ns = int(tried * encode_ns * unlike)
        total_ns = max(int(BATCH_BYTES * self.ns_per_byte(index)), encoding_ns + 1)
        encoded = int(tried * left * unlike) if index else 0
        cpu_ns = BATCH_BYTES * BASE_NS + encoding_ns * 4 / 3
        self.now_ns += total_ns
        policy.learn(
            Done(
                arm, self.now_ns, BATCH_BYTES, tried, encoded, BATCH_BYTES - tried + encoded,
                encoding_ns, encoding_ns, total_ns, max(0, total_ns - encoding_ns - 100_000),
                min(1.0, CHANNELS * cpu_ns / CPUS / total_ns),
            )
        )  # fmt: skip
        if tried and (other := policy.probe(self.now_ns)) is not None:
            self._probe(policy, arm, other, tried, encoded, unlike)

    def _probe(
        self, policy: Auto, used: Arm, other: Arm, tried: int, encoded: int, unlike: float
    ) -> None:
        left, encode_ns = self.contents[LADDER.index(Arm(other.name, other.level, other.kind))]
        spent_ns = int(tried * encode_ns * unlike)
        self.now_ns += spent_ns
        policy.learn_probe(
            Probe(
                other, used, self.now_ns, tried, int(tried * left * unlike), encoded, spent_ns,
                spent_ns,
            )
        )  # fmt: skip


@pytest.mark.parametrize("contents", [TEXT, HEAP], ids=["text", "heap"])
@pytest.mark.parametrize("gbit", [0.1, 0.3, 1, 2.5, 5, 10, 100])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_about_as_fast_as_the_best_codec(
    contents: tuple[tuple[float, float], ...], gbit: float, seed: int
) -> None:
    world = World(gbit * GBIT, contents, seed=seed)

    took_ns = world.run(Auto(CHANNELS, CPUS), ram_bytes := 2**30)

    assert took_ns <= 1.05 * ram_bytes * world.best_ns()


@pytest.mark.parametrize(("before", "after"), [(10, 1), (1, 10), (2.5, 0.3), (0.3, 5)])
def test_a_change_of_bandwidth_is_followed_within_two_seconds(before: float, after: float) -> None:
    world, policy = World(before * GBIT), Auto(CHANNELS, CPUS)
    while world.now_ns < 3_000_000_000:
        world.step(policy)

    world.drain = after * GBIT
    while world.now_ns < 5_000_000_000:
        world.step(policy)
    took_ns = world.run(policy, ram_bytes := 2**29)

    assert took_ns <= 1.05 * ram_bytes * world.best_ns()


@pytest.mark.parametrize("gbit", [1, 2.5])
def test_a_change_of_content_is_followed_within_two_seconds(gbit: float) -> None:
    world, policy = World(gbit * GBIT, worth=0.02), Auto(CHANNELS, CPUS)
    while world.now_ns < 3_000_000_000:
        world.step(policy)

    world.worth = 0.95
    while world.now_ns < 5_000_000_000:
        world.step(policy)
    took_ns = world.run(policy, ram_bytes := 2**29)

    assert took_ns <= 1.05 * ram_bytes * world.best_ns()


@pytest.mark.parametrize("percent", [1, 5, 20])
def test_encoding_takes_no_more_cpu_than_it_may(percent: int) -> None:
    world, policy = World(0.1 * GBIT), Auto(CHANNELS, CPUS, percent)
    spent_ns, began_ns = 0.0, world.now_ns

    class Counting(Auto):
        def learn(self, done: Done) -> None:
            nonlocal spent_ns
            spent_ns += done.cpu_ns
            super().learn(done)

    policy = Counting(CHANNELS, CPUS, percent)
    while world.now_ns < 20_000_000_000:
        world.step(policy)

    allowed_ns = percent / 100 * CPUS / CHANNELS * (world.now_ns - began_ns)
    assert 0 < spent_ns <= 1.1 * allowed_ns + 100_000_000


def test_a_channel_that_is_never_full_gets_pages_as_they_are() -> None:
    world = World(100 * GBIT)
    world.run(Auto(CHANNELS, CPUS), 2**30)
    assert {name for _, name in world.choices} == {"none 0"}


def test_probes_are_few() -> None:
    world = World(0.3 * GBIT)

    class Counting(Auto):
        probes_ns = 0

        def learn_probe(self, probe: Probe) -> None:
            Counting.probes_ns += probe.encode_ns
            super().learn_probe(probe)

    took_ns = world.run(Counting(CHANNELS, CPUS), 2**31)
    assert 0 < Counting.probes_ns <= 0.03 * took_ns + 150_000_000
