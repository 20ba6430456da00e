"""What the destination of one sender has, so that a page written again goes as a delta (XBZRLE)."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from typing_extensions import Buffer

from engine import _native
from engine.memory.blocks import PAGE_SIZE

SLOT_BYTES: Final = 16  #: beside each page of the cache


class DeltaOutput(NamedTuple):
    """What a batch is written to, for up to `DELTA_PAGES_MAX` pages."""

    full_pages: Buffer
    full_runs: Buffer
    deltas: Buffer
    delta_runs: Buffer

    @classmethod
    def allocate(cls) -> Self:
        """Room for any batch, aligned to pages; memory that is not used is not taken."""
        pages = _native.DELTA_PAGES_MAX
        delta_bytes_max = _native.DELTA_LENGTH_BYTES + _native.DELTA_BYTES_MAX
        sizes = (pages * PAGE_SIZE, pages * 8, pages * delta_bytes_max, pages * 8)
        return cls(*(memoryview(mmap.mmap(-1, size)) for size in sizes))


@dataclass(frozen=True, slots=True)
class DeltaBatch:
    """Where the pages of a batch went.

    :ivar full_pages: as they are: those that missed the cache and those that overflowed.
    :ivar deltas_bytes: of all deltas, each with its length.
    :ivar unchanged_pages: the destination has them as they are; nothing need be sent.
    """

    full_pages: int
    full_runs: int
    delta_pages: int
    delta_runs: int
    deltas_bytes: int
    unchanged_pages: int
    miss_pages: int
    overflow_pages: int


@dataclass(frozen=True, slots=True)
class DeltaStatistics:
    """Counts since the beginning, as `xbzrle-cache` of query-migrate has them; those of several
    senders may be added.

    :ivar encoded_bytes: of deltas; an overflow counts a page.
    :ivar hit_pages: pages that were in the cache, unchanged ones too.
    """

    cache_bytes: int = 0
    encoded_bytes: int = 0
    hit_pages: int = 0
    miss_pages: int = 0
    overflow_pages: int = 0
    unchanged_pages: int = 0

    def __add__(self, other: DeltaStatistics) -> DeltaStatistics:
        return DeltaStatistics(
            self.cache_bytes + other.cache_bytes,
            self.encoded_bytes + other.encoded_bytes,
            self.hit_pages + other.hit_pages,
            self.miss_pages + other.miss_pages,
            self.overflow_pages + other.overflow_pages,
            self.unchanged_pages + other.unchanged_pages,
        )

    def miss_rate(self, before: DeltaStatistics, pages: int) -> float:
        """Misses since `before` for each of the `pages` that were sent since."""
        return (self.miss_pages - before.miss_pages) / pages if pages else 0.0

    def encoding_rate(self, before: DeltaStatistics) -> float:
        """Bytes of pages that hit since `before` for each byte they were encoded to; 0 when there
        is nothing to compare."""
        encoded = self.encoded_bytes - before.encoded_bytes
        return (self.hit_pages - before.hit_pages) * PAGE_SIZE / encoded if encoded else 0.0


class DeltaCache:
    """The cache of one sender, over its slice of each RAM block.

    All that is sent of these pages must be told of here, in order: `deal` for pages, `set_zero` for
    zero pages, `drop` for pages sent another way. When it is not known what arrived (the channel is
    made anew), `forget`.
    """

    def __init__(self, slices: Sequence[_native.Slice], cache_bytes: int) -> None:
        """`cache_bytes` is rounded down to a power of two of pages, at least one."""
        self._page_count = _pages_of(cache_bytes)
        self._cache = _native.delta_cache_new(slices, self._page_count)
        self._counts = DeltaStatistics(self._page_count * PAGE_SIZE)

    def deal(
        self,
        block_index: int,
        generation: int,
        ram: Buffer,
        runs: Buffer,
        run_count: int,
        output: DeltaOutput,
        delta_bytes_max: int = _native.DELTA_BYTES_MAX,
    ) -> DeltaBatch:
        """Deal the runs' pages to full pages and deltas in `output`; what is kept is what was read.

        :param generation: the round; a page keeps its place in the cache for two.
        :param delta_bytes_max: a longer delta is not worth it: the page goes as it is.
        """
        batch = DeltaBatch(
            *_native.delta_batch(
                self._cache, block_index, generation, ram, runs, run_count, delta_bytes_max, *output
            )
        )
        self._counts += DeltaStatistics(
            0,
            batch.deltas_bytes + batch.overflow_pages * PAGE_SIZE,
            batch.delta_pages + batch.unchanged_pages + batch.overflow_pages,
            batch.miss_pages,
            batch.overflow_pages,
            batch.unchanged_pages,
        )
        return batch

    def set_zero(self, block_index: int, generation: int, runs: Buffer, run_count: int) -> None:
        """The runs' pages are sent as zero pages."""
        _native.delta_cache_set_zero(self._cache, block_index, generation, runs, run_count)

    def forget(self) -> None:
        """Nothing is known of the destination any more; memory is given back."""
        _native.delta_cache_forget(self._cache)

    def resize(self, cache_bytes: int) -> None:
        """Change the size, keeping what fits.

        :raise OSError: no memory; nothing changed.
        """
        page_count = _pages_of(cache_bytes)
        _native.delta_cache_resize(self._cache, page_count)
        grown_bytes = (page_count - self._page_count) * PAGE_SIZE
        self._page_count = page_count
        self._counts += DeltaStatistics(grown_bytes)

    def page(self, block_index: int, page: int) -> bytes | None:
        """What the destination has of a page, as far as the cache knows."""
        return _native.delta_cache_get(self._cache, block_index, page)

    @property
    def statistics(self) -> DeltaStatistics:
        """Counts since the beginning, and the size now."""
        return self._counts


def memory_bytes(cache_bytes: int) -> int:
    """What a cache of that size takes at most; 0 of none."""
    return cache_bytes + cache_bytes // PAGE_SIZE * SLOT_BYTES


def _pages_of(cache_bytes: int) -> int:
    """The largest power of two of pages that `cache_bytes` hold, at least one."""
    pages: int = 1 << max(0, (cache_bytes // PAGE_SIZE).bit_length() - 1)
    return pages
