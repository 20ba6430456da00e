"""What a migration has done so far, in numbers; sampled every 100 ms from the workers' counters."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any, Final

from engine.compress.delta import DeltaStatistics

SAMPLE_S: Final = 0.1
#: The dirty rate is taken over at least so long, as QEMU does it.
DIRTY_RATE_PERIOD_NS: Final = 1_000_000_000


@dataclass(slots=True)
class DowntimePhases:
    """Where the pause went, in ns; their sum is the downtime."""

    pause: int = 0  #: from the order to stop until every vCPU stood
    harvest: int = 0  #: collecting the last dirty bits
    wait: int = 0  #: in `pre-switchover`, until `migrate-continue`
    discard: int = 0  #: in postcopy: until the destination had freed what was written last
    send: int = 0  #: until the last byte was handed to the channels
    acknowledge: int = 0  #: until every page was placed and the destination was armed
    resume: int = 0  #: until the guest ran at the destination

    @property
    def total(self) -> int:
        return sum(getattr(self, phase.name) for phase in fields(self))


@dataclass(slots=True)
class ChannelSample:
    """One channel at the last sample."""

    wire_bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    rate_bytes_per_s: float = 0.0
    incarnation: int = 1
    is_open: bool = True  #: this incarnation; False while it is made anew
    sampled_bytes: int = 0  #: `wire_bytes` when the rate was taken


@dataclass(slots=True)
class Carried:
    """What workers that were given back had counted."""

    pages: int = 0
    zero_pages: int = 0
    wire_bytes: int = 0
    main_bytes: int = 0
    payload_bytes: int = 0


@dataclass(slots=True)
class PostcopyNumbers:
    """From the moment on at which the destination's guest runs without all its pages."""

    began_ns: int = 0  #: 0: it has not begun
    multifd_bytes: int = 0  #: sent before that
    multifd_pages: int = 0
    requests: int = 0
    fault_bytes: int = 0  #: over the fault channel
    demand_pages: int = 0
    prefetch_pages: int = 0
    rest_pages: int = 0  #: asked for when the background was done

    def begin(self, now_ns: int, numbers: MigrationNumbers) -> None:
        """Once, whatever pauses follow."""
        if not self.began_ns:
            self.began_ns, self.multifd_bytes = now_ns, numbers.wire_bytes
            self.multifd_pages = numbers.pages + numbers.zero_pages


@dataclass(slots=True)
class XbzrleNumbers:
    """`xbzrle-cache`: counts up to now, and rates between the last two syncs of a second."""

    now: DeltaStatistics = field(default_factory=DeltaStatistics)
    cache_miss_rate: float = 0.0
    encoding_rate: float = 0.0
    _before: DeltaStatistics = field(default_factory=DeltaStatistics)
    _pages_before: int = 0

    def take_rates(self, pages: int) -> None:
        """:param pages: sent so far, of every kind."""
        self.cache_miss_rate = self.now.miss_rate(self._before, pages - self._pages_before)
        self.encoding_rate = self.now.encoding_rate(self._before)
        self._before, self._pages_before = self.now, pages


@dataclass(slots=True)
class MigrationNumbers:
    """Everything that `query-migrate` shows of a source; times are monotonic ns, sizes bytes."""

    started_ns: int = field(default_factory=time.monotonic_ns)
    setup_done_ns: int = 0
    ended_ns: int = 0
    total_bytes: int = 0
    remaining_bytes: int = 0
    wire_bytes: int = 0  #: on multifd channels
    main_bytes: int = 0  #: on the main channel
    payload_bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    rounds: int = 0  #: bitmap syncs, as MIGRATION_PASS counts them
    dirty_pages_per_s: int = 0
    rate_bytes_per_s: float = 0.0
    pages_per_s: int = 0
    expected_downtime_ns: int = 0
    downtime_ns: int | None = None
    phases: DowntimePhases = field(default_factory=DowntimePhases)
    undone_pauses: int = 0
    longest_undone_pause_ns: int = 0
    throttle_percent: int = 0
    throttle_way: str = ""  #: how; stays when it has been taken back
    limit_throttle_us: int = 0  #: how long a vCPU sleeps in a second, by the dirty limit
    channels: list[ChannelSample] = field(default_factory=list)
    compression: dict[str, Any] = field(default_factory=dict)  #: as `query-migrate` shows it
    without_effect: list[str] = field(default_factory=list)  #: of what is switched on
    xbzrle: XbzrleNumbers = field(default_factory=XbzrleNumbers)
    xbzrle_cache_bytes: int = 0  #: 0: without XBZRLE
    tracker: str = ""
    tracker_reason: str = ""
    placement: str = ""
    heals: int = 0
    carried: Carried = field(default_factory=Carried)
    postcopy: PostcopyNumbers = field(default_factory=PostcopyNumbers)
    _sampled_ns: int = 0
    _sampled_pages: int = 0
    _dirty_since_ns: int = 0
    _dirty_pages: int = 0

    def carry(self) -> None:
        """The workers are given back; those that come count from 0."""
        self.carried = Carried(
            self.pages, self.zero_pages, self.wire_bytes, self.main_bytes, self.payload_bytes
        )
        self.channels, self.rate_bytes_per_s, self.pages_per_s = [], 0.0, 0

    def pause_undone(self, stood_ns: int) -> None:
        """The guest was stopped, too much was left to send, and it runs again."""
        self.undone_pauses += 1
        self.longest_undone_pause_ns = max(self.longest_undone_pause_ns, stood_ns)

    def dirtied(self, pages: int) -> None:
        """`pages` became dirty since the last sync."""
        now_ns = time.monotonic_ns()
        self._dirty_since_ns = self._dirty_since_ns or self.setup_done_ns or now_ns
        self._dirty_pages += pages
        period_ns = now_ns - self._dirty_since_ns
        if period_ns >= DIRTY_RATE_PERIOD_NS or not self.dirty_pages_per_s:
            self.dirty_pages_per_s = self._dirty_pages * 1_000_000_000 // max(1, period_ns)
            self._dirty_since_ns, self._dirty_pages = now_ns, 0
            self.xbzrle.take_rates(self.pages + self.zero_pages + self.xbzrle.now.hit_pages)

    def take_rates(self) -> None:
        """Rates since the last time this was called, from the totals."""
        now_ns = time.monotonic_ns()
        elapsed_s = max(1e-6, (now_ns - (self._sampled_ns or self.started_ns)) / 1e9)
        self._sampled_ns = now_ns
        for sample in self.channels:
            sample.rate_bytes_per_s = (sample.wire_bytes - sample.sampled_bytes) / elapsed_s
            sample.sampled_bytes = sample.wire_bytes
        self.rate_bytes_per_s = sum(sample.rate_bytes_per_s for sample in self.channels)
        pages = self.pages + self.zero_pages + self.xbzrle.now.hit_pages
        self.pages_per_s = int((pages - self._sampled_pages) / elapsed_s)
        self._sampled_pages = pages

    @property
    def total_ns(self) -> int:
        return (self.ended_ns or time.monotonic_ns()) - self.started_ns

    @property
    def setup_ns(self) -> int:
        return max(0, self.setup_done_ns - self.started_ns)
