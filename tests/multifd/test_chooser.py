"""What a batch tells its policy, and what it costs to ask."""

from __future__ import annotations

from typing import cast

import pytest

from engine import wire
from engine.compress.codecs import Lz4
from engine.compress.policy import Arm, Done, Policy, Probe
from engine.memory.blocks import PAGE_SIZE
from engine.multifd import chooser as module
from engine.multifd.chooser import Chooser
from engine.multifd.payload import Payload, copied_payload
from engine.multifd.progress import Budget, Progress
from tests.multifd.encoded import noise, text


def copied(pages: bytes) -> Payload:
    """As they are, in one frame."""
    count = len(pages) // PAGE_SIZE
    return copied_payload(pages, memoryview(wire.RUN.pack(0, count)), 1)


PAGE = Payload([bytes(PAGE_SIZE)], wire.RUN.pack(0, 1), 1)
DELTA = Payload([bytes(16)], wire.RUN.pack(0, 1), 1, wire.PacketKind.DELTAS)


class Clock:
    """Of the wall; CPU time stands."""

    def __init__(self) -> None:
        self.now_ns, self.asked_count = 0, 0

    def monotonic_ns(self) -> int:
        return self.now_ns

    def thread_time_ns(self) -> int:
        self.asked_count += 1
        return 0

    process_time_ns = thread_time_ns


class Curious:
    is_curious = True

    def __init__(self) -> None:
        self.heard: list[Done] = []
        self.wanted: Arm | None = None
        self.probed: list[Probe] = []

    def choose(self, _now_ns: int) -> Arm:
        return Arm("none")

    def probe(self, _now_ns: int) -> Arm | None:
        return self.wanted

    def learn(self, done: Done) -> None:
        self.heard.append(done)

    def learn_probe(self, probe: Probe) -> None:
        self.probed.append(probe)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(module, "time", one)
    return one


def test_a_fixed_choice_is_counted_and_not_measured(clock: Clock) -> None:
    progress = Progress.create()
    budget = Budget.create()
    try:
        one = Chooser(0, 1, progress, budget)
        asked_count = clock.asked_count
        one.begin_round()
        for _ in range(3):
            one.learn(one.choose(), 4096, [PAGE])
        assert progress.batches(wire.CodecId.RAW) == 3
        assert clock.asked_count == asked_count
    finally:
        progress.close()
        budget.close()


def test_a_policy_that_begins_in_mid_round_hears_of_its_own_time_alone(clock: Clock) -> None:
    progress = Progress.create()
    budget = Budget.create()
    try:
        one, policy = Chooser(0, 1, progress, budget), Curious()
        one.begin_round()
        clock.now_ns = 1000
        one.learn(one.choose(), 4096, [PAGE])
        one._policy = cast(Policy, policy)
        for step_ns in (10, 20):
            arm = one.choose()
            clock.now_ns += step_ns
            one.learn(arm, 4096, [PAGE])
        assert [done.total_ns for done in policy.heard] == [10, 20]
    finally:
        progress.close()
        budget.close()


def test_a_policy_is_told_whether_all_of_a_batch_went_as_pages(clock: Clock) -> None:
    progress = Progress.create()
    budget = Budget.create()
    try:
        one, policy = Chooser(0, 1, progress, budget), Curious()
        one._policy = cast(Policy, policy)
        for pages, payloads in ((1, [PAGE]), (2, [PAGE]), (2, [PAGE, DELTA]), (2, [PAGE, PAGE])):
            one.begin_round()
            clock.now_ns += 10
            one.learn(one.choose(), pages * PAGE_SIZE, payloads)
        assert [done.is_whole for done in policy.heard] == [True, False, False, True]
    finally:
        progress.close()
        budget.close()


@pytest.mark.parametrize(
    ("payload", "ram_bytes", "tried_bytes"),
    [
        (copied(text(512)), 64 * PAGE_SIZE, 64 * PAGE_SIZE),
        (copied(noise(512)), 64 * PAGE_SIZE, 0),
        (copied(text(5) + noise(5)), 10 * PAGE_SIZE, 5 * PAGE_SIZE),
    ],
    ids=["text", "noise", "few of both"],
)
def test_of_pages_that_went_as_they_are_a_sample_is_encoded(
    clock: Clock, payload: Payload, ram_bytes: int, tried_bytes: int
) -> None:
    probe = probed(payload)
    assert probe is not None
    assert (probe.ram_bytes, probe.tried_bytes) == (ram_bytes, tried_bytes)
    assert probe.used_bytes == tried_bytes
    assert probe.encoded_bytes < probe.tried_bytes or not tried_bytes


@pytest.mark.parametrize("payload", [DELTA, Payload([], b"", 0)], ids=["deltas", "nothing"])
def test_a_batch_without_pages_is_no_sample(clock: Clock, payload: Payload) -> None:
    assert probed(payload) is None


def probed(payload: Payload) -> Probe | None:
    """What is learnt by LZ4 of a batch that went without a codec."""
    progress = Progress.create()
    budget = Budget.create()
    try:
        one, policy = Chooser(0, 1, progress, budget), Curious()
        one._policy, policy.wanted = cast(Policy, policy), Arm("lz4", 1, Lz4).made()
        one.learn(one.choose(), PAGE_SIZE, [payload])
        return policy.probed[0] if policy.probed else None
    finally:
        progress.close()
        budget.close()
