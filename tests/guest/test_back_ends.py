"""What a vhost-user back end writes to, by its mappings, and what it must not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.errors import GuestError, MemoryRefused
from engine.guest.back_ends import check_bypasses, open_back_end, pieces_of
from engine.guest.foreign import ForeignBlock
from engine.guest.mappings import Mapping
from engine.guest.sharers import files_of
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import TrackedPiece

SIZE = 16 * PAGE_SIZE
FILES = [(1, 10), (1, 11)]
BLOCKS = [ForeignBlock(RamBlock(name, SIZE, -1), 0) for name in ("ram0", "ram1")]


def mapping(
    start: int, pages: int, first: int = 0, *, rights: str = "rw-s", inode: int = 10
) -> Mapping:
    """So many pages of a file, from one on."""
    begin = start * PAGE_SIZE
    return Mapping(begin, begin + pages * PAGE_SIZE, rights, first * PAGE_SIZE, 1, inode)


def pieces(*mappings: Mapping) -> list[TrackedPiece]:
    return pieces_of(frozenset(mappings), BLOCKS, FILES)


def test_each_mapping_is_a_piece_of_its_block() -> None:
    assert pieces(mapping(200, 4, 12, inode=11), mapping(100, 16), mapping(300, 2, 3)) == [
        TrackedPiece(0, 0, 100 * PAGE_SIZE, SIZE, 0),
        TrackedPiece(1, 0, 200 * PAGE_SIZE, 4 * PAGE_SIZE, 12 * PAGE_SIZE),
        TrackedPiece(0, 0, 300 * PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE),
    ]


def test_what_lies_beyond_the_end_of_a_file_is_no_piece() -> None:
    assert pieces(mapping(100, 8, 12), mapping(200, 8, 16)) == [
        TrackedPiece(0, 0, 100 * PAGE_SIZE, 4 * PAGE_SIZE, 12 * PAGE_SIZE)
    ]


@pytest.mark.parametrize("rights", ["rw-p", "r--s", "r-xp"])
def test_what_does_not_write_into_the_file_is_no_piece(rights: str) -> None:
    assert pieces(mapping(100, 16, rights=rights)) == []


def test_a_file_that_bypasses_the_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(PAGE_SIZE))
    check_bypasses(os.getpid())
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    try:
        with pytest.raises(MemoryRefused, match="past every page table"):
            check_bypasses(os.getpid())
    finally:
        os.close(fd)
    check_bypasses(os.getpid())


def test_a_process_that_has_ended_is_told() -> None:
    with pytest.raises(GuestError, match="there is no vhost-user back end with pid 4194304"):
        open_back_end(2**22)
    with pytest.raises(GuestError, match="cannot be looked at"):
        files_of(BLOCKS, 2**22)


def test_memory_that_is_not_where_it_was_is_refused() -> None:
    with pytest.raises(MemoryRefused, match="does not map its memory where it did"):
        files_of(BLOCKS, os.getpid())
