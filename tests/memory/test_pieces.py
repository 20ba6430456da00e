"""Blocks in pieces: what is no piece of theirs is refused, and what was seen is the union."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import MemoryRefused
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import PIECES_MAX, TrackedPiece, check_pieces, whole_piece
from engine.memory.tracking import (
    SoftDirty,
    TrackerName,
    Tracking,
    TrackingLost,
    WriteProtected,
)

PAGES = 1100  #: two stripes and a part
SIZE = PAGES * PAGE_SIZE
WHOLE = whole_piece(0, SIZE, SIZE)
BLOCK = RamBlock("ram", SIZE, -1)
SOFT_DIRTY = 1 << 55


def test_what_processes_map_is_accepted_also_twice_and_in_parts() -> None:
    part = TrackedPiece(0, 1, 2 * SIZE, PAGE_SIZE, SIZE - PAGE_SIZE)

    check_pieces([WHOLE, part, part, whole_piece(0, SIZE, SIZE)._replace(process=1)], [BLOCK], 2)


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(TrackedPiece(1, 1, SIZE, SIZE, 0), id="no-such-block"),
        pytest.param(TrackedPiece(-1, 1, SIZE, SIZE, 0), id="block-before-the-first"),
        pytest.param(TrackedPiece(0, 2, SIZE, SIZE, 0), id="no-such-process"),
        pytest.param(TrackedPiece(0, -1, SIZE, SIZE, 0), id="process-before-the-first"),
        pytest.param(TrackedPiece(0, 1, SIZE, SIZE + PAGE_SIZE, 0), id="longer-than-the-block"),
        pytest.param(TrackedPiece(0, 1, SIZE, SIZE, PAGE_SIZE), id="beyond-the-end"),
        pytest.param(TrackedPiece(0, 1, SIZE, PAGE_SIZE, -PAGE_SIZE), id="before-the-beginning"),
        pytest.param(TrackedPiece(0, 1, SIZE, 0, 0), id="empty"),
        pytest.param(TrackedPiece(0, 1, SIZE, -PAGE_SIZE, PAGE_SIZE), id="negative"),
        pytest.param(TrackedPiece(0, 1, SIZE + 1, PAGE_SIZE, 0), id="address-within-a-page"),
        pytest.param(TrackedPiece(0, 1, SIZE, PAGE_SIZE + 1, 0), id="size-within-a-page"),
        pytest.param(TrackedPiece(0, 1, SIZE, PAGE_SIZE, 1), id="offset-within-a-page"),
        pytest.param(TrackedPiece(0, 1, 0, PAGE_SIZE, PAGE_SIZE), id="block-below-address-zero"),
        pytest.param(TrackedPiece(0, 1, 2**63, PAGE_SIZE, 0), id="no-address"),
    ],
)
def test_a_piece_of_nothing_is_refused(piece: TrackedPiece) -> None:
    with pytest.raises(MemoryRefused, match="cannot be tracked as"):
        check_pieces([WHOLE, piece], [BLOCK], 2)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([], id="none"),
        pytest.param([WHOLE._replace(process=1)], id="a-back-end-alone"),
        pytest.param([WHOLE, WHOLE], id="twice"),
        pytest.param([WHOLE._replace(size=SIZE - PAGE_SIZE)], id="all-but-the-last-page"),
        pytest.param(
            [WHOLE._replace(size=PAGE_SIZE), TrackedPiece(0, 0, 2 * SIZE, SIZE - PAGE_SIZE, 4096)],
            id="in-two",
        ),
    ],
)
def test_a_block_that_its_owner_does_not_map_whole_is_refused(pieces: list[TrackedPiece]) -> None:
    with pytest.raises(MemoryRefused, match="not all of memory 'ram' is tracked"):
        check_pieces(pieces, [BLOCK], 2)


def test_more_pieces_than_an_order_holds_are_refused() -> None:
    piece = WHOLE._replace(process=1)
    check_pieces([WHOLE, *[piece] * (PIECES_MAX - 1)], [BLOCK], 2)

    with pytest.raises(MemoryRefused, match=f"{PIECES_MAX} can be"):
        check_pieces([WHOLE, *[piece] * PIECES_MAX], [BLOCK], 2)


def test_whoever_harvests_refuses_them() -> None:
    with pytest.raises(MemoryRefused):
        WriteProtected([BLOCK], 0, 1, [0], [WHOLE._replace(offset=PAGE_SIZE)])


@contextlib.contextmanager
def pagemap(dirty: set[int], first_page: int) -> Iterator[int]:
    """Of a process whose memory from this page on was written like that."""
    fd = os.memfd_create("test-pagemap", os.MFD_CLOEXEC)
    entries = [SOFT_DIRTY if page in dirty else 0 for page in range(PAGES)]
    os.pwrite(fd, struct.pack(f"{PAGES}Q", *entries), first_page * 8)
    try:
        yield fd
    finally:
        os.close(fd)


PAGE_SETS = st.sets(st.integers(0, PAGES - 1), max_size=20)


@given(
    written=PAGE_SETS,
    others=st.lists(
        st.tuples(PAGE_SETS, st.integers(0, PAGES - 1), st.integers(1, PAGES)), max_size=4
    ),
    count=st.integers(1, 3),
)
def test_a_page_is_dirty_if_it_was_written_in_any_piece(
    written: set[int], others: list[tuple[set[int], int, int]], count: int
) -> None:
    """Each process beyond the first maps so many pages from one on, at an address of its own."""
    expected, pieces = set(written), [whole_piece(0, SIZE, SIZE)]
    with contextlib.ExitStack() as undo:
        fds = [undo.enter_context(pagemap(written, PAGES))]
        dirty = PageBitmaps.create("dirty", [BLOCK])
        undo.callback(dirty.close)
        for process, (pages, first, wanted) in enumerate(others, 1):
            length = min(wanted, PAGES - first)
            address = (PAGES + first + process) * PAGE_SIZE
            pieces.append(TrackedPiece(0, process, address, length * PAGE_SIZE, first * PAGE_SIZE))
            fds.append(undo.enter_context(pagemap(pages, PAGES + process)))
            expected |= {page for page in pages if first <= page < first + length}

        for index in range(count):
            list(SoftDirty([BLOCK], index, count, fds, pieces).harvest(dirty))

        found = {page for page in range(PAGES) if dirty[0][page // 8] >> page % 8 & 1}
        assert found == expected


def test_of_a_process_that_is_gone_it_is_told_which_one_it_was() -> None:
    pieces = [whole_piece(0, SIZE, SIZE), whole_piece(0, SIZE, SIZE)._replace(process=1)]
    dirty = PageBitmaps.create("dirty", [BLOCK])
    with (
        pagemap(set(), PAGES) as first,
        open(os.devnull, "rb") as second,
        contextlib.closing(dirty),
    ):
        harvest = SoftDirty([BLOCK], 0, 1, [first, second.fileno()], pieces).harvest(dirty)
        with pytest.raises(TrackingLost) as lost:
            list(harvest)

    assert (lost.value.process, lost.value.is_gone) == (1, True)
    reason = Tracking(TrackerName.UFFD, "a test", processes=("one", "two")).lost(1, is_gone=True)
    assert "two has ended or replaced its program" in str(reason)
