"""Dirty tracking as a sender does it: move what the tracker found into the dirty bitmap, by slices.

Every harvest re-arms a page, if it does (a peek does not), before anyone reads its content, so a
write in between shows in the next harvest. What each tracker costs was measured; see
docs/tracking.md.
"""

from __future__ import annotations

import enum
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from engine import _native
from engine.errors import MemoryRefused
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import TrackedPiece, check_pieces

HASH_BYTES: Final = 16
#: A harvest says how far it is after so many pages of its own: 1 GiB, 80 ms of content-hash at
#: 13 GB/s a core, so that nobody takes a long one for a dead one.
PIECE_PAGES: Final = 262_144
ZEROS: Final = bytes(512 * PAGE_SIZE)


class TrackerName(enum.Enum):
    """How dirty pages are found; the value is what users see and may force."""

    UFFD = "uffd-wp"  #: userfaultfd write-protect async + PAGEMAP_SCAN (Linux 6.7)
    BITMAP = "guest-bitmap"  #: a shared bitmap written by a cooperating guest
    SOFT_DIRTY = "soft-dirty"  #: clear_refs and /proc/PID/pagemap
    HASH = "content-hash"  #: compare contents; the last resort
    NONE = "none"  #: the guest is stopped: nothing can become dirty


@dataclass(frozen=True, slots=True)
class Tracking:
    """The tracker in use.

    :ivar reason: why it was chosen, one line for people.
    :ivar fds: /proc/PID/pagemap of each tracked process (UFFD, SOFT_DIRTY), or the written-bitmap
        of each block, one bit a page (BITMAP); they belong to the guest object until
        `stop_tracking`.
    :ivar pieces: where blocks are in these processes (UFFD, SOFT_DIRTY).
    :ivar ends_with_pause: a guest that is continued after a pause is not tracked any more.
    :ivar processes: as people are told of them, if the pieces are of others than the guest."""

    name: TrackerName
    reason: str
    fds: tuple[int, ...] = ()
    pieces: tuple[TrackedPiece, ...] = ()
    ends_with_pause: bool = False
    processes: tuple[str, ...] = ()

    def lost(self, process: int, *, is_gone: bool) -> MemoryRefused:
        """Why the guest cannot be migrated any more, of a `TrackingLost` with these arguments."""
        who = self.processes[process] if process < len(self.processes) else "the guest"
        if is_gone:
            return MemoryRefused(
                f"{who} has ended or replaced its program, and what it wrote since then is not "
                "known"
            )
        return MemoryRefused(
            f"memory of {who} that was tracked has been mapped anew, and what was written there "
            "since is not known; migrate it once more"
        )


class TrackingLost(MemoryRefused):
    """What process `process` wrote since the last harvest is not known, and no later one tells.

    :ivar is_gone: nothing is left of its memory; else not all of it is tracked."""

    def __init__(self, process: int, is_gone: bool) -> None:
        super().__init__(process, is_gone)
        self.process, self.is_gone = process, is_gone

    def __str__(self) -> str:
        return f"what process {self.process} writes is not seen any more"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a harvest that is done: pages looked at, and those found written."""

    pages: int
    found: int


class Harvester(Protocol):
    """One tracker over one worker's slice of all blocks."""

    needs_private_copy: bool  #: page contents must be copied, and `sent` told, before they are sent

    def harvest(self, dirty: PageBitmaps, *, is_peek: bool = False) -> Iterator[Piece]:
        """Set the dirty bit of each page written since the last harvest; it is done when the
        iterator is. A page that is written meanwhile is found now or by the next harvest.

        :param is_peek: the next harvest may find these pages again, written or not: where it is to
            be armed, a page costs its next writer a fault.

        :raise TrackingLost: what was written is not known.
        :raise OSError: the kernel cannot; another sender may find it."""

    def sent(self, block_index: int, copy: bytes, runs: memoryview, run_count: int) -> None:
        """The pages of `runs` go to the destination as they are in `copy`."""

    def sent_zeros(self, block_index: int, runs: memoryview, run_count: int) -> None:
        """The pages of `runs` go to the destination as zero pages."""


class _Slices:
    """What all trackers need: blocks, and which part of them is ours."""

    needs_private_copy = False

    def __init__(self, blocks: Sequence[RamBlock], index: int, count: int) -> None:
        self._slices = [block.slice_of(index, count) for block in blocks]

    def harvest(self, dirty: PageBitmaps, *, is_peek: bool = False) -> Iterator[Piece]:
        """Scan piece by piece, each from its first page to the end of its own slice."""
        for i, (page_count, stripe, index, count) in enumerate(self._slices):
            step = max(PIECE_PAGES, stripe) * count
            for first in range(0, page_count, step):
                end = min(first + step, page_count)
                part = (end, stripe, index, count)
                found = self._scan(i, dirty[i], part, first, is_peek=is_peek)
                yield Piece((end - first) // count, found)

    def _scan(
        self, i: int, dirty: memoryview, piece: _native.Slice, first: int, *, is_peek: bool
    ) -> int:
        """Harvest block `i` from page `first` to the end of the slice `piece`; return the pages
        found written."""
        raise NotImplementedError

    def sent(self, block_index: int, copy: bytes, runs: memoryview, run_count: int) -> None:
        """Nothing to remember: writes are seen, not compared."""

    def sent_zeros(self, block_index: int, runs: memoryview, run_count: int) -> None:
        """Nothing to remember either."""


class StoppedGuest(_Slices):
    """A guest that does not run writes nothing."""

    def harvest(self, dirty: PageBitmaps, *, is_peek: bool = False) -> Iterator[Piece]:
        """Find nothing."""
        yield from ()


class WriteProtected(_Slices):
    """userfaultfd write-protect async: PAGEMAP_SCAN reads and re-arms in one call.

    A page that is written in two pieces is found twice."""

    _look = staticmethod(_native.pagemap_scan)
    _peek = staticmethod(_native.pagemap_peek)

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        index: int,
        count: int,
        pagemap_fds: Sequence[int],
        pieces: Sequence[TrackedPiece],
    ) -> None:
        """:raise MemoryRefused: the pieces are not of these blocks and processes."""
        super().__init__(blocks, index, count)
        check_pieces(pieces, blocks, len(pagemap_fds))
        self._pagemap_fds = pagemap_fds
        self._pieces: list[list[TrackedPiece]] = [[] for _ in blocks]
        for each in pieces:
            self._pieces[each.block].append(each)

    def _scan(
        self, i: int, dirty: memoryview, piece: _native.Slice, first: int, *, is_peek: bool
    ) -> int:
        (end, stripe, index, count), found = piece, 0
        look = self._peek if is_peek else self._look
        for each in self._pieces[i]:
            begin, stop = max(first, each.first_page), min(end, each.end_page)
            if begin < stop:
                part = (stop, stripe, index, count)
                pagemap_fd = self._pagemap_fds[each.process]
                try:
                    found += look(pagemap_fd, each.block_address, dirty, part, begin)
                except PermissionError as exc:  # it was mapped anew, and is not registered
                    raise TrackingLost(each.process, False) from exc
                except ProcessLookupError as exc:
                    raise TrackingLost(each.process, True) from exc
        return found


class SoftDirty(WriteProtected):
    """Soft-dirty bits: control stops the guest, orders the harvest, has the bits cleared."""

    _look = _peek = staticmethod(_native.soft_dirty_scan)


class GuestBitmap(_Slices):
    """A bitmap that the guest writes, each bit after the page."""

    def __init__(
        self, blocks: Sequence[RamBlock], index: int, count: int, bitmap_fds: Sequence[int]
    ) -> None:
        super().__init__(blocks, index, count)
        self._written = [mmap.mmap(fd, 0) for fd in bitmap_fds]

    def _scan(
        self, i: int, dirty: memoryview, piece: _native.Slice, first: int, *, is_peek: bool
    ) -> int:
        return _native.bitmap_move_slice(self._written[i], dirty, piece, first)


class ContentHash(_Slices):
    """Compare each page's seeded 128-bit hash with that of the copy that was sent last.

    `candidates` holds the pages that ever had data; it only grows, so a page that was punched after
    it was sent is looked at again. The hash is of the bytes that were sent, not of the page when it
    was found dirty: content that changes and changes back in between is never mistaken for sent.
    """

    needs_private_copy = True

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        index: int,
        count: int,
        ram: Sequence[mmap.mmap],
        candidates: PageBitmaps,
        hashes: Sequence[memoryview],
        seed: int,
    ) -> None:
        super().__init__(blocks, index, count)
        self._ram, self._candidates, self._hashes, self._seed = ram, candidates, hashes, seed

    def _scan(
        self, i: int, dirty: memoryview, piece: _native.Slice, first: int, *, is_peek: bool
    ) -> int:
        return _native.hash_scan(
            self._ram[i], self._seed, self._hashes[i], self._candidates[i], dirty, piece, first
        )

    def sent(self, block_index: int, copy: bytes, runs: memoryview, run_count: int) -> None:
        _native.hash_pages(copy, self._seed, self._hashes[block_index], runs, run_count)

    def sent_zeros(self, block_index: int, runs: memoryview, run_count: int) -> None:
        table = runs.cast("I")
        piece = memoryview(bytearray(8)).cast("I")
        for first, count in zip(
            table[0 : 2 * run_count : 2], table[1 : 2 * run_count : 2], strict=True
        ):
            for start in range(first, first + count, len(ZEROS) // PAGE_SIZE):
                piece[0] = start
                piece[1] = min(first + count - start, len(ZEROS) // PAGE_SIZE)
                zeros = memoryview(ZEROS)[: piece[1] * PAGE_SIZE]
                _native.hash_pages(zeros, self._seed, self._hashes[block_index], piece, 1)


def hash_table_bytes(blocks: Sequence[RamBlock]) -> int:
    """Size of the shared table: 16 bytes a page, all blocks one after the other."""
    return sum(block.page_count for block in blocks) * HASH_BYTES


def hash_tables(blocks: Sequence[RamBlock], fd: int) -> list[memoryview]:
    """Each block's part of the shared table; the mapping lives as long as the views."""
    whole = memoryview(mmap.mmap(fd, hash_table_bytes(blocks)))
    tables, offset = [], 0
    for block in blocks:
        tables.append(whole[offset : offset + block.page_count * HASH_BYTES])
        offset += block.page_count * HASH_BYTES
    return tables
