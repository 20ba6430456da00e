"""A sender's elision: pages that are dirty but as they were sent last are not sent again."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

from engine import wire
from engine.compress.elision import SentHashes
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.multifd.progress import Count, Progress

#: What the first round sends is hashed in the second, when it is sent again.
FIRST_ROUND: Final = 2
#: `auto` looks at one batch of so many, and at all while so much of what it looks at is unchanged.
#: Hashing costs 0.1 to 0.3 us a page, sending one 0.4 (10 Gbit/s) to 2 us (loopback).
SAMPLE_EVERY: Final = 8
PAYS_SHARE: Final = 0.1
LEARNING: Final = 0.2


class Elision:
    """Hashes of what one sender sent; what it knows ends with the channel's incarnation."""

    def __init__(self, blocks: Sequence[RamBlock], progress: Progress) -> None:
        self._counts = [block.page_count for block in blocks]
        self._progress = progress
        self._mode = "off"
        self._hashes: SentHashes | None = None
        self._pages = memoryview(mmap.mmap(-1, wire.PAYLOAD_BYTES_MAX))
        self._runs = memoryview(bytearray(wire.RUNS_MAX * wire.RUN.size))
        self._share = 0.0

    def set(self, mode: str) -> None:
        """:param mode: `off`, `on` or `auto`."""
        if mode == "off":
            self._hashes = None
        elif self._hashes is None:
            self._hashes = SentHashes(self._counts)
        self._mode = mode

    def forget(self) -> None:
        """Nobody knows what the destination has."""
        if self._hashes is not None:
            self._hashes.forget()

    def is_due(self, round_number: int, block_index: int, first_page: int) -> bool:
        """Whether to look at a batch that begins with this page."""
        if self._hashes is None or round_number < FIRST_ROUND:
            return False
        stripe = first_page // wire.BATCH_PAGES_MAX
        is_sample = (stripe + block_index) % SAMPLE_EVERY == 0
        return self._mode == "on" or is_sample or self._share > PAYS_SHARE

    def gather(
        self, block_index: int, ram: memoryview, runs: memoryview, count: int
    ) -> tuple[bytes, memoryview, int]:
        """Copy the pages that changed: the copy, its run table and how many runs that has."""
        assert self._hashes is not None
        left = self._hashes.gather(block_index, ram, runs, count, self._pages, self._runs)
        self._progress.add(Count.ELIDED_PAGES, left.unchanged_pages)
        share = left.unchanged_pages / max(1, left.pages + left.unchanged_pages)
        self._share += LEARNING * (share - self._share)
        return bytes(self._pages[: left.pages * PAGE_SIZE]), self._runs, left.runs

    def sent_otherwise(self, block_index: int, runs: memoryview, count: int) -> None:
        """The pages of `runs` go without a look: as zero pages, lent, or as deltas."""
        if self._hashes is not None and count:
            self._hashes.forget_pages(block_index, runs, count)
