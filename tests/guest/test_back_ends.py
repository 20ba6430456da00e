"""What a vhost-user back end writes to, by its mappings, and what it must not have."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import GuestError, MemoryRefused
from engine.guest import back_ends
from engine.guest.back_ends import (
    BackEnd,
    BackEndTracker,
    check_bypasses,
    mappings_of,
    pieces_of,
    track_all,
)
from engine.guest.foreign import ForeignBlock
from engine.guest.mappings import Mapping
from engine.guest.sharers import files_of
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import PIECES_MAX, TrackedPiece

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


@pytest.fixture
def ourselves() -> Iterator[BackEnd]:
    with contextlib.closing(BackEnd.open(os.getpid())) as found:
        yield found


@pytest.fixture
def ended() -> Iterator[BackEnd]:
    """Its pid may be another process's by now."""
    child = subprocess.Popen(["sleep", "60"])
    with contextlib.closing(BackEnd.open(child.pid)) as found:
        child.kill()
        child.wait()
        yield found


def denied(*_: object) -> list[Mapping]:
    raise PermissionError(13, "Permission denied")


def tracker_of(back_end: BackEnd, *mappings: Mapping) -> BackEndTracker:
    return BackEndTracker(
        back_end.pid, -1, -1, 0, [], back_end=back_end, files=FILES, mappings=frozenset(mappings)
    )


def test_mappings_that_go_on_in_each_other_are_one_however_the_kernel_splits_them(
    ourselves: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        mapping(100, 4, 8),
        mapping(104, 4, 12),
        mapping(108, 2, 0),
        mapping(110, 2, 2, inode=11),
        mapping(112, 2, 4, inode=11, rights="r--s"),
        mapping(115, 2, 7, inode=11, rights="r--s"),
    ]
    monkeypatch.setattr(back_ends, "read_mappings", lambda _pid: [*found, mapping(200, 1, inode=9)])

    assert mappings_of(ourselves, FILES) == {mapping(100, 8, 8), *found[2:]}
    tracker_of(ourselves, mapping(100, 8, 8), *found[2:]).check()


@pytest.mark.parametrize("maps", [(), (mapping(100, 16),)])
def test_who_may_not_be_looked_at_any_more_is_not_taken_for_one_that_maps_nothing(
    maps: tuple[Mapping], ourselves: BackEnd, ended: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(back_ends, "read_mappings", denied)
    with pytest.raises(MemoryRefused, match="cannot be looked at: Permission denied"):
        tracker_of(ourselves, *maps).check()
    with pytest.raises(MemoryRefused, match=r"has ended, .*; migrate it once more"):
        tracker_of(ended, *maps).check()


def test_who_has_ended_is_not_tracked_by_its_pid(
    ended: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(back_ends, "files_of", lambda *_: FILES)
    monkeypatch.setattr(back_ends, "read_mappings", lambda _pid: [])  # another one has its pid
    monkeypatch.setattr(back_ends, "check_bypasses", lambda _back_end: None)
    with pytest.raises(MemoryRefused, match=f"{ended.pid}\\) has ended; start ramferry anew"):
        track_all(os.getpid(), BLOCKS, [ended])


def test_too_many_pieces_are_refused_before_anything_is_injected(
    ourselves: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [mapping(2 * i, 1) for i in range(PIECES_MAX - 1)]
    monkeypatch.setattr(back_ends, "files_of", lambda *_: FILES)
    monkeypatch.setattr(back_ends, "read_mappings", lambda _pid: many)
    with pytest.raises(MemoryRefused, match=f"in {PIECES_MAX + 1} pieces; {PIECES_MAX} can be"):
        track_all(2**22, BLOCKS, [ourselves])


def test_descriptors_that_may_not_be_looked_at_are_refused(
    ourselves: BackEnd, ended: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryRefused, match="has ended"):
        check_bypasses(ended)
    with monkeypatch.context() as patched:
        patched.setattr(os, "readlink", denied)
        with pytest.raises(MemoryRefused, match="cannot be looked at: Permission denied"):
            check_bypasses(ourselves)
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", lambda _path: [])
        with pytest.raises(MemoryRefused, match="its first thread has ended"):
            check_bypasses(ourselves)
        with pytest.raises(MemoryRefused, match="has ended, and what it wrote"):
            check_bypasses(ended)  # another process has its pid


@pytest.mark.parametrize(
    "path", ["/dev/vfio/12", "/dev/iommu", "/dev/vhost-vdpa-0", "/dev/uio0", "/dev/infiniband/x"]
)
def test_a_device_that_writes_by_itself_is_refused(
    path: str, ourselves: BackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "readlink", lambda _path: path)
        with pytest.raises(MemoryRefused, match=f"has '{path}' open"):
            check_bypasses(ourselves)


def test_a_file_that_bypasses_the_cache_is_refused(tmp_path: Path, ourselves: BackEnd) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(PAGE_SIZE))
    check_bypasses(ourselves)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    try:
        with pytest.raises(MemoryRefused, match="past every page table"):
            check_bypasses(ourselves)
    finally:
        os.close(fd)
    check_bypasses(ourselves)


def test_a_process_that_has_ended_is_told() -> None:
    with pytest.raises(GuestError, match="there is no vhost-user back end with pid 4194304"):
        BackEnd.open(2**22)
    with pytest.raises(GuestError, match="cannot be looked at"):
        files_of(BLOCKS, 2**22)


def test_memory_that_is_not_where_it_was_is_refused() -> None:
    with pytest.raises(MemoryRefused, match="does not map its memory where it did"):
        files_of(BLOCKS, os.getpid())
