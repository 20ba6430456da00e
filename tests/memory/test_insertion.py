"""Inserting behind a guest's mapping: whole, once, never over what is there; discarding before."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _native
from engine.errors import MemoryRefused, WireError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import RamBlock
from engine.memory.insertion import Inserter, discard, unit_pages, widen
from engine.memory.missing import open_missing
from tests.hugepages import huge_pages
from tests.kernel import has_userfaultfd
from tests.native.support import PAGE, bitmap_of, pages_in, pages_of, table_of

__all__ = ["huge_pages"]

needs_uffd = pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")
PAGES = 1200
HUGE = 2 * 1024 * 1024


@dataclass
class Guest:
    """RAM that a guest (this process) has mapped and registered."""

    block: RamBlock
    ram: mmap.mmap
    uffd: int
    received: PageBitmaps

    def inserter(self) -> Inserter:
        address = _native.mapping_address(self.ram)
        return Inserter([self.block], [self.uffd], [address], self.received)


@contextlib.contextmanager
def guest(page_count: int = PAGES, *, fd: int = -1, backing: int = PAGE) -> Iterator[Guest]:
    with contextlib.ExitStack() as stack:
        if fd < 0:
            fd = os.memfd_create("ramferry-test", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
        os.ftruncate(fd, page_count * PAGE)
        block = RamBlock("ram", page_count * PAGE, fd, backing)
        ram = stack.enter_context(block.map())
        uffd = open_missing([ram])
        stack.callback(os.close, uffd)
        received = PageBitmaps.create("received", [block])
        stack.callback(received.close)
        yield Guest(block, ram, uffd, received)


@contextlib.contextmanager
def file_in_tmpfs(path: Path, options: str) -> Iterator[int]:
    """A file in a tmpfs of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root; CI runs this as root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        fd = os.open(path / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        subprocess.run(["umount", str(path)], check=True)


runs_of_pages = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(1, 600)), min_size=1, max_size=5
).map(lambda runs: [(first, min(count, PAGES - first)) for first, count in runs])


@needs_uffd
@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), runs_of_pages), min_size=1, max_size=5))
def test_whatever_comes_first_stays(steps: list[tuple[bool, list[tuple[int, int]]]]) -> None:
    """Against a model; what is inserted twice, differently, keeps its first content."""
    with guest() as made:
        inserter, model, there = made.inserter(), bytearray(PAGES * PAGE), set[int]()
        received = set[int]()
        for number, (is_zero, runs) in enumerate(steps, 1):
            pages = pages_in(runs)
            if is_zero:  # never of pages that are there, as the source's RAM does not change
                holes = sorted(set(pages) - there)
                inserter.clear(0, table_of([(page, 1) for page in holes]), len(holes))
                received.update(holes)
                continue
            payload = b"".join(bytes([number]) * PAGE for _ in pages)
            fresh = inserter.place(0, memoryview(payload), table_of(runs), len(runs))
            new = set(pages) - received
            assert fresh == len(new)
            for page in new:
                model[page * PAGE : (page + 1) * PAGE] = bytes([number]) * PAGE
            there |= new
            received |= new
        assert os.pread(made.block.fd, made.block.size, 0) == model
        assert made.block.allocated_bytes() == len(there) * PAGE
        assert pages_of(made.received[0]) == received


@needs_uffd
def test_a_page_that_was_placed_but_not_marked_is_marked_and_not_overwritten() -> None:
    """Its receiver was killed in between, and the guest has written it since."""
    with guest(16) as made:
        inserter = made.inserter()
        inserter.place(0, memoryview(b"a" * PAGE), table_of([(3, 1)]), 1)
        made.received.clear()
        made.ram[3 * PAGE : 3 * PAGE + 5] = b"guest"

        fresh = inserter.place(0, memoryview(b"a" * 3 * PAGE), table_of([(2, 3)]), 1)

        assert fresh == 2
        assert made.ram[3 * PAGE : 3 * PAGE + 6] == b"guesta"
        assert pages_of(made.received[0]) == {2, 3, 4}


@needs_uffd
@pytest.mark.parametrize("placed_by", ["the guest's userfaultfd", "another mapping"])
def test_who_waits_is_woken_whoever_placed_the_page(placed_by: str) -> None:
    found: list[int] = []
    with guest(16) as made:

        def touch() -> None:
            flag = bytearray(1)
            with memoryview(made.ram) as ram, ram[5 * PAGE : 6 * PAGE] as page:
                _native.zero_scan("scalar", page, flag, PAGE)  # without the interpreter's lock
                found.append(page[0])

        toucher = threading.Thread(target=touch)
        toucher.start()
        os.set_blocking(made.uffd, True)
        assert len(os.read(made.uffd, 32)) == 32  # it waits
        if placed_by == "another mapping":  # which wakes nobody
            os.pwrite(made.block.fd, b"z" * PAGE, 5 * PAGE)
        assert made.inserter().place(0, memoryview(b"z" * PAGE), table_of([(5, 1)]), 1) == (
            placed_by == "the guest's userfaultfd"
        )
        toucher.join(60)
        assert found == [ord("z")]


@needs_uffd
@pytest.mark.parametrize(
    ("runs", "payload_pages"),
    [([(15, 2)], 2), ([(16, 1)], 1), ([(3, 0)], 0), ([(3, 2)], 1), ([(2**32 - 1, 2)], 2)],
)
def test_bad_runs_place_nothing(runs: list[tuple[int, int]], payload_pages: int) -> None:
    with guest(16) as made:
        inserter, payload = made.inserter(), memoryview(b"x" * payload_pages * PAGE)
        with pytest.raises(WireError, match="pages for RAM block 'ram'"):
            inserter.place(0, payload, table_of([(0, 1), *runs]), 1 + len(runs))
        if runs != [(3, 2)]:
            with pytest.raises(WireError, match="zero pages for RAM block 'ram'"):
                inserter.clear(0, table_of(runs), len(runs))
        assert made.block.allocated_bytes() == made.received.count() == 0


@needs_uffd
def test_memory_that_is_full_is_an_error_and_what_was_placed_is_marked(tmp_path: Path) -> None:
    with file_in_tmpfs(tmp_path, "size=128k") as fd, guest(64, fd=fd) as made:
        with pytest.raises(MemoryRefused, match="cannot place pages behind the guest"):
            made.inserter().place(0, memoryview(b"x" * 64 * PAGE), table_of([(0, 64)]), 1)
        marked = pages_of(made.received[0])
        assert marked <= set(range(32))
        assert made.block.allocated_bytes() >= len(marked) * PAGE


# -- discarding ----------------------------------------------------------------------------------


@given(
    st.integers(1, 400),
    st.lists(st.sets(st.integers(0, 399)), min_size=1, max_size=3),
    st.sets(st.integers(0, 399)),
    st.sampled_from([1, 2, 64, 100, 512]),
)
def test_discarding_frees_stale_units_whole_and_leaves_all_else(
    page_count: int, steps: list[set[int]], unreceived: set[int], unit: int
) -> None:
    """Also when more becomes stale later."""
    everything = set(range(page_count))
    received = everything - unreceived
    bitmap, gone = bitmap_of(received, page_count), set[int]()
    units = [range(s, min(s + unit, page_count)) for s in range(0, page_count, unit)]
    fd = os.memfd_create("ramferry-test", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, b"x" * page_count * PAGE, 0)
        for step in steps:
            stale = bitmap_of(step & everything, page_count)
            now = {page for pages in units if step.intersection(pages) for page in pages}

            assert _native.discard_stale(fd, bitmap, stale, page_count, unit) == len(now)

            gone |= now
            assert pages_of(stale) == set()
            assert pages_of(bitmap) == received - gone
            content = os.pread(fd, page_count * PAGE, 0)
            assert {p for p in range(page_count) if content[p * PAGE]} == everything - gone
            assert os.fstat(fd).st_blocks * 512 == len(everything - gone) * PAGE
    finally:
        os.close(fd)


@pytest.mark.parametrize("moment", range(4))
def test_discarding_that_was_killed_is_done_again_and_all_is_right(moment: int) -> None:
    """At any instant a page is stale still, or gone and not received."""
    page_count = 65536
    content = random.Random(moment).randbytes(PAGE) * page_count
    rest = list(range(0, page_count, 3))
    with contextlib.ExitStack() as stack:
        fd = os.memfd_create("ramferry-test", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.pwrite(fd, content, 0)
        block = RamBlock("ram", page_count * PAGE, fd)
        received, stale = (PageBitmaps.create(name, [block]) for name in ("received", "stale"))
        for bitmaps in (received, stale):
            stack.callback(bitmaps.close)
            bitmaps.fill()
        for page in rest:  # two of three are stale
            stale[0][page // 8] &= ~(1 << page % 8)
        before = stale.count()
        child = os.fork()
        if not child:
            discard([block], received, stale)
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while stale.count() > before * (3 - moment) // 4 and time.monotonic() < deadline:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

        for page in sorted(set(range(page_count)) - pages_of(stale[0]) - set(rest)):
            assert not received[0][page // 8] >> page % 8 & 1
            assert os.pread(fd, 1, page * PAGE) == b"\0"
        left = stale.count()
        assert discard([block], received, stale) == left
        assert pages_of(received[0]) == set(rest)
        assert block.allocated_bytes() == len(rest) * PAGE
        assert stale.count() == 0


class IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def held_by_a_pipe(ram: mmap.mmap, page: int) -> Iterator[None]:
    """Another one of the kernel's references to a page of `ram`."""
    libc = ctypes.CDLL(None, use_errno=True)
    read_end, write_end = os.pipe()
    try:
        part = IoVector(_native.mapping_address(ram) + page * PAGE, PAGE)
        assert libc.vmsplice(write_end, ctypes.byref(part), 1, 0) == PAGE
        yield
    finally:
        os.close(read_end)
        os.close(write_end)


def test_what_a_punch_leaves_in_a_huge_page_of_a_tmpfs_fails_the_discard(tmp_path: Path) -> None:
    """Such a page would be no fault, and zero. Its stale bit stays for the next time."""
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(file_in_tmpfs(tmp_path, "huge=always"))
        block = RamBlock("ram", 2 * HUGE, fd)
        os.ftruncate(fd, block.size)
        ram = stack.enter_context(block.map())
        ram[:] = b"x" * block.size
        received, stale = (PageBitmaps.create(name, [block]) for name in ("received", "stale"))
        for bitmaps in (received, stale):
            stack.callback(bitmaps.close)
        received.fill()
        _native.bitmap_set_range(stale[0], 5, 1)
        with held_by_a_pipe(ram, 100):
            with pytest.raises(MemoryRefused, match="RAM block 'ram': somebody holds a part"):
                discard([block], received, stale)
            assert pages_of(stale[0]) == {5}
            assert 5 not in pages_of(received[0])
            _native.bitmap_set_range(stale[0], 600, 1)  # in the other huge page, which nobody holds
            with pytest.raises(MemoryRefused):
                discard([block], received, stale)

        assert discard([block], received, stale) == 2

        assert stale.count() == 0
        assert pages_of(received[0]) == set(range(block.page_count)) - {5, 600}
        assert os.lseek(fd, 5 * PAGE, os.SEEK_DATA) == 6 * PAGE
        assert ram[6 * PAGE : 7 * PAGE] == b"x" * PAGE


@given(
    st.integers(1, 400),
    st.sets(st.integers(0, 399)),
    st.sampled_from([1, 2, 64, 100, 512]),
)
def test_widening_is_what_discarding_does_seen_from_the_source(
    page_count: int, dirty: set[int], unit: int
) -> None:
    dirty = {page for page in dirty if page < page_count}
    bitmap = bitmap_of(dirty, page_count)
    units = [range(s, min(s + unit, page_count)) for s in range(0, page_count, unit)]
    wide = {page for pages in units if dirty.intersection(pages) for page in pages}

    assert _native.bitmap_widen(bitmap, page_count, unit) == len(wide) - len(dirty)
    assert pages_of(bitmap) == wide


def test_blocks_of_other_page_sizes_are_refused() -> None:
    with pytest.raises(MemoryRefused, match="pages of 1073741824 bytes; postcopy places those of"):
        unit_pages(RamBlock("ram", 2**30, -1, 2**30))
    assert unit_pages(RamBlock("ram", HUGE, -1, HUGE)) == 512


# -- huge pages ----------------------------------------------------------------------------------


@needs_uffd
@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_are_placed_and_discarded_whole() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        with guest(1024, fd=fd, backing=HUGE) as made:
            content = random.Random(3).randbytes(HUGE)
            with pytest.raises(WireError, match="not whole units of 512"):
                made.inserter().place(0, memoryview(content), table_of([(256, 512)]), 1)
            assert made.inserter().place(0, memoryview(content), table_of([(512, 512)]), 1) == 512
            assert made.ram[HUGE:] == content
            assert made.inserter().place(0, memoryview(bytes(HUGE)), table_of([(512, 512)]), 1) == 0
            dirty, stale = (PageBitmaps.create(name, [made.block]) for name in ("dirty", "stale"))
            for bitmaps in (dirty, stale):
                _native.bitmap_set_range(bitmaps[0], 515, 1)
            assert widen([made.block], dirty) == 511
            made.received.fill()
            assert discard([made.block], made.received, stale) == 512
            assert pages_of(made.received[0]) == set(range(512))
            assert made.block.allocated_bytes() == 0
            for bitmaps in (dirty, stale):
                bitmaps.close()
    finally:
        os.close(fd)


@needs_uffd
@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_nobody_knows_of_are_kept_and_known_when_they_come_again() -> None:
    """The bitmap of those that were placed went with the control process."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        with guest(1536, fd=fd, backing=HUGE) as made:
            inserter, run = made.inserter(), table_of([(512, 512)])
            inserter.place(0, memoryview(b"a" * HUGE), run, 1)
            made.ram[HUGE : HUGE + 5] = b"guest"
            made.received.clear()
            assert made.received.set_data(surely=True) == 0
            assert inserter.place(0, memoryview(b"a" * 2 * HUGE), table_of([(512, 1024)]), 1) == 512
            assert made.ram[HUGE : HUGE + 6] == b"guesta"
            assert pages_of(made.received[0]) == set(range(512, 1536))
            made.received.clear()
            assert inserter.clear(0, run, 1) == 512
            assert made.ram[HUGE : HUGE + 6] == b"guesta"
    finally:
        os.close(fd)


def test_a_second_userfaultfd_over_the_same_mapping_is_refused() -> None:
    if not has_userfaultfd():
        pytest.skip("no userfaultfd here")
    with guest(16) as made, pytest.raises(MemoryRefused, match="cannot be registered for faults"):
        open_missing([made.ram])


@needs_uffd
def test_what_surely_was_placed_is_what_has_data() -> None:
    with guest(16) as made:
        for page in (2, 3, 9):
            os.pwrite(made.block.fd, b"x", page * PAGE)
        assert made.received.set_data(surely=True) == 3
        assert pages_of(made.received[0]) == {2, 3, 9}


def test_filling_sets_the_bits_of_all_pages_and_none_beyond() -> None:
    blocks = [RamBlock(name, count * PAGE, -1) for name, count in (("a", 70), ("b", 64), ("c", 1))]
    bitmaps = PageBitmaps.create("received", blocks)
    bitmaps.fill()
    assert [pages_of(bitmap) for bitmap in bitmaps] == [set(range(n)) for n in (70, 64, 1)]
    bitmaps.close()
