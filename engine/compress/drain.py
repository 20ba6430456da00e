"""What a channel drains, by when it takes packets: what has left between two moments at which its
queue was full. Where it was not in between, that is less than it could have drained. So of two such
spans lately the better one counts: that between batches which found it full and left it full, and
the longest.

A channel that is not full does not tell what it could drain: then the drain is believed to grow,
and the next full queue says what it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from engine.compress.policy import Done

MS: Final = 1_000_000
#: The channel is full when so much of the time is waiting for it; polling alone is less.
FULL_SHARE: Final = 0.06
WINDOW_NS: Final = 100 * MS
#: Packets that ZeroMQ has taken and not sent: the queue, and the one that is being sent.
QUEUED_PACKETS: Final = 3
#: While the channel is not full, its drain is believed to be so much more after each step: tenfold
#: in 650 ms...
GROWTH: Final = 1.2
GROWTH_NS: Final = 50 * MS
#: ...but not before so long; after a belief that was wrong twice as long, up to the maximum.
PATIENCE_NS: Final = 200 * MS
PATIENCE_MAX_NS: Final = 1_000 * MS


class Batch(NamedTuple):
    """`left_bytes` left the queue while this one was made; `was_full`: the queue, before it."""

    at_ns: int
    total_ns: int
    waited_ns: int
    left_bytes: int
    was_full: bool

    @property
    def had_to_wait(self) -> bool:
        """For the queue, which is full then, or for the bandwidth limit."""
        return self.waited_ns > FULL_SHARE * self.total_ns

    @property
    def is_exact(self) -> bool:
        """The queue was full before and after it."""
        return self.was_full and self.had_to_wait and self.left_bytes > 0


@dataclass(slots=True)
class Drain:
    """What the channel takes, in bytes per ns; 0 until it was full once."""

    rate: float = 0.0
    is_full: bool = False
    _now_ns: int = 0  #: counts only while the channel is used
    _window: deque[Batch] = field(default_factory=deque)
    _queued: deque[int] = field(default_factory=deque)
    _patience_ns: int = PATIENCE_NS
    _grows_at_ns: int = 0
    _believed: float = 0.0  #: grown to, and not yet seen

    @property
    def is_steady(self) -> bool:
        """The last batch found the channel full, and left it full."""
        return bool(self._window) and self._window[-1].is_exact

    @property
    def is_believed(self) -> bool:
        """The rate has grown, and was not seen."""
        return self._believed > 0

    def learn(self, done: Done) -> None:
        """Take one batch into account: when it was taken, one that was queued before had left."""
        self._now_ns += done.total_ns
        self._queued.append(done.wire_bytes)
        left_bytes = self._queued.popleft() if len(self._queued) > QUEUED_PACKETS else 0
        window = self._window
        was_full = bool(window) and window[-1].had_to_wait
        window.append(Batch(self._now_ns, done.total_ns, done.waited_ns, left_bytes, was_full))
        while len(window) > 2 and window[0].at_ns < self._now_ns - WINDOW_NS:
            window.popleft()
        total_ns = sum(batch.total_ns for batch in window)
        self.is_full = sum(batch.waited_ns for batch in window) > FULL_SHARE * total_ns
        if self.is_full:
            self._measure(done.limit)
        elif self.rate and self._now_ns >= self._grows_at_ns:
            self.rate = self._believed = self.rate * GROWTH
            self._grows_at_ns = self._now_ns + GROWTH_NS

    def _measure(self, limit: float) -> None:
        self._grows_at_ns = self._now_ns + self._patience_ns
        seen = limit or self._rate_seen()
        if not seen:
            return
        if self._believed:
            was_wrong = seen * GROWTH < self._believed
            longer_ns = min(2 * self._patience_ns, PATIENCE_MAX_NS)
            self._patience_ns = longer_ns if was_wrong else PATIENCE_NS
            self._believed = 0.0
        self.rate = seen

    def _rate_seen(self) -> float:
        """In the window; 0 if it has no batch that found the queue full and left it full."""
        window = list(self._window)
        exact = _span(window, lambda batch: batch.is_exact)
        full = _span(window, lambda batch: batch.had_to_wait)
        return max(_rate(exact), _rate(full[1:])) if exact else 0.0


def _span(batches: Sequence[Batch], is_end: Callable[[Batch], bool]) -> Sequence[Batch]:
    """From the first such batch to the last."""
    ends = [i for i, batch in enumerate(batches) if is_end(batch)]
    return batches[ends[0] : ends[-1] + 1] if ends else []


def _rate(batches: Sequence[Batch]) -> float:
    """What left, in bytes per ns."""
    return sum(batch.left_bytes for batch in batches) / max(1, sum(b.total_ns for b in batches))
