"""The delta cache between a source and a destination: they never differ."""

from __future__ import annotations

import contextlib
import mmap
import random
import threading
import time
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine import _native
from engine.compress.delta import DeltaBatch, DeltaCache, DeltaOutput, DeltaStatistics
from tests.native.support import PAGE, bitmap_of, pages_in, runs_of, slice_pages, table_of

PAGES = 192
SLICE = (PAGES, 64, 0, 2)  # pages 0..63 and 128..191
OWN = sorted(slice_pages(SLICE))


class Link:
    """A source's RAM, its cache, and a destination to which batches are delivered."""

    def __init__(self, cache_pages: int, page_slice: _native.Slice = (PAGES, 64, 0, 1)) -> None:
        self.cache = DeltaCache([page_slice], cache_pages * PAGE)
        self.source = mmap.mmap(-1, PAGES * PAGE)
        self.target = mmap.mmap(-1, PAGES * PAGE)
        self.placed = bitmap_of((), PAGES)
        self.output = DeltaOutput.allocate()
        self.generation = 1

    def send(self, runs: list[tuple[int, int]]) -> DeltaBatch:
        batch = self.cache.deal(
            0, self.generation, self.source, table_of(runs), len(runs), self.output
        )
        full_pages, full_runs, deltas, delta_runs = (memoryview(part) for part in self.output)
        _native.place(
            -1, 0, self.target, self.placed, full_pages[: batch.full_pages * PAGE], full_runs,
            batch.full_runs, PAGES,
        )  # fmt: skip
        _native.delta_apply(
            self.target, self.placed, deltas[: batch.deltas_bytes], delta_runs, batch.delta_runs,
            PAGES,
        )  # fmt: skip
        sent = pages_in(runs_of(bytes(full_runs), batch.full_runs))
        sent += pages_in(runs_of(bytes(delta_runs), batch.delta_runs))
        assert len(sent) == batch.full_pages + batch.delta_pages == len(set(sent))
        assert len(sent) + batch.unchanged_pages == len(pages_in(runs))
        assert batch.full_pages == batch.miss_pages + batch.overflow_pages
        return batch

    def put(self, page: int, content: bytes, at: int = 0) -> None:
        self.source[page * PAGE + at : page * PAGE + at + len(content)] = content

    def pages(self, page: int) -> tuple[bytes, bytes]:
        """The page at the source and at the destination."""
        own = slice(page * PAGE, (page + 1) * PAGE)
        return self.source[own], self.target[own]


def test_each_page_goes_the_cheapest_way() -> None:
    link = Link(PAGES)
    link.put(0, b"a" * PAGE)
    link.put(1, b"b" * PAGE)

    first = link.send([(0, 3)])
    link.put(0, b"new", 100)
    link.put(1, random.Random(1).randbytes(PAGE))
    second = link.send([(0, 3)])

    assert (first.full_pages, first.miss_pages) == (3, 3)
    assert (second.delta_pages, second.deltas_bytes) == (1, 2 + 1 + 1 + 3)
    assert (second.full_pages, second.overflow_pages, second.unchanged_pages) == (1, 1, 1)
    assert link.target[:] == link.source[:]
    assert link.cache.statistics == DeltaStatistics(
        128 * PAGE, 7 + PAGE, hit_pages=3, miss_pages=3, overflow_pages=1, unchanged_pages=1
    )


def test_a_limit_on_deltas_makes_longer_ones_overflow() -> None:
    link = Link(PAGES)
    link.send([(0, 2)])
    link.put(0, b"x" * 8)
    link.put(1, b"x" * 9)

    batch = link.cache.deal(0, 2, link.source, table_of([(0, 2)]), 1, link.output, 10)

    assert (batch.delta_pages, batch.overflow_pages) == (1, 1)
    assert runs_of(bytes(memoryview(link.output.full_runs)), 1) == [(1, 1)]


def test_a_zero_page_in_the_cache_is_the_base_of_the_next_delta() -> None:
    link = Link(PAGES)
    link.cache.set_zero(0, 1, table_of([(5, 1)]), 1)
    link.put(5, b"x", 4095)

    batch = link.send([(5, 1)])

    assert (batch.delta_pages, batch.deltas_bytes) == (1, 6)
    assert link.target[:] == link.source[:]


def test_sizes_round_down_to_a_power_of_two_and_memory_comes_with_use() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1])

    before = resident()
    cache = DeltaCache([(2**20, 512, 0, 1)], 5 * 2**30)
    made = resident()
    assert cache.statistics.cache_bytes == 4 * 2**30
    assert made - before < 1000
    cache.set_zero(0, 1, table_of([(0, 2**20)]), 1)
    assert resident() - made < 2**20 * 16 // PAGE + 1000  # a slot each, no page
    cache.forget()
    assert resident() - made < 1000
    assert cache.page(0, 7) is None


def test_another_thread_is_refused_while_a_batch_runs() -> None:
    cache = DeltaCache([(2**20, 512, 0, 1)], 2**32)
    table = table_of([(0, 2**20)] * 8)
    refused, enough = 0, threading.Event()

    def work() -> None:
        while not enough.is_set():
            with contextlib.suppress(RuntimeError):  # we were within
                cache.set_zero(0, 1, table, 8)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 60
    while not refused and time.monotonic() < deadline:
        try:
            cache.page(0, 0)
        except RuntimeError as exc:
            assert "another thread" in str(exc)  # noqa: PT017
            refused += 1
    enough.set()
    thread.join()

    assert refused > 0
    cache.set_zero(0, 1, table, 8)
    assert cache.page(0, 0) == bytes(PAGE)


def test_rates_are_of_the_period() -> None:
    before = DeltaStatistics(0, 1000, 10, 5, 1)
    now = before + DeltaStatistics(0, 2048, 2, 3, 0)

    assert now.miss_rate(before, 12) == 0.25
    assert now.encoding_rate(before) == 4.0
    assert (now.miss_rate(now, 0), now.encoding_rate(now)) == (0.0, 0.0)


def test_a_guest_that_writes_meanwhile_never_parts_cache_and_destination() -> None:
    link = Link(256)
    guest = _native.workload_start(link.source, PAGES, 1, "random", 0, 3, 5, None)
    _native.workload_resume(guest)
    deltas, deadline = 0, time.monotonic() + 60
    try:
        for link.generation in range(1, 10**6):
            deltas += link.send([(0, PAGES)]).delta_pages
            for page in range(PAGES):
                assert link.cache.page(0, page) == link.pages(page)[1]
            if deltas > 5000 or time.monotonic() > deadline:
                break
    finally:
        _native.workload_stop(guest)
    link.generation += 1
    link.send([(0, PAGES)])

    assert deltas > 5000
    assert link.target[:] == link.source[:]


def some_runs(pages: set[int]) -> list[tuple[int, int]]:
    """Runs of the pages, merged."""
    ordered = sorted(pages)
    starts = [ordered[0], *(after for before, after in pairwise(ordered) if after != before + 1)]
    ends = [*(before for before, after in pairwise(ordered) if after != before + 1), ordered[-1]]
    return [(start, end - start + 1) for start, end in zip(starts, ends, strict=True)]


own_pages = st.sets(st.sampled_from(OWN), min_size=1, max_size=20)


class CachedLink(RuleBasedStateMachine):
    """Any order of writes, rounds, batches, losses and resizes, against a model of QEMU's cache."""

    def __init__(self) -> None:
        super().__init__()
        self.link = Link(64, SLICE)
        self.slots = 64
        self.model: dict[int, tuple[int, int]] = {}  # slot: (page, generation)

    def slot_of(self, page: int) -> int:
        return OWN.index(page) % self.slots

    def expect(self, pages: set[int]) -> int:
        """Put the pages into the model in order; return the hits."""
        hits = 0
        for page in sorted(pages):
            held, generation = self.model.get(self.slot_of(page), (page, 0))
            is_hit = self.slot_of(page) in self.model and held == page
            hits += is_hit
            if held == page or generation + 2 <= self.link.generation:
                self.model[self.slot_of(page)] = (page, self.link.generation)
        return hits

    @rule(pages=own_pages, at=st.integers(0, PAGE - 8), content=st.binary(min_size=1, max_size=8))
    def write_some(self, pages: set[int], at: int, content: bytes) -> None:
        for page in pages:
            self.link.put(page, content, at)

    @rule(pages=own_pages, seed=st.integers(0, 99))
    def write_all(self, pages: set[int], seed: int) -> None:
        for page in pages:
            self.link.put(page, random.Random(seed).randbytes(PAGE))

    @rule(pages=own_pages)
    def send(self, pages: set[int]) -> None:
        batch = self.link.send(some_runs(pages))
        hits = self.expect(pages)
        assert batch.miss_pages == len(pages) - hits
        for page in pages:
            source, target = self.link.pages(page)
            assert source == target

    @rule(pages=own_pages)
    def send_zeros(self, pages: set[int]) -> None:
        runs = some_runs(pages)
        for page in pages:
            self.link.put(page, bytes(PAGE))
        self.link.cache.set_zero(0, self.link.generation, table_of(runs), len(runs))
        _native.clear(self.link.target, self.link.placed, table_of(runs), len(runs), PAGES)
        self.expect(pages)

    @rule()
    def next_round(self) -> None:
        self.link.generation += 1

    @precondition(lambda self: self.model)
    @rule()
    def lose_the_channel(self) -> None:
        self.link.cache.forget()
        self.model = {}

    @rule(pages=st.integers(3, 8).map(lambda power: 1 << power))
    def resize(self, pages: int) -> None:
        self.link.cache.resize(pages * PAGE)
        held = [self.model[slot] for slot in sorted(self.model)]
        if pages != self.slots:
            self.slots, self.model = pages, {}
            for page, generation in held:
                if self.model.get(self.slot_of(page), (0, 0))[1] <= generation:
                    self.model[self.slot_of(page)] = (page, generation)
        assert self.link.cache.statistics.cache_bytes == pages * PAGE

    @invariant()
    def the_cache_has_what_the_destination_has(self) -> None:
        held = {page for page, _ in self.model.values()}
        for page in OWN:
            cached = self.link.cache.page(0, page)
            assert (cached is not None) == (page in held)
            assert cached is None or cached == self.link.pages(page)[1]


TestCachedLink = CachedLink.TestCase
TestCachedLink.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
