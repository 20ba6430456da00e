"""Bitmaps against sets of pages, alone and between processes."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from tests.native.support import (
    PAGE,
    Peer,
    bitmap_of,
    pages_of,
    shared_memory,
    slice_pages,
    slices,
)

PAGES = 600
some_pages = st.sets(st.integers(0, PAGES - 1))


@given(some_pages, st.integers(0, PAGES), st.data())
def test_set_range_sets_the_range_and_counts_what_was_clear(
    before: set[int], first: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, PAGES - first))
    bitmap = bitmap_of(before, PAGES)

    newly_set = _native.bitmap_set_range(bitmap, first, count)

    assert pages_of(bitmap) == before | set(range(first, first + count))
    assert newly_set == len(set(range(first, first + count)) - before)


@given(some_pages, slices(PAGES))
def test_clear_and_count_see_exactly_the_slice(before: set[int], page_slice: _native.Slice) -> None:
    bitmap = bitmap_of(before, PAGES)
    inside = before & slice_pages(page_slice)

    assert _native.bitmap_count(bitmap, page_slice) == len(inside)
    assert _native.bitmap_clear_slice(bitmap, page_slice) == len(inside)
    assert pages_of(bitmap) == before - inside


@given(some_pages, some_pages, slices(PAGES))
def test_move_takes_the_slice_from_one_bitmap_to_the_other(
    source: set[int], target: set[int], page_slice: _native.Slice
) -> None:
    source_bitmap, target_bitmap = bitmap_of(source, PAGES), bitmap_of(target, PAGES)
    inside = source & slice_pages(page_slice)

    moved = _native.bitmap_move_slice(source_bitmap, target_bitmap, page_slice)

    assert moved == len(inside)
    assert pages_of(source_bitmap) == source - inside
    assert pages_of(target_bitmap) == target | inside


@given(st.integers(0, 10_000), st.sampled_from([64, 128, 512]), st.integers(1, 9))
def test_the_workers_slices_share_out_every_page_once(
    page_count: int, stripe_pages: int, workers: int
) -> None:
    bitmap = bitmap_of(range(page_count), page_count)

    cleared = [
        _native.bitmap_clear_slice(bitmap, (page_count, stripe_pages, index, workers))
        for index in range(workers)
    ]

    assert sum(cleared) == page_count
    assert not any(bitmap)


def test_set_data_finds_written_pages_and_allocates_nothing() -> None:
    pages = set(random.Random(1).sample(range(1000), 70))
    with shared_memory(1000 * PAGE) as (fd, ram):
        for page in pages:
            ram[page * PAGE + page % PAGE] = 1
        bitmap = bytearray(128)

        newly_set = _native.bitmap_set_data(fd, 0, 1000 * PAGE, bitmap)

        assert newly_set == 70
        assert pages_of(bitmap) == pages
        assert os.fstat(fd).st_blocks * 512 == 70 * PAGE
        assert _native.bitmap_set_data(fd, 0, 1000 * PAGE, bitmap) == 0


def test_set_data_finds_long_stretches_and_their_ends() -> None:
    chance = random.Random(2)
    ends = [0]
    while ends[-1] < 3000:
        ends.append(ends[-1] + chance.choice((1, 2, 63, 64, 65, 128, 500)))
    pages = {page for a, b in zip(ends[::2], ends[1::2], strict=False) for page in range(a, b)}
    pages = {page for page in pages if page < 3000}
    with shared_memory(3000 * PAGE) as (fd, ram):
        for page in pages:
            ram[page * PAGE] = 1
        for first in (0, 1, 700):
            bitmap = bytearray(3008 // 8)
            newly_set = _native.bitmap_set_data(fd, first * PAGE, (3000 - first) * PAGE, bitmap)

            assert pages_of(bitmap) == {page - first for page in pages if page >= first}
            assert newly_set == len(pages_of(bitmap))
        assert os.fstat(fd).st_blocks * 512 == len(pages) * PAGE


def test_set_data_counts_from_its_offset_and_stops_at_its_size() -> None:
    with shared_memory(100 * PAGE) as (fd, ram):
        for page in (0, 9, 10, 19, 20):
            ram[page * PAGE] = 1
        bitmap = bytearray(8)

        assert _native.bitmap_set_data(fd, 10 * PAGE, 10 * PAGE, bitmap) == 2
        assert pages_of(bitmap) == {0, 9}
        assert _native.bitmap_set_data(fd, 1000 * PAGE, PAGE, bitmap) == 0


def test_punched_pages_are_holes_again() -> None:
    with shared_memory(8 * PAGE) as (fd, ram):
        ram[:] = b"\xff" * len(ram)
        _native.punch_hole(fd, 2 * PAGE, 3 * PAGE)
        bitmap = bytearray(8)

        _native.bitmap_set_data(fd, 0, 8 * PAGE, bitmap)

        assert pages_of(bitmap) == {0, 1, 5, 6, 7}
        assert ram[2 * PAGE : 5 * PAGE] == bytes(3 * PAGE)


def test_a_closed_descriptor_is_an_os_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.bitmap_set_data(999_999, 0, PAGE, bytearray(8))
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.punch_hole(999_999, 0, PAGE)


@pytest.mark.process
def test_each_bit_is_newly_set_in_one_process_only() -> None:
    with shared_memory(16 * 1024) as (fd, bitmap), Peer("set", fd) as one, Peer("set", fd) as two:
        for peer in (one, two):
            peer.answer()
        for peer in (one, two):
            peer.tell("go")

        assert one.answer() + two.answer() == 16 * 1024 * 8
        assert bitmap[:] == b"\xff" * len(bitmap)


@pytest.mark.process
def test_moves_to_and_fro_between_processes_lose_and_add_nothing() -> None:
    pages = set(random.Random(2).sample(range(8192), 3000))
    with (
        shared_memory(1024) as (ping_fd, ping),
        shared_memory(1024) as (pong_fd, pong),
        Peer("move", ping_fd, pong_fd) as there,
        Peer("move", pong_fd, ping_fd) as back,
    ):
        ping[:] = bytes(bitmap_of(pages, 8192))
        for peer in (there, back):
            peer.answer()
        for peer in (there, back):
            peer.tell(3000)
        for peer in (there, back):
            peer.answer()

        assert pages_of(ping) | pages_of(pong) == pages
