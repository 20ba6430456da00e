"""Dirty tracking on the real kernel, from outside the tracked process."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from engine.guest.tracker import FEATURES
from tests.kernel import has_pagemap_scan
from tests.native.support import (
    PAGE,
    Peer,
    bitmap_of,
    pages_of,
    shared_memory,
    slice_pages,
    slices,
)

Look = Callable[[int, int, bytearray, tuple[int, int, int, int]], int]

needs_scan = pytest.mark.skipif(not has_pagemap_scan(), reason="PAGEMAP_SCAN needs Linux 6.7")
process = pytest.mark.process


class TrackedGuest:
    """A guest process over a memfd, its pagemap, and our bitmap."""

    def __init__(self, page_count: int, fd: int, peer: Peer) -> None:
        self.page_count, self.fd, self.peer = page_count, fd, peer
        self.address = peer.answer()
        self.pagemap = os.open(f"/proc/{peer.process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def write(self, first: int, count: int = 1, step: int = 1) -> None:
        assert self.peer.ask(first, count, step) == count

    def scan(self, index: int = 0, count: int = 1, look: Look = _native.pagemap_scan) -> set[int]:
        """Pages written since the last scan."""
        bitmap = bitmap_of((), self.page_count)
        page_slice = (self.page_count, 512, index, count)
        newly_set = look(self.pagemap, self.address, bitmap, page_slice)
        found = pages_of(bitmap)
        assert newly_set == len(found)
        return found

    def peek(self, index: int = 0, count: int = 1) -> set[int]:
        """The same; the next scan finds them again."""
        return self.scan(index, count, _native.pagemap_peek)


@contextmanager
def tracked_guest(page_count: int) -> Iterator[TrackedGuest]:
    with shared_memory(page_count * PAGE) as (fd, _), Peer("guest", fd) as peer:
        guest = TrackedGuest(page_count, fd, peer)
        try:
            yield guest
        finally:
            os.close(guest.pagemap)


@needs_scan
@process
def test_each_scan_finds_exactly_what_was_written_since_the_last() -> None:
    choose = random.Random(4)
    with tracked_guest(8192) as guest:
        guest.scan()
        for _ in range(20):
            written = set()
            for _ in range(choose.randrange(6)):
                first, count, step = (
                    choose.randrange(4000),
                    choose.randrange(1, 300),
                    choose.randrange(1, 9),
                )
                guest.write(first, count, step)
                written |= set(range(first, first + count * step, step))
            assert guest.scan() == written
        assert guest.scan() == set()


@needs_scan
@process
@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_peek_has_found_the_next_scan_finds_again(workers: int) -> None:
    choose = random.Random(workers)
    with tracked_guest(8192) as guest:
        guest.scan()
        written: set[int] = set()
        for _ in range(8):
            first, count, step = choose.randrange(4000), choose.randrange(1, 300), 3
            guest.write(first, count, step)
            written |= set(range(first, first + count * step, step))
            found = [guest.peek(index, workers) for index in range(workers)]
            for index, pages in enumerate(found):
                assert pages == written & slice_pages((8192, 512, index, workers))

        assert guest.scan() == written
        assert guest.peek() == set()


@needs_scan
@process
def test_slices_find_their_own_pages_and_leave_the_others_armed() -> None:
    with tracked_guest(4096) as guest:
        guest.scan()
        guest.write(100, 1500, 2)
        written = set(range(100, 3100, 2))
        for index in range(3):
            assert guest.scan(index, 3) == written & slice_pages((4096, 512, index, 3))
        assert guest.scan() == set()


@needs_scan
@process
@pytest.mark.parametrize("workers", [2, 3, 9])
@pytest.mark.parametrize("dense", [0, 40])
def test_what_is_skipped_was_not_written(workers: int, dense: int) -> None:
    """Stripes without a written page are skipped, many at once, by each worker for itself."""
    choose = random.Random(workers + dense)
    with tracked_guest(40_000) as guest:
        guest.scan()
        for _ in range(12):
            written = {choose.choice([0, 511, 512, 39_999]), choose.randrange(40_000)}
            for page in written:
                guest.write(page)
            for _ in range(dense):
                first = choose.randrange(39_000)
                guest.write(first, 300, 3)
                written |= set(range(first, first + 900, 3))
            for index in choose.sample(range(workers), workers):
                own = slice_pages((40_000, 512, index, workers))
                assert guest.scan(index, workers) == written & own


@needs_scan
def test_memory_that_lost_its_tracker_is_not_skipped() -> None:
    """Whichever worker looks, though nothing was written before it: all of its tracking is over."""
    page_count = 8192
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    uffd = _native.uffd_open(_native.UFFD_USER_MODE_ONLY, FEATURES)
    try:
        with shared_memory(page_count * PAGE) as (_, ram):
            address = _native.mapping_address(ram)
            for first, count in ((0, 7 * 512), (8 * 512, page_count - 8 * 512)):
                place = address + first * PAGE
                _native.uffd_register(uffd, place, count * PAGE, _native.UFFD_REGISTER_WP)
                armed = (first + count, 512, 0, 1)
                _native.pagemap_scan(pagemap, address, bitmap_of((), page_count), armed, first)
            for index in range(2):
                mine = (page_count, 512, index, 2)
                with pytest.raises(PermissionError):
                    _native.pagemap_scan(pagemap, address, bitmap_of((), page_count), mine)
    finally:
        os.close(uffd)
        os.close(pagemap)


@needs_scan
@process
def test_more_regions_than_one_call_returns_are_all_found() -> None:
    with tracked_guest(20_000) as guest:
        guest.scan()
        guest.write(1, 9000, 2)
        assert guest.scan() == set(range(1, 18_001, 2))


@needs_scan
@process
def test_a_page_first_touched_after_the_first_scan_is_found() -> None:
    with tracked_guest(262_144) as guest:
        guest.write(1000)
        assert 1000 in guest.scan()
        guest.write(1001)  # its page table is there, its entry is not
        guest.write(200_000)  # not even a page table
        found = guest.scan()
        assert {1001, 200_000} <= found
        assert 1000 not in found
        guest.scan()
        guest.write(1002)
        guest.write(200_001)
        assert {1002, 200_001} <= guest.scan()


@needs_scan
@process
def test_a_page_punched_and_touched_again_is_found() -> None:
    with tracked_guest(1024) as guest:
        guest.write(7)
        guest.scan()
        _native.punch_hole(guest.fd, 7 * PAGE, PAGE)
        guest.write(7)
        assert guest.scan() == {7}


@needs_scan
@process
def test_scans_allocate_no_memory_for_what_was_never_touched() -> None:
    with tracked_guest(262_144) as guest:
        guest.scan()
        guest.scan()
        assert os.fstat(guest.fd).st_blocks == 0
        with open(f"/proc/{guest.peer.process.pid}/status") as status:
            tables = next(int(line.split()[1]) for line in status if line.startswith("VmPTE"))
        assert tables < 2500  # KiB: at most the page tables of 1 GiB, and the process's own


@needs_scan
@process
def test_a_dead_process_is_an_error_not_a_clean_guest() -> None:
    with tracked_guest(512) as guest:
        guest.write(0, 10)
        guest.peer.kill()
        with pytest.raises(ProcessLookupError):
            guest.scan()


@needs_scan
def test_memory_that_is_not_registered_is_refused() -> None:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with shared_memory(64 * PAGE) as (_, ram), pytest.raises(PermissionError):
            _native.pagemap_scan(fd, _native.mapping_address(ram), bytearray(8), (64, 64, 0, 1))
    finally:
        os.close(fd)


def test_a_pagemap_knows_pagemap_scan_where_the_kernel_has_it() -> None:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert _native.pagemap_scan_supported(fd) == has_pagemap_scan()
    finally:
        os.close(fd)


def test_other_descriptors_do_not_know_pagemap_scan() -> None:
    with shared_memory(PAGE) as (fd, _):
        assert not _native.pagemap_scan_supported(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.pagemap_scan_supported(999_999)


@given(st.sets(st.integers(0, 599)), st.integers(0, 300), slices(600))
def test_soft_dirty_reads_bit_55_of_the_slices_entries(
    written: set[int], first: int, page_slice: _native.Slice
) -> None:
    """The entries are a file that looks like a pagemap, so this needs no kernel support."""
    entries = [(1 << 63) | ((1 << 55) if page in written else (1 << 54)) for page in range(600)]
    with shared_memory(8 * (first + 600)) as (fd, pagemap):
        pagemap[8 * first :] = struct.pack("600Q", *entries)
        bitmap = bitmap_of((), 600)

        newly_set = _native.soft_dirty_scan(fd, first * PAGE, bitmap, page_slice)

        assert pages_of(bitmap) == written & slice_pages(page_slice)
        assert newly_set == len(pages_of(bitmap))


def test_a_pagemap_that_ends_early_is_an_error() -> None:
    with shared_memory(8 * 10) as (fd, _), pytest.raises(ProcessLookupError):
        _native.soft_dirty_scan(fd, 0, bytearray(8), (64, 64, 0, 1))
