"""A live sender that looks at a process's written pages: here at this process's own."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine import _native
from engine.guest.tracker import FEATURES
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import TrackedPiece, whole_piece
from tests.kernel import has_pagemap_scan, has_userfaultfd
from tests.multifd.rig import memory, sender

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not has_pagemap_scan(), reason="PAGEMAP_SCAN needs Linux 6.7"),
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]
PAGES = 1024


@contextmanager
def tracked(block: RamBlock) -> Iterator[tuple[mmap.mmap, int, TrackedPiece]]:
    """The block mapped here, with writes to it tracked: the mapping, its pagemap, its piece."""
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    uffd = _native.uffd_open(_native.UFFD_USER_MODE_ONLY, FEATURES)
    try:
        with block.map() as ram:
            address = _native.mapping_address(ram)
            _native.uffd_register(uffd, address, block.size, _native.UFFD_REGISTER_WP)
            _native.pagemap_scan(pagemap, address, bytearray(PAGES // 8), (PAGES, 512, 0, 1))
            yield ram, pagemap, whole_piece(0, address, block.size)
    finally:
        os.close(uffd)
        os.close(pagemap)


def test_what_a_peek_found_the_next_harvest_finds_again_whether_it_was_sent_or_not() -> None:
    block = memory(PAGES)

    async def scenario() -> list[tuple[int, int]]:
        with tracked(block) as (ram, pagemap, piece):
            async with sender(
                block, tracker="uffd-wp", tracker_fds=(pagemap,), pieces=[piece]
            ) as rig:
                for page in (3, 700):
                    ram[page * PAGE_SIZE] = 1
                found = [await rig.harvest(1, is_peek=True)]
                rig.dirty.clear()  # as if both were on their way
                ram[700 * PAGE_SIZE] = 2
                found.append(await rig.harvest(2))
                rig.dirty.clear()
                found.append(await rig.harvest(3))
                ram[5 * PAGE_SIZE] = 1
                found.append(await rig.harvest(4, is_peek=True))
                return [(each.dirty_pages, each.found_pages) for each in found]

    try:
        assert asyncio.run(scenario()) == [(2, 2), (2, 2), (0, 0), (1, 1)]
    finally:
        os.close(block.fd)
