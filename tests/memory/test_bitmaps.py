"""Which pages of a block have data, by its file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import _native
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock

PAGES = 70


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    yield fd
    os.close(fd)


def data_of(fd: int, pages: int = PAGES, *, surely: bool = False) -> set[int]:
    """The pages that are found, by number; what is said of them is checked."""
    bitmaps = PageBitmaps.create("test", [RamBlock("ram", pages * PAGE_SIZE, fd)])
    try:
        blocks = os.fstat(fd).st_blocks
        newly_set = bitmaps.set_data(surely=surely)
        assert os.fstat(fd).st_blocks == blocks
        assert newly_set == bitmaps.count()
        assert bitmaps.set_data(surely=surely) == 0
        words = bytes(bitmaps[0])
    finally:
        bitmaps.close()
    return {page for page in range(len(words) * 8) if words[page // 8] >> page % 8 & 1}


@given(st.sets(st.integers(0, PAGES - 1)), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_pages_with_data_are_found(fd: int, written: set[int], surely: bool) -> None:
    _native.punch_hole(fd, 0, PAGES * PAGE_SIZE)
    for page in written:
        os.pwrite(fd, b"x", page * PAGE_SIZE)
    assert data_of(fd, surely=surely) == written


@pytest.mark.parametrize("surely", [False, True])
def test_of_a_full_file_every_page_is_found(fd: int, surely: bool) -> None:
    os.pwrite(fd, b"x" * PAGES * PAGE_SIZE, 0)
    assert data_of(fd, surely=surely) == set(range(PAGES))


def test_reserved_pages_may_have_data_and_surely_have_none(fd: int) -> None:
    os.posix_fallocate(fd, 0, PAGES * PAGE_SIZE)
    assert data_of(fd) == set(range(PAGES))
    assert data_of(fd, surely=True) == set()


def test_memory_beyond_the_end_of_a_file_may_pass_for_data_and_surely_does_not(fd: int) -> None:
    os.pwrite(fd, b"x" * 10 * PAGE_SIZE, 0)
    beyond = (str(PAGES * PAGE_SIZE), str((PAGES - 10) * PAGE_SIZE))
    command = ["fallocate", "--keep-size", "--offset", beyond[0], "--length", beyond[1]]
    subprocess.run([*command, f"/proc/self/fd/{fd}"], check=True, pass_fds=[fd])
    assert data_of(fd) == set(range(PAGES))
    assert data_of(fd, surely=True) == set(range(10))


def test_memory_behind_a_block_fills_none_of_its_holes(fd: int) -> None:
    """There would be memory for all of the block, but it is elsewhere in the file."""
    os.pwrite(fd, b"x" * 60 * PAGE_SIZE, 10 * PAGE_SIZE)
    assert data_of(fd, 30) == set(range(10, 30))


def test_of_a_file_that_cannot_be_looked_at_nothing_is_said(fd: int) -> None:
    block = RamBlock("ram", PAGES * PAGE_SIZE, os.dup(fd))
    bitmaps = PageBitmaps.create("test", [block])
    os.close(block.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        bitmaps.set_data()
    assert bitmaps.count() == 0
    bitmaps.close()
