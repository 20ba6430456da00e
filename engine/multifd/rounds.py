"""One round of one sender: which pages are next, and what its ROUND_END will say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine import _native, wire
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.demands import NewestDemand
from engine.memory.insertion import unit_pages

SCAN: Final = _native.kernel_names("zero_scan")[0]


class Round:
    """Totals so far, and where to go on.

    A round goes through all blocks once. When it follows demands, it goes on at the newest, and is
    over when it has come from the first page to the last and found nothing."""

    def __init__(
        self, number: int, page_counts: Sequence[int], demands: NewestDemand | None
    ) -> None:
        self.number = number
        self.packets = self.pages = self.zero_pages = self.payload_bytes = 0
        self.is_over = False  #: ROUND_END is next; control may say so at any time
        self._page_counts, self._demands = page_counts, demands
        self._seen: tuple[int, int] | None = None
        self._block_index = self._cursor = 0
        self._is_empty = True  #: nothing was found since the first page

    def next(self) -> tuple[int, int] | None:
        """Block and page from which on to take a batch; None: the round is over."""
        if self._demands is not None and (demand := self._demands.last_demand) != self._seen:
            self._seen = demand
            if demand and demand[0] < len(self._page_counts):
                self._block_index, self._cursor = demand
                self._is_empty = False
        if self._block_index == len(self._page_counts):
            if self._demands is None or self._is_empty:
                self.is_over = True
            self._block_index, self._is_empty = 0, True
        return None if self.is_over else (self._block_index, self._cursor)

    def went_on(self, cursor: int, *, is_empty: bool) -> None:
        """A batch was taken, or nothing found, up to page `cursor`."""
        self._is_empty &= is_empty
        self._cursor = cursor
        if cursor >= self._page_counts[self._block_index]:
            self._block_index, self._cursor = self._block_index + 1, 0

    def sent(self, packet: wire.Packet) -> None:
        """One more packet was queued."""
        self.packets += 1
        self.pages += packet.pages
        self.zero_pages += packet.zero_pages
        self.payload_bytes += packet.payload_bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """One batch, as it is in the run tables."""

    block_index: int
    data_count: int
    zero_count: int
    pages: int
    zero_pages: int


class Batches:
    """Takes dirty pages of one sender's slice; owns the run tables of the newest batch."""

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        views: Sequence[memoryview],
        slices: Sequence[_native.Slice],
        dirty: PageBitmaps,
        in_flight: PageBitmaps,
        *,
        detect_zero: bool,
    ) -> None:
        self._blocks, self._views, self._slices = tuple(blocks), views, slices
        self._dirty, self._in_flight = dirty, in_flight
        self._detect_zero = detect_zero
        self.data_runs = memoryview(bytearray(wire.RUNS_MAX * wire.RUN.size))
        self.zero_runs = memoryview(bytearray(wire.RUNS_MAX * wire.RUN.size))

    def take(self, i: int, cursor: int, pages_max: int) -> tuple[int, Taken]:
        """The next dirty pages of block `i`, and how far it was looked at."""
        return self._take(i, self._slices[i], cursor, pages_max, self._detect_zero)

    def take_whole(self, i: int, cursor: int, pages_max: int) -> tuple[int, Taken]:
        """The same of RAM that stands, in what a running guest's receiver places at once: of huge
        pages the next that has a dirty page, all of it. (Others take single bits of it.)

        :raise MemoryRefused: the block's pages are too large."""
        unit = unit_pages(self._blocks[i])
        if unit == 1:
            return self.take(i, cursor, pages_max)
        cursor, taken = self._take(i, self._slices[i], cursor, 1, False)
        if not taken.pages:
            return cursor, taken
        page, _ = wire.RUN.unpack_from(self.data_runs)
        first = page - page % unit
        self._take(i, (first + unit, *self._slices[i][1:]), first, unit, False)
        is_zero = self._detect_zero and _native.zero_scan(
            SCAN,
            self._views[i][first * PAGE_SIZE : (first + unit) * PAGE_SIZE],
            bytearray(1),
            unit * PAGE_SIZE,
        )
        wire.RUN.pack_into(self.zero_runs if is_zero else self.data_runs, 0, first, unit)
        counts = (0, 1, 0, unit) if is_zero else (1, 0, unit, 0)
        return first + unit, Taken(i, *counts)

    def _take(
        self, i: int, slice_: _native.Slice, cursor: int, pages_max: int, detect_zero: bool
    ) -> tuple[int, Taken]:
        cursor, *counts = _native.take_batch(
            self._views[i], self._dirty[i], self._in_flight[i], slice_, cursor, pages_max,
            detect_zero, self.data_runs, self.zero_runs,
        )  # fmt: skip
        return cursor, Taken(i, *counts)
