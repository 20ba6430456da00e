"""Whether a workload guest's memory is right, on one side and from one side to the other."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Final

WRONG: Final = 2**64 - 1  #: in place of the counter of a page that is wrong by itself
PIECE_PAGES: Final = 8192


@dataclass(frozen=True, slots=True)
class Judgement:
    """Every page of a workload guest, judged while it stood.

    :ivar first_wrong: index of the first page that is wrong by itself, or -1.
    :ivar page_writes_sum: of the write counters of the pages that are right by themselves.
    :ivar vcpu_writes_sum: what the vCPUs say that they wrote; the same if no write was lost.
    :ivar counters_fd: memfd of one 64-bit counter a page; owned, `close` gives it back.
    """

    wrong_pages: int
    first_wrong: int
    page_writes_sum: int
    vcpu_writes_sum: int
    counters_fd: int

    @property
    def is_right(self) -> bool:
        """No page is wrong by itself, and none is older than it should be."""
        return self.wrong_pages == 0 and self.page_writes_sum == self.vcpu_writes_sum

    @property
    def page_count(self) -> int:
        return os.fstat(self.counters_fd).st_size // 8

    def close(self) -> None:
        """Give the counters back; only once."""
        os.close(self.counters_fd)


def compare(source: Judgement, destination: Judgement) -> int:
    """Count the destination's pages that are wrong by themselves or older than at the source.

    The source was judged when it had stopped for the handover. When each page looks right but the
    sums differ, some write was lost nobody knows where: that counts as one.
    """
    if source.page_count != destination.page_count:
        return max(source.page_count, destination.page_count)
    size = 8 * source.page_count
    wrong = 0
    with (
        mmap.mmap(source.counters_fd, size, access=mmap.ACCESS_READ) as before,
        mmap.mmap(destination.counters_fd, size, access=mmap.ACCESS_READ) as after,
    ):
        for offset in range(0, size, 8 * PIECE_PAGES):
            wrong += _compare_piece(
                before[offset : offset + 8 * PIECE_PAGES], after[offset : offset + 8 * PIECE_PAGES]
            )
    sums_differ = destination.page_writes_sum != destination.vcpu_writes_sum
    return max(wrong, int(sums_differ))


def _compare_piece(before: bytes, after: bytes) -> int:
    old, new = memoryview(before).cast("Q"), memoryview(after).cast("Q")
    return sum(b == WRONG or b < a for a, b in zip(old, new, strict=True))
