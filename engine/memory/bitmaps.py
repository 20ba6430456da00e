"""Shared page bitmaps: one bit a page, one descriptor for all blocks of a guest.

Control makes them, workers attach to them by descriptor; single bits are set, cleared and counted
only through `engine._native`, whose word operations are atomic between processes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Final

from engine import _native
from engine.memory.blocks import PAGE_SIZE, RamBlock

ALIGNMENT: Final = 4096  #: each block's words begin on a page of their own


def _bitmap_bytes(block: RamBlock) -> int:
    return -(-block.page_count // (8 * ALIGNMENT)) * ALIGNMENT


def shared_memory(name: str, size: int) -> int:
    """A sealed-size memfd; the caller closes it."""
    fd = os.memfd_create(f"ramferry-{name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


class PageBitmaps:
    """A bitmap for each block, mapped here; owns its mapping, and the descriptor if it `create`d
    it.
    """

    def __init__(self, blocks: Sequence[RamBlock], fd: int) -> None:
        self.blocks = tuple(blocks)
        self.fd = fd
        self._mapping = mmap.mmap(fd, sum(_bitmap_bytes(block) for block in blocks))
        whole = memoryview(self._mapping)
        self._views: list[memoryview] = []
        offset = 0
        for block in blocks:
            self._views.append(whole[offset : offset + _bitmap_bytes(block)])
            offset += _bitmap_bytes(block)
        whole.release()

    @classmethod
    def create(cls, name: str, blocks: Sequence[RamBlock]) -> PageBitmaps:
        """All bits clear."""
        fd = shared_memory(name, sum(_bitmap_bytes(block) for block in blocks))
        try:
            return cls(blocks, fd)
        except (OSError, ValueError):
            os.close(fd)
            raise

    def __getitem__(self, block_index: int) -> memoryview:
        return self._views[block_index]

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._views)

    def count(self, worker_index: int = 0, worker_count: int = 1) -> int:
        """Set bits of a slice of every block."""
        return sum(
            _native.bitmap_count(view, block.slice_of(worker_index, worker_count))
            for view, block in zip(self._views, self.blocks, strict=True)
        )

    def clear(self, worker_index: int = 0, worker_count: int = 1) -> int:
        """Clear a slice of every block; return how many bits were set."""
        return sum(
            _native.bitmap_clear_slice(view, block.slice_of(worker_index, worker_count))
            for view, block in zip(self._views, self.blocks, strict=True)
        )

    def move_to(self, target: PageBitmaps, worker_index: int = 0, worker_count: int = 1) -> int:
        """Move a slice's bits into `target`; return how many were moved."""
        return sum(
            _native.bitmap_move_slice(view, other, block.slice_of(worker_index, worker_count))
            for view, other, block in zip(self._views, target._views, self.blocks, strict=True)
        )

    def fill(self) -> None:
        """Set the bit of every page."""
        for view, block in zip(self._views, self.blocks, strict=True):
            _native.bitmap_set_range(view, 0, block.page_count)

    def set_data(self, *, surely: bool = False) -> int:
        """Set the bit of every page that is not a hole, and of all in a file that has memory for
        all; return the bits newly set.

        :param surely: only of those that were written: neither of huge pages, for which hugetlbfs
            calls a hole data, nor of what `fallocate` has only reserved.
        :raise OSError: a block's file cannot be looked at; bits before it are set."""
        return sum(
            _set_data(view, block, surely=surely)
            for view, block in zip(self._views, self.blocks, strict=True)
        )

    def unmap(self) -> None:
        """Give the mapping back, the descriptor stays open; idempotent."""
        for view in self._views:
            view.release()
        self._views = []
        self._mapping.close()

    def close(self) -> None:
        """Give back mapping and descriptor; idempotent."""
        self.unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _set_data(view: memoryview, block: RamBlock, *, surely: bool) -> int:
    """The kernel takes 10 ms to look through a GiB of pages, and nothing to say how many it has."""
    if surely and block.backing_page_size > PAGE_SIZE:
        return 0
    if not surely and block.is_full():
        return _native.bitmap_set_range(view, 0, block.page_count)
    return _native.bitmap_set_data(block.fd, 0, block.size, view)
