"""A sender's XBZRLE: of pages that the destination has in an older state, only changes are sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine import _native, wire
from engine.compress.codecs import Codec
from engine.compress.delta import DeltaCache, DeltaOutput, DeltaStatistics, memory_bytes
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.payload import Payload, copied_payload, deltas_payload
from engine.multifd.progress import Count, Progress
from engine.worker import log

#: In the first round no page is sent again, so none is kept (QEMU: xbzrle_started). But where there
#: is room for all, what is written meanwhile need not be sent in full once more.
FIRST_ROUND: Final = 2
#: With its length no longer than the page: a packet of deltas is then never longer than one of
#: pages, which is what a receiver's socket takes.
DELTA_BYTES_MAX: Final = PAGE_SIZE - _native.DELTA_LENGTH_BYTES
COUNTS: Final = {
    Count.DELTA_BYTES: "encoded_bytes",
    Count.DELTA_HITS: "hit_pages",
    Count.DELTA_MISSES: "miss_pages",
    Count.DELTA_OVERFLOWS: "overflow_pages",
    Count.DELTA_UNCHANGED: "unchanged_pages",
}


class Deltas:
    """One sender's cache, off until it has a size; what it knows ends with the channel's
    incarnation."""

    def __init__(self, slices: Sequence[_native.Slice], progress: Progress) -> None:
        self._slices, self._progress = slices, progress
        self._cache: DeltaCache | None = None
        self._shown = DeltaStatistics()
        self._is_due = False  #: once it is, it stays so
        self._output = DeltaOutput.allocate()

    def useful_bytes(self, cache_bytes: int) -> int:
        """So much of it as has a use: no more than a power of two that holds all our pages."""
        pages = sum(
            -(-page_count // (stripe * count)) * stripe
            for page_count, stripe, _, count in self._slices
        )
        return min(cache_bytes, PAGE_SIZE << max(0, pages - 1).bit_length())

    @property
    def memory_bytes(self) -> int:
        """What the cache takes at most."""
        return memory_bytes(self._cache.statistics.cache_bytes) if self._cache else 0

    def resize(self, cache_bytes: int) -> None:
        """Keep what fits; 0 turns it off. Without memory for it all goes on as before."""
        try:
            if not cache_bytes:
                self._cache = None
            elif self._cache is None:
                self._cache, self._shown = DeltaCache(self._slices, cache_bytes), DeltaStatistics()
            else:
                self._cache.resize(cache_bytes)
        except OSError as exc:
            log.warning("no XBZRLE cache of %d bytes: %s", cache_bytes, exc.strerror)

    def forget(self) -> None:
        """Nobody knows what the destination has."""
        if self._cache is not None:
            self._cache.forget()

    def are_due(self, round_number: int) -> bool:
        """Whether pages of this round go through the cache: then all of them must, and all later
        ones."""
        if self._cache is None:
            return False
        size = self._cache.statistics.cache_bytes
        holds_all = size >= self.useful_bytes(2 * size)
        self._is_due = self._is_due or holds_all or round_number >= FIRST_ROUND
        return self._is_due

    def payloads(
        self,
        block_index: int,
        round_number: int,
        ram: memoryview,
        runs: memoryview,
        count: int,
        codec: Codec | None,
    ) -> list[Payload]:
        """Of pages that were taken: full ones, and deltas; unchanged ones are in neither."""
        assert self._cache is not None
        output = self._output
        batch = self._cache.deal(
            block_index, round_number, ram, runs, count, output, DELTA_BYTES_MAX
        )
        self._show(self._cache.statistics)
        copy = bytes(memoryview(output.full_pages)[: batch.full_pages * PAGE_SIZE])
        full = copied_payload(copy, memoryview(output.full_runs), batch.full_runs, codec)
        if not batch.delta_pages:
            return [full]
        deltas = bytes(memoryview(output.deltas)[: batch.deltas_bytes])
        table = bytes(memoryview(output.delta_runs)[: batch.delta_runs * wire.RUN.size])
        return [full, deltas_payload(deltas, table, batch.delta_pages, codec)]

    def sent_zeros(self, block_index: int, round_number: int, runs: memoryview, count: int) -> None:
        """The pages of `runs` go as zero pages."""
        if count and self.are_due(round_number) and self._cache is not None:
            self._cache.set_zero(block_index, round_number, runs, count)

    def _show(self, statistics: DeltaStatistics) -> None:
        """Add what is new; the counters also hold what a worker before this one counted."""
        for count, name in COUNTS.items():
            self._progress.add(count, getattr(statistics, name) - getattr(self._shown, name))
        self._shown = statistics
