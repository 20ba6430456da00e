"""take_batch and gather against pages one by one."""

from __future__ import annotations

import itertools
import os

from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from tests.native.support import (
    PAGE,
    bitmap_of,
    pages_in,
    pages_of,
    runs_of,
    shared_memory,
    slice_pages,
    slices,
    table_of,
)

PAGES = 400
some_pages = st.sets(st.integers(0, PAGES - 1))


def ram_with(data_pages: set[int]) -> bytearray:
    """RAM where these pages are not zero."""
    ram = bytearray(PAGES * PAGE)
    for page in data_pages:
        ram[page * PAGE + page * 7 % PAGE] = 1 + page % 255
    return ram


@given(
    dirty=some_pages, flying=some_pages, data_pages=some_pages, page_slice=slices(PAGES),
    pages_max=st.integers(1, 100), capacity=st.integers(1, 20), detect_zero=st.booleans(),
)  # fmt: skip
def test_batches_take_every_dirty_page_of_the_slice_once(
    dirty: set[int],
    flying: set[int],
    data_pages: set[int],
    page_slice: _native.Slice,
    pages_max: int,
    capacity: int,
    detect_zero: bool,
) -> None:
    ram, wanted = ram_with(data_pages), dirty & slice_pages(page_slice)
    dirty_bitmap, in_flight = bitmap_of(dirty, PAGES), bitmap_of(flying, PAGES)
    data_table, zero_table = bytearray(8 * capacity), bytearray(8 * capacity)
    sent: list[int] = []
    zeros: list[int] = []
    cursor = 0
    while cursor < page_slice[0]:
        before = cursor
        cursor, data_count, zero_count, data, zero = _native.take_batch(
            ram, dirty_bitmap, in_flight, page_slice, cursor, pages_max, detect_zero,
            data_table, zero_table,
        )  # fmt: skip
        data_runs, zero_runs = runs_of(data_table, data_count), runs_of(zero_table, zero_count)
        assert data == len(pages_in(data_runs)) <= pages_max
        assert zero == len(pages_in(zero_runs))
        assert before < cursor <= page_slice[0]
        for runs in (data_runs, zero_runs):
            assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))
        sent += pages_in(data_runs)
        zeros += pages_in(zero_runs)

    assert sent == sorted(wanted & data_pages if detect_zero else wanted)
    assert zeros == sorted(wanted - data_pages if detect_zero else ())
    assert pages_of(dirty_bitmap) == dirty - wanted
    assert pages_of(in_flight) == flying | wanted


def test_a_batch_stops_at_its_page_limit_and_goes_on_from_the_cursor() -> None:
    dirty, in_flight = bitmap_of(range(200), 256), bitmap_of((), 256)
    data, zero = bytearray(8 * 8), bytearray(8 * 8)
    ram = bytes([1]) * (256 * PAGE)

    first = _native.take_batch(ram, dirty, in_flight, (256, 64, 0, 1), 0, 150, True, data, zero)
    assert first == (150, 1, 0, 150, 0)
    assert runs_of(data, 1) == [(0, 150)]
    second = _native.take_batch(ram, dirty, in_flight, (256, 64, 0, 1), 150, 150, True, data, zero)
    assert second == (256, 1, 0, 50, 0)
    assert runs_of(data, 1) == [(150, 50)]


def test_clean_pages_are_not_looked_at() -> None:
    with shared_memory(4096 * PAGE) as (fd, ram):
        ram[100 * PAGE] = 1
        dirty, in_flight = bitmap_of({100}, 4096), bitmap_of((), 4096)

        taken = _native.take_batch(
            ram, dirty, in_flight, (4096, 512, 0, 1), 0, 512, True, bytearray(64), bytearray(64)
        )

        assert taken == (4096, 1, 0, 1, 0)
        assert os.fstat(fd).st_blocks * 512 == PAGE


def test_a_long_walk_over_zero_pages_comes_back_for_air() -> None:
    pages = 40_000
    with shared_memory(pages * PAGE) as (_, ram):
        dirty, in_flight = bitmap_of(range(1, pages), pages), bitmap_of((), pages)
        cursor, zeros = 0, 0
        while cursor < pages:
            cursor, _, _, data, zero = _native.take_batch(
                ram, dirty, in_flight, (pages, 512, 0, 1), cursor, 512, True, bytearray(8),
                bytearray(8),
            )  # fmt: skip
            assert data == 0
            assert zero <= _native.BATCH_WALK_PAGES_MAX
            zeros += zero
        assert zeros == pages - 1


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8)), max_size=12))
def test_gather_joins_the_runs_in_order(runs: list[tuple[int, int]]) -> None:
    ram = b"".join(page.to_bytes(2, "little") * (PAGE // 2) for page in range(71))

    gathered = _native.gather(ram, table_of(runs), len(runs))

    assert gathered == b"".join(ram[a * PAGE : (a + n) * PAGE] for a, n in runs)
