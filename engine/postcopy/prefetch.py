"""Which pages a guest will want next, by the faults that it had.

Pages that were fetched in time do not fault, so what is seen of a sweep is one fault at the end of
each window. A *stream* therefore remembers where its next fault is expected: a fault there doubles
its window. New streams need three faults at one distance. Without a stream, faults that lie close
together fetch a few neighbours; faults that do not, fetch nothing, for random access gains nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

WINDOW_PAGES_MIN: Final = 8
STREAMS_MAX: Final = 8
HISTORY: Final = 16  #: faults that are remembered
STRIDE_PAGES_MAX: Final = 32
#: From one fault of a stream to the next: native/faults.c tells of no fault that is further away.
REACH_PAGES_MAX: Final = 256
NEAR_PAGES: Final = 32  #: faults so close together make a cluster, if no stream comes of them
CLUSTER_FAULTS: Final = 3
AROUND_PAGES: Final = 8  #: fetched for one, aligned


@dataclass(frozen=True, slots=True)
class Span:
    """Pages of one block to ask for; may reach over its end or be received already."""

    block: int
    first_page: int
    pages: int


@dataclass(slots=True)
class Stream:
    """Faults of one block at one distance.

    :ivar asked: pages from here on (in its direction) were not asked for yet.
    """

    block: int
    stride: int
    asked: int
    window: int = WINDOW_PAGES_MIN


@dataclass(slots=True)
class Prefetcher:
    """Takes faults, says what to ask for. Keeps no time and asks nobody.

    :ivar pages_max: of one decision; 0: none at all.
    """

    pages_max: int
    _streams: list[Stream] = field(default_factory=list)
    _history: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def faulted(self, block: int, page: int) -> list[Span]:
        """A vCPU waits for `page`, which was asked for; what else?"""
        if self.pages_max == 0:
            return []
        stream = self._find(block, page) or self._detect(block, page)
        near = sum(b == block and 0 < abs(page - p) <= NEAR_PAGES for b, p in self._history)
        self._history.append((block, page))
        if stream is not None:
            return self._follow(stream, page)
        if near >= CLUSTER_FAULTS - 1:
            first = page - page % AROUND_PAGES
            return [Span(block, first, min(AROUND_PAGES, self.pages_max))]
        return []

    def _find(self, block: int, page: int) -> Stream | None:
        """The stream that expected this fault: within what it asked for, or one stride on."""
        for stream in self._streams:
            ahead = (stream.asked - page) * (1 if stream.stride > 0 else -1)
            reach = stream.window * abs(stream.stride)
            if stream.block == block and -2 * abs(stream.stride) <= ahead <= reach:
                self._streams.remove(stream)
                self._streams.append(stream)  # the first one is the oldest
                reach_max = REACH_PAGES_MAX // abs(stream.stride) - 1
                stream.window = min(2 * stream.window, self.pages_max, reach_max)
                return stream
        return None

    def _detect(self, block: int, page: int) -> Stream | None:
        pages = {p for b, p in self._history if b == block}
        for before in reversed(self._history):
            stride = page - before[1]
            if before[0] != block or not 0 < abs(stride) <= STRIDE_PAGES_MAX:
                continue
            if before[1] - stride in pages:
                window = min(WINDOW_PAGES_MIN, self.pages_max, REACH_PAGES_MAX // abs(stride) - 1)
                stream = Stream(block, stride, page + stride, window)
                self._streams = [*self._streams[-(STREAMS_MAX - 1) :], stream]
                return stream
        return None

    def _follow(self, stream: Stream, page: int) -> list[Span]:
        """The next window behind the fault, and behind what was asked for already."""
        step = stream.stride
        start = page + step
        if (stream.asked - start) * (1 if step > 0 else -1) > 0:
            start = stream.asked
        pages = [start + i * step for i in range(stream.window)]
        stream.asked = pages[-1] + step
        pages = [p for p in pages if p >= 0]
        if not pages:
            return []
        if abs(step) == 1:
            return [Span(stream.block, min(pages), len(pages))]
        return [Span(stream.block, p, 1) for p in pages]
