"""Leave out pages whose content is what the destination was sent last, known by hash."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Buffer

from engine import _native
from engine.memory.tracking import HASH_BYTES


@dataclass(frozen=True, slots=True)
class ChangedPages:
    """What is left of a batch: pages copied, the runs they make, and how many were left out."""

    pages: int
    runs: int
    unchanged_pages: int


class SentHashes:
    """Hashes of the pages that one sender sent last, 16 bytes a page, taken as they are used.

    All that is sent must be told of here, in order: `gather` for pages, `forget_pages` for pages
    sent another way and zero pages. When it is not known what arrived (the channel is made anew),
    `forget`.
    """

    def __init__(self, page_counts: Sequence[int]) -> None:
        """:param page_counts: of the RAM blocks, in order."""
        self._seed = int.from_bytes(os.urandom(8))  # nobody can make pages that collide
        self._page_counts = page_counts
        self._hashes = [mmap.mmap(-1, count * HASH_BYTES) for count in page_counts]
        self._known = [mmap.mmap(-1, -(-count // 64) * 8) for count in page_counts]

    def gather(
        self,
        block_index: int,
        ram: Buffer,
        runs: Buffer,
        run_count: int,
        out_pages: Buffer,
        out_runs: Buffer,
    ) -> ChangedPages:
        """Copy the runs' pages that changed to `out_pages`, and their runs to `out_runs`."""
        return ChangedPages(
            *_native.gather_changed(
                ram, self._seed, self._hashes[block_index], self._known[block_index],
                runs, run_count, out_pages, out_runs,
            )
        )  # fmt: skip

    def forget_pages(self, block_index: int, runs: Buffer, run_count: int) -> None:
        """The runs' pages are sent without `gather`."""
        _native.forget_pages(self._known[block_index], runs, run_count)

    def forget(self) -> None:
        """Nothing is known of the destination any more."""
        for known, page_count in zip(self._known, self._page_counts, strict=True):
            _native.bitmap_clear_slice(known, (page_count, 64, 0, 1))
