"""Placing pages behind a running guest: each page whole, once, and its waiters woken.

What a receiver uses in postcopy where it uses `Placer` before; the fault service does the same in
native code. Why this and nothing else: docs/decisions/0005-postcopy-placement.md.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from typing_extensions import Buffer

from engine import _native
from engine.errors import GuestError, MemoryRefused, WireError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock


def unit_pages(block: RamBlock) -> int:
    """How many pages are placed, discarded and asked for together.

    :raise MemoryRefused: larger than what can be placed."""
    unit = block.backing_page_size // PAGE_SIZE
    if unit not in (1, _native.HUGE_UNIT_PAGES):
        raise MemoryRefused(
            f"RAM block '{block.name}' has pages of {block.backing_page_size} bytes; postcopy "
            f"places those of {PAGE_SIZE} and {_native.HUGE_UNIT_PAGES * PAGE_SIZE}"
        )
    return unit


class Inserter:
    """Inserts pages into all blocks of a guest, in a `Placer`'s place; borrows the guest's
    userfaultfds and the bitmap."""

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        uffds: Sequence[int],
        addresses: Sequence[int],
        received: PageBitmaps,
    ) -> None:
        """:raise MemoryRefused: a block whose pages are too large."""
        self._received = received
        self._blocks = tuple(blocks)
        self._targets = [
            (uffd, address, unit_pages(block))
            for block, uffd, address in zip(blocks, uffds, addresses, strict=True)
        ]

    def check(
        self,
        index: int,
        data_runs: bytes,
        planes: int,
        encoded: int,
        gathered: int,
        zero_runs: bytes,
    ) -> None:
        """Check all runs of a packet before any of its pages is placed.

        :raise WireError: a run is not within the block, out of order, cuts a huge page, or has a
            page that another has; nothing was done."""
        block = self._blocks[index]
        try:
            _native.packet_runs_check(
                data_runs, planes, encoded, gathered, zero_runs, block.page_count,
                unit_pages(block),
            )  # fmt: skip
        except ValueError as exc:
            raise WireError(f"pages for RAM block '{block.name}': {exc}") from exc

    def place(self, index: int, payload: Buffer, runs: Buffer, run_count: int) -> int:
        """Place the runs' pages where nothing is yet; return how many those were.

        :raise WireError: a run lies outside the block or cuts a huge page; nothing was placed.
        :raise MemoryRefused: the memory behind the block is full.
        :raise GuestError: the guest is gone."""
        block = self._blocks[index]
        try:
            fresh, _ = _native.insert(
                *self._targets[index], self._received[index], payload, runs, run_count,
                block.page_count,
            )  # fmt: skip
        except ValueError as exc:
            raise WireError(f"pages for RAM block '{block.name}': {exc}") from exc
        except OSError as exc:
            raise placing_failed(exc) from exc
        return fresh

    def apply_deltas(self, index: int, deltas: Buffer, runs: Buffer, run_count: int) -> None:
        """:raise WireError: always: the guest may have changed the pages since."""
        raise WireError(f"deltas for RAM block '{self._blocks[index].name}', whose guest may run")

    def clear(self, index: int, runs: Buffer, run_count: int) -> int:
        """The runs' pages are zero; return how many of them were not received yet.

        :raise WireError: a run lies outside the block or cuts a huge page; nothing was done.
        :raise GuestError: the guest is gone."""
        block = self._blocks[index]
        try:
            return _native.insert_zero(
                *self._targets[index], self._received[index], runs, run_count, block.page_count
            )
        except ValueError as exc:
            raise WireError(f"zero pages for RAM block '{block.name}': {exc}") from exc
        except OSError as exc:
            raise placing_failed(exc) from exc

    def close(self) -> None:
        """Nothing is owned."""


def placing_failed(exc: OSError) -> MemoryRefused | GuestError:
    """What an error of UFFDIO_COPY means."""
    if exc.errno in (errno.ESRCH, errno.ENOENT):
        return GuestError("the guest is gone, or has unmapped its RAM")
    return MemoryRefused(f"cannot place pages behind the guest: {exc.strerror}")


def discard(blocks: Sequence[RamBlock], received: PageBitmaps, stale: PageBitmaps) -> int:
    """Free what is stale, whole huge pages, before the guest runs; return the pages.

    Those are not received any more, nor stale. Killed at any instant, or failed, it can be done
    again: what is still to be done is stale.

    :raise MemoryRefused: the memory cannot be punched, or its pages are too large."""
    freed = 0
    for index, block in enumerate(blocks):
        try:
            freed += _native.discard_stale(
                block.fd, received[index], stale[index], block.page_count, unit_pages(block)
            )
        except OSError as exc:
            reason = exc.strerror
            if exc.errno == errno.EBUSY:
                reason = "somebody holds a part of their transparent huge page"
            raise MemoryRefused(
                f"cannot discard pages of RAM block '{block.name}': {reason}"
            ) from exc
    return freed


def widen(blocks: Sequence[RamBlock], dirty: PageBitmaps) -> int:
    """The source's half of discarding huge pages whole; return the pages that became dirty."""
    units = [(index, block.page_count, unit_pages(block)) for index, block in enumerate(blocks)]
    return sum(  # small pages have no neighbours to take with them: 3 ms for 4 GiB in a pause
        _native.bitmap_widen(dirty[index], page_count, unit)
        for index, page_count, unit in units
        if unit > 1
    )
