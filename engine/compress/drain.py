"""What a channel drains, by when it takes packets: what has left between two moments at which its
queue was full. Where it was not in between, that is less than it could have drained. So of two such
spans lately the better one counts: that between batches which found it full and left it full, and
the longest.

A channel that is not full does not tell what it could drain: then the drain is believed to grow,
and the next full queue says what it is.
"""

from __future__ import annotations

from collections import deque
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
    """`left_bytes` left the queue while this one was made, `left_so_far` with all before."""

    at_ns: int
    total_ns: int
    waited_ns: int
    left_bytes: int
    left_so_far: int


@dataclass(slots=True)
class Drain:
    """What the channel takes, in bytes per ns; 0 until it was full once."""

    rate: float = 0.0
    is_full: bool = False
    is_steady: bool = False  #: the last batch found the channel full, and left it full
    _now_ns: int = 0  #: counts only while the channel is used
    _window: deque[Batch] = field(default_factory=deque)
    _total_ns: int = 0  #: of the window, and `_waited_ns` of it
    _waited_ns: int = 0
    _full: deque[Batch] = field(default_factory=deque)  #: of the window, those that left it full
    _exact: deque[Batch] = field(default_factory=deque)  #: and of these, those that found it full
    _had_to_wait: bool = False  #: the last batch: for the queue, or for the bandwidth limit
    _left_so_far: int = 0
    _queued: deque[int] = field(default_factory=deque)
    _patience_ns: int = PATIENCE_NS
    _grows_at_ns: int = 0
    _believed: float = 0.0  #: grown to, and not yet seen

    @property
    def is_believed(self) -> bool:
        """The rate has grown, and was not seen."""
        return self._believed > 0

    def learn(self, done: Done) -> None:
        """Take one batch into account: when it was taken, one that was queued before had left."""
        self._now_ns += done.total_ns
        self._queued.append(done.wire_bytes)
        left_bytes = self._queued.popleft() if len(self._queued) > QUEUED_PACKETS else 0
        self._left_so_far += left_bytes
        was_full, self._had_to_wait = self._had_to_wait, _is_long(done.waited_ns, done.total_ns)
        self.is_steady = was_full and self._had_to_wait and left_bytes > 0
        self._take(
            Batch(self._now_ns, done.total_ns, done.waited_ns, left_bytes, self._left_so_far)
        )
        self.is_full = _is_long(self._waited_ns, self._total_ns)
        if self.is_full:
            self._measure(done.limit)
        elif self.rate and self._now_ns >= self._grows_at_ns:
            self.rate = self._believed = self.rate * GROWTH
            self._grows_at_ns = self._now_ns + GROWTH_NS

    def _take(self, batch: Batch) -> None:
        """Into the window, which loses those that are too old."""
        window = self._window
        window.append(batch)
        self._total_ns += batch.total_ns
        self._waited_ns += batch.waited_ns
        if self._had_to_wait:
            self._full.append(batch)
        if self.is_steady:
            self._exact.append(batch)
        while len(window) > 2 and window[0].at_ns < self._now_ns - WINDOW_NS:
            old = window.popleft()
            self._total_ns -= old.total_ns
            self._waited_ns -= old.waited_ns
            for some in (self._full, self._exact):
                if some and some[0] is old:
                    some.popleft()

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
        if not self._exact:
            return 0.0
        first, last = self._exact[0], self._exact[-1]
        left_bytes = last.left_so_far - first.left_so_far + first.left_bytes
        exact = left_bytes / max(1, last.at_ns - first.at_ns + first.total_ns)
        first, last = self._full[0], self._full[-1]
        left_bytes = last.left_so_far - first.left_so_far
        return max(exact, left_bytes / max(1, last.at_ns - first.at_ns))


def _is_long(waited_ns: int, total_ns: int) -> bool:
    return waited_ns > FULL_SHARE * total_ns
