"""Memory of a process that knows nothing of us: which it is, and how it is mapped."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine import _native
from engine.errors import MemoryRefused, shown
from engine.guest.mappings import Mapping, Range, flags_of
from engine.memory.blocks import PAGE_SIZE, RamBlock

#: What a process does whose memory its children do not need.
NEVER_FORKED: Final = "have the process call madvise(MADV_DONTFORK) for that memory"


@dataclass(frozen=True, slots=True)
class ForeignBlock:
    """A RAM block of the process.

    :ivar block: its descriptor is ours, to be closed.
    :ivar address: where the process maps it whole."""

    block: RamBlock
    address: int


def ranges_of(blocks: Sequence[ForeignBlock]) -> list[Range]:
    """Where they are in the process."""
    return [(each.address, each.block.size) for each in blocks]


def open_block(name: str, fd: int, size: int) -> RamBlock:
    """:raise MemoryRefused: not whole pages of the file's."""
    page_size = max(os.fstatvfs(fd).f_bsize, PAGE_SIZE)
    if size <= 0 or size % page_size:
        raise MemoryRefused(
            f"memory '{shown(name)}' of {size} bytes is not whole pages of {page_size}"
        )
    return RamBlock(name, size, fd, page_size)


def find_shared(what: str, fd: int, size: int, pid: int, mappings: Sequence[Mapping]) -> Mapping:
    """Where the process maps a file of this size.

    :param what: the file, as people are told of it.
    :param mappings: all of the process.
    :raise MemoryRefused: it does not map all of it, shared and writable, and once."""
    found = os.fstat(fd)  # a memory file has one device only
    file = (found.st_dev, found.st_ino)
    ours = [each for each in mappings if each.file == file]
    if not ours or not all(each.is_written for each in ours):
        raise MemoryRefused(f"process {pid} does not map {what} shared and writable")
    first = min(ours, key=lambda each: each.start)
    check_whole(what, first, size, mappings)
    return first


def check_whole(what: str, mapping: Mapping, size: int, mappings: Sequence[Mapping]) -> None:
    """:raise MemoryRefused: the file is not mapped once, and from its beginning to its end."""
    file = mapping.file
    whole = [each for each in mappings if each.file == file]
    covered = sum(each.end - each.start for each in whole)
    end = max(each.end for each in whole)
    if covered != size or mapping.offset != 0 or end != mapping.start + size:
        raise MemoryRefused(
            f"{what} is mapped in part, from an offset, or more than once; give that memory a file "
            "of its own"
        )


def check_nobody_waits(blocks: Sequence[ForeignBlock], pid: int) -> None:
    """A postcopy whose ramferry was killed leaves memory that waits for pages for ever.

    :raise MemoryRefused: one of the blocks is such memory.
    :raise GuestError: the process has ended, or is not ours to look at."""
    if any("um" in each for each in flags_of(pid, ranges_of(blocks))):
        raise MemoryRefused(
            f"the memory of process {pid} waits for pages of a migration that nobody goes on with; "
            "end the process and start another one"
        )


def is_in_children(pid: int, ranges: Sequence[Range]) -> bool:
    """Whether a fork would give memory of these ranges to the child: no MADV_DONTFORK holds.

    :raise GuestError: the process has ended, or is not ours to look at."""
    return not all("dc" in each for each in flags_of(pid, ranges))


def register(pid: int, uffd: int, place: Range, mode: int) -> None:
    """Have a negotiated userfaultfd of the process see what is done to a range of its memory.

    :param mode: one of `_native.UFFD_REGISTER_*`.
    :raise MemoryRefused: another one does.
    :raise OSError: not possible."""
    try:
        _native.uffd_register(uffd, *place, mode)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        raise MemoryRefused(
            f"the memory of process {pid} has a userfaultfd already, of another ramferry or of the "
            "process itself"
        ) from exc
