"""What the two services count, each in one shared page that survives their restarts.

The words are those of native/faults.h and native/page_service.h; control owns the pages and reads
them at any time.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from engine.memory.demands import NewestDemand
from engine.memory.words import SharedWords

LATENCIES: Final = 16  #: word of the first bucket
LATENCY_BUCKETS: Final = 24
THREADS: Final = 64  #: word of the first thread's triple
THREADS_MAX: Final = 128


class FaultCount(enum.IntEnum):
    """Words of the destination's page. Totals of the migration, but for OPEN."""

    EVENTS = 0  #: faults read from userfaultfds
    REQUESTS = 1
    DEMAND_PAGES = 2  #: placed because a vCPU waited
    PREFETCH_PAGES = 3
    REST_PAGES = 4
    PRESENT_PAGES = 5  #: came over the fault channel, but were placed by the background before
    ZERO_PAGES = 6  #: received as zero before, had when a vCPU touched them
    SKIPPED_PAGES = 7  #: asked for in advance, but the background had them
    STRAY_EVENTS = 8  #: of no block
    OPEN = 9  #: demands without an answer now
    WAITS = 10
    LATENCY_NS = 11  #: sum over WAITS, from reading the event to the page's being there
    ANY_BLOCKED_NS = 12  #: time in which some thread waited
    ALL_BLOCKED_NS = 13  #: time in which all vCPUs waited


class PageCount(enum.IntEnum):
    """Words of the source's page; the next is `NewestDemand`'s."""

    REQUESTS = 0
    DEMAND_PAGES = 1
    PREFETCH_PAGES = 2
    REST_PAGES = 3
    ZERO_PAGES = 4  #: of those three
    SKIPPED_PAGES = 5
    BYTES_SENT = 6


@dataclass(frozen=True, slots=True)
class ThreadWaits:
    """One thread of the guest; id 0 collects those without one (no UFFD_FEATURE_THREAD_ID)."""

    thread_id: int
    waits: int
    blocked_ns: int


class FaultStatistics(SharedWords):
    """The destination's page."""

    def __getitem__(self, count: FaultCount) -> int:
        return self.words[count]

    @property
    def latency_mean_ns(self) -> int:
        """0 as long as nothing waited."""
        return self.words[FaultCount.LATENCY_NS] // max(1, self.words[FaultCount.WAITS])

    @property
    def latency_distribution(self) -> list[int]:
        """Waits by latency: bucket i is [2**i, 2**(i+1)) us. The first also has what is shorter,
        the last what is longer."""
        return self.words[LATENCIES : LATENCIES + LATENCY_BUCKETS].tolist()

    @property
    def threads(self) -> list[ThreadWaits]:
        """In the order of their first waits; the last of 128 collects those beyond."""
        table = self.words[THREADS : THREADS + 3 * THREADS_MAX].tolist()
        triples = zip(table[0::3], table[1::3], table[2::3], strict=True)
        return [ThreadWaits(tid - 1, waits, ns) for tid, waits, ns in triples if tid]


class PageStatistics(NewestDemand):
    """The source's page."""

    def __getitem__(self, count: PageCount) -> int:
        return self.words[count]
