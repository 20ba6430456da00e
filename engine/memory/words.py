"""One page of 64-bit words that processes share: counters, without messages."""

from __future__ import annotations

import mmap
import os
from typing import Self

from engine.memory.bitmaps import shared_memory
from engine.memory.blocks import PAGE_SIZE


class SharedWords:
    """A mapping of the page; whoever `create`s it owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.mapping = mmap.mmap(fd, PAGE_SIZE)
        self.words = memoryview(self.mapping).cast("Q")

    @classmethod
    def create(cls) -> Self:
        """All words zero."""
        fd = shared_memory(cls.__name__.lower(), PAGE_SIZE)
        try:
            return cls(fd)
        except (OSError, ValueError):
            os.close(fd)
            raise

    def unmap(self) -> None:
        """Give the mapping back, the descriptor stays open; idempotent."""
        self.words.release()
        self.mapping.close()

    def close(self) -> None:
        """Give back mapping and descriptor; idempotent."""
        self.unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
