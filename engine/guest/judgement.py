"""Whether a workload guest's memory is right, on one side and from one side to the other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.errors import GuestError

WRONG: Final = 2**64 - 1  #: in place of the counter of a page that is wrong by itself


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


@dataclass(frozen=True, slots=True)
class Verdict:
    """The check of every page on both sides.

    :ivar wrong_pages: wrong by themselves on either side, or older at the destination.
    :ivar lost_writes: page writes that the vCPUs made and the destination's pages do not show.
    """

    verified_pages: int
    wrong_pages: int
    lost_writes: int

    @property
    def is_right(self) -> bool:
        return self.wrong_pages == 0 and self.lost_writes == 0


def verdict(source: Path, destination: Path, page_writes: int, vcpu_writes: int) -> Verdict:
    """The one rule of what is right after a migration.

    The source was judged when it had stopped for the handover. No page may be wrong by itself on
    either side nor be older at the destination than at the source, and the destination's pages must
    show exactly as many writes as its vCPUs made.

    :param source: its counters, one of 64 bits a page; the same of `destination`.
    :raise GuestError: the two sides have different guests."""
    import numpy as np  # not at the top: the guest's process needs none of it

    before, after = np.fromfile(source, np.uint64), np.fromfile(destination, np.uint64)
    if len(before) != len(after):
        raise GuestError(f"{len(before)} pages at the source, {len(after)} at the destination")
    bad = (before == WRONG) | (after == WRONG) | (after < before)
    return Verdict(len(after), int(np.count_nonzero(bad)), abs(vcpu_writes - page_writes))


def compare(source: Judgement, destination: Judgement) -> Verdict:
    """`verdict` of two judgements of this process.

    :raise GuestError: the two sides have different guests."""
    here, there = (Path(f"/proc/self/fd/{each.counters_fd}") for each in (source, destination))
    return verdict(here, there, destination.page_writes_sum, destination.vcpu_writes_sum)
