"""Where a round goes on, against its definition; batches that never cut a huge page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st

from engine import _native, wire
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.demands import LAST_DEMAND, NewestDemand
from engine.multifd.rounds import Batches, Round, Taken
from tests.native.support import bitmap_of, pages_of

BLOCKS = (130, 7, 64)
HUGE = 512


def demand(demands: NewestDemand, block: int, page: int) -> None:
    """As the page service writes it."""
    demands.words[LAST_DEMAND] = (block << 32 | page) + 1


@contextmanager
def followed() -> Iterator[NewestDemand]:
    demands = NewestDemand.create()
    try:
        yield demands
    finally:
        demands.close()


places = st.sampled_from(BLOCKS).flatmap(
    lambda count: st.tuples(st.just(BLOCKS.index(count)), st.integers(0, count - 1))
)


def take(dirty: list[set[int]], where: tuple[int, int], pages_max: int) -> tuple[int, set[int]]:
    """What `Batches.take` does of sets: the next pages, and how far it looked."""
    block, cursor = where
    found = sorted(page for page in dirty[block] if page >= cursor)
    taken = set(found[:pages_max])
    dirty[block] -= taken
    return (found[pages_max] if len(found) > pages_max else BLOCKS[block]), taken


@given(
    st.lists(st.sets(st.integers(0, 129)), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 20), places), max_size=6),
    st.integers(1, 40),
    st.booleans(),
)
def test_a_round_leaves_nothing_and_each_batch_begins_where_the_guest_is(
    dirty: list[set[int]], news: list[tuple[int, tuple[int, int]]], pages_max: int, follows: bool
) -> None:
    dirty = [{page for page in pages if page < n} for pages, n in zip(dirty, BLOCKS, strict=True)]
    at = dict(news)
    with followed() as demands:
        round_, last = Round(1, BLOCKS, demands if follows else None), (0, 0)
        for batch in range(1000):
            if batch in at:
                demand(demands, *at[batch])
            where = round_.next()
            if where is None:
                break
            if follows and batch in at and demands.last_demand != last:
                assert where == at[batch]
            last = demands.last_demand or (0, 0)
            cursor, taken = take(dirty, where, pages_max)
            round_.went_on(cursor, is_empty=not taken)
        assert round_.is_over
        assert dirty == [set(), set(), set()]
        assert round_.next() is None


def test_what_became_dirty_before_the_cursor_is_taken_in_postcopy_and_left_in_precopy() -> None:
    for follows in (True, False):
        with followed() as demands:
            dirty: list[set[int]] = [{0, 100}, set(), {3}]
            round_ = Round(1, BLOCKS, demands if follows else None)
            while (where := round_.next()) is not None:
                cursor, taken = take(dirty, where, 1)
                round_.went_on(cursor, is_empty=not taken)
                if taken == {100}:
                    dirty[0].add(5)
            assert dirty == [set() if follows else {5}, set(), set()]


def test_a_demand_elsewhere_and_the_same_again_change_nothing() -> None:
    with followed() as demands:
        round_ = Round(1, BLOCKS, demands)
        demand(demands, 3, 0)  # no such block
        assert round_.next() == (0, 0)
        demand(demands, 2, 5)
        assert round_.next() == (2, 5)
        round_.went_on(20, is_empty=False)
        assert round_.next() == (2, 20)
        round_.is_over = True
        assert round_.next() is None


# -- batches ---------------------------------------------------------------------------------------


@contextmanager
def batches(
    page_count: int, dirty: set[int], slice_: tuple[int, int], *, backing: int, content: bytes = b""
) -> Iterator[tuple[Batches, PageBitmaps, PageBitmaps]]:
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, page_count * PAGE_SIZE)
    os.pwrite(fd, content, 0)
    block = RamBlock("ram", page_count * PAGE_SIZE, fd, backing)  # backing is but a number here
    left, in_flight = (PageBitmaps.create(name, [block]) for name in ("dirty", "in-flight"))
    bits = bitmap_of(dirty, page_count)
    left[0][: len(bits)] = bits
    with block.map() as ram, memoryview(ram) as view:
        slices = [block.slice_of(*slice_)]
        taker = Batches([block], [view], slices, left, in_flight, detect_zero=True)
        yield taker, left, in_flight
    for bitmaps in (left, in_flight):
        bitmaps.close()
    os.close(fd)


def units_of(pages: set[int]) -> set[int]:
    return {page // HUGE for page in pages}


@given(st.sets(st.integers(0, 8 * HUGE - 1), max_size=30), st.integers(0, 1), st.booleans())
def test_huge_pages_with_a_dirty_page_are_taken_whole_and_once(
    dirty: set[int], index: int, is_zero: bool
) -> None:
    content = b"" if is_zero else bytes(HUGE * PAGE_SIZE) + b"x" * PAGE_SIZE
    made = batches(8 * HUGE, dirty, (index, 2), backing=HUGE * PAGE_SIZE, content=content)
    with made as (taker, left, in_flight):
        ours = {page for page in dirty if page // HUGE % 2 == index}
        cursor, units = 0, []
        while cursor < 8 * HUGE:
            cursor, taken = taker.take_whole(0, cursor, 16)
            if taken == Taken(0, 0, 0, 0, 0):
                break
            has_data = bool(taken.pages)
            runs = taker.data_runs if has_data else taker.zero_runs
            first, count = wire.RUN.unpack_from(runs)
            assert taken == (Taken(0, 1, 0, HUGE, 0) if has_data else Taken(0, 0, 1, 0, HUGE))
            assert (first % HUGE, count) == (0, HUGE)
            assert has_data == (not is_zero and first == HUGE)
            units.append(first // HUGE)
        assert units == sorted(units_of(ours))
        assert pages_of(left[0]) == dirty - ours
        assert pages_of(in_flight[0]) == ours


@given(st.sets(st.integers(0, 999), max_size=60), st.integers(1, 40))
def test_small_pages_are_taken_alike_in_precopy_and_postcopy(
    dirty: set[int], pages_max: int
) -> None:
    tables = []
    for name in ("take", "take_whole"):
        with batches(1000, dirty, (0, 1), backing=PAGE_SIZE, content=b"x" * 300 * 4096) as made:
            cursor, taken = getattr(made[0], name)(0, 0, pages_max)
            tables.append((cursor, taken, bytes(made[0].data_runs), bytes(made[0].zero_runs)))
            assert _native.bitmap_count(made[2][0], (1000, 512, 0, 1)) == (
                taken.pages + taken.zero_pages
            )
    assert tables[0] == tables[1]
