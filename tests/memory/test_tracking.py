"""Harvests piece by piece: every page once, and how far it is."""

from __future__ import annotations

import mmap
import os
import struct

import pytest

from engine import _native
from engine.memory import tracking
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import whole_piece
from engine.memory.tracking import ContentHash, GuestBitmap, SoftDirty, StoppedGuest

PAGES = 5000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PIECE_PAGES", 1024)


def block() -> RamBlock:
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    return RamBlock("ram", PAGES * PAGE_SIZE, fd)


WRITTEN = [0, 511, 512, 1023, 1024, 2047, 2048, 3333, 4999]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pieces_of_all_lanes_find_every_page_once_and_say_how_far_they_are(count: int) -> None:
    ram, written = block(), os.memfd_create("test-written", os.MFD_CLOEXEC)
    os.ftruncate(written, PAGE_SIZE)
    dirty = PageBitmaps.create("dirty", [ram])
    with mmap.mmap(written, PAGE_SIZE) as bitmap:
        for page in WRITTEN:
            _native.bitmap_set_range(bitmap, page, 1)
    _native.bitmap_set_range(dirty[0], 512, 1)  # written and dirty already: found all the same

    lanes = [list(GuestBitmap([ram], i, count, [written]).harvest(dirty)) for i in range(count)]

    assert dirty.count() == len(WRITTEN)
    assert sum(piece.found for lane in lanes for piece in lane) == len(WRITTEN)
    for lane in lanes:
        assert len(lane) > 1
        assert sum(piece.pages for piece in lane) == pytest.approx(PAGES / count, abs=len(lane))
    dirty.close()
    os.close(ram.fd)
    os.close(written)


def test_soft_dirty_and_content_hash_harvest_in_pieces_too() -> None:
    ram = block()
    dirty, candidates = (PageBitmaps.create(name, [ram]) for name in ("dirty", "candidates"))
    pagemap = os.memfd_create("test-pagemap", os.MFD_CLOEXEC)
    entries = [(1 << 55) if page in WRITTEN else 0 for page in range(PAGES)]
    os.write(pagemap, struct.pack(f"{PAGES}Q", *entries))

    pieces = list(SoftDirty([ram], 0, 1, [pagemap], [whole_piece(0, 0, ram.size)]).harvest(dirty))

    assert [piece.found for piece in pieces] == [4, 2, 1, 1, 1]
    assert dirty.count() == len(WRITTEN)

    dirty.clear()
    _native.bitmap_set_range(candidates[0], 0, PAGES)
    hashes = memoryview(bytearray(PAGES * 16))
    with ram.map() as content:
        hasher = ContentHash([ram], 0, 1, [content], candidates, [hashes], 7)
        runs = memoryview(bytearray(struct.pack("<II", 0, PAGES)))
        hasher.sent_zeros(0, runs, 1)
        for page in WRITTEN:
            content[page * PAGE_SIZE] = 1
        assert [piece.found for piece in hasher.harvest(dirty)] == [4, 2, 1, 1, 1]
    for bitmaps in (dirty, candidates):
        bitmaps.close()
    os.close(pagemap)
    os.close(ram.fd)


def test_a_stopped_guest_has_no_pieces() -> None:
    ram = block()
    dirty = PageBitmaps.create("dirty", [ram])

    assert list(StoppedGuest([ram], 0, 1).harvest(dirty)) == []

    dirty.close()
    os.close(ram.fd)
