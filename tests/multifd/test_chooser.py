"""What a batch tells its policy, and what it costs to ask."""

from __future__ import annotations

import itertools
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


LZ4 = Arm("lz4", 1, Lz4).made()
FULL = copied(text(128))
DELTAS = Payload([text(1)], wire.RUN.pack(0, 384), 384, wire.PacketKind.DELTAS)


@pytest.mark.parametrize(
    ("payloads", "ram_pages", "tried_pages"),
    [
        ([copied(text(512))], 64, 64),
        ([copied(noise(512))], 64, 0),
        ([copied(text(5) + noise(5))], 10, 5),
        ([FULL, DELTAS], 256, 64),  # half of what is full stands for half of all
        ([Payload([], b"", 0), DELTAS], 384, 1),
    ],
    ids=["text", "noise", "few of both", "some of it deltas", "deltas"],
)
def test_of_what_went_as_it_is_a_sample_is_encoded(
    clock: Clock, payloads: list[Payload], ram_pages: int, tried_pages: int
) -> None:
    probe = probed(payloads)
    assert probe is not None
    assert (probe.ram_bytes, probe.tried_bytes) == (ram_pages * PAGE_SIZE, tried_pages * PAGE_SIZE)
    assert probe.used_bytes == probe.tried_bytes
    assert probe.encoded_bytes < probe.tried_bytes or not tried_pages


def test_what_a_probe_took_is_told_with_the_next_batch_of_the_round(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(step=5)
    monkeypatch.setattr(clock, "thread_time_ns", lambda: next(ticks))
    progress = Progress.create()
    budget = Budget.create()
    try:
        one, policy = Chooser(0, 1, progress, budget), Curious()
        one._policy = cast(Policy, policy)
        for wanted, is_next_round in ((LZ4, False), (None, False), (LZ4, True), (None, False)):
            policy.wanted = wanted
            one.learn(one.choose(), 128 * PAGE_SIZE, [FULL])
            if is_next_round:
                one.begin_round()
        probe = policy.probed[0]
        took_ns = probe.sorting_ns + probe.codec_ns
        assert took_ns > 0
        assert [done.probed_ns for done in policy.heard] == [0, took_ns, 0, 0]
    finally:
        progress.close()
        budget.close()


def test_a_batch_of_which_all_was_left_out_is_no_sample(clock: Clock) -> None:
    assert probed([Payload([], b"", 0)]) is None


def probed(payloads: list[Payload]) -> Probe | None:
    """What is learnt by LZ4 of a batch that went without a codec."""
    progress = Progress.create()
    budget = Budget.create()
    try:
        one, policy = Chooser(0, 1, progress, budget), Curious()
        one._policy, policy.wanted = cast(Policy, policy), LZ4
        pages = sum(payload.pages for payload in payloads)
        one.learn(one.choose(), pages * PAGE_SIZE, payloads)
        return policy.probed[0] if policy.probed else None
    finally:
        progress.close()
        budget.close()
