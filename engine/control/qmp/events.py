"""Events that wait for one client: bounded, and the least worth knowing are lost first."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.control.qmp.messages import event_line
from engine.control.status import Status

log = logging.getLogger("ramferry.qmp")

EVENTS_MAX: Final = 1024
#: What a migration passes through; the next event, or the end, says more.
_PASSING: Final = frozenset(
    status.value
    for status in (
        Status.SETUP,
        Status.ACTIVE,
        Status.DEVICE,
        Status.CANCELLING,
        Status.WAIT_UNPLUG,
        Status.POSTCOPY_DEVICE,
        Status.POSTCOPY_RECOVER_SETUP,
        Status.POSTCOPY_RECOVER,
    )
)


@dataclass(frozen=True, slots=True)
class Event:
    """One event, encoded once for all clients.

    :ivar is_passing: a later one makes up for its loss."""

    line: bytes
    is_passing: bool


def make_event(name: str, data: Mapping[str, Any] | None) -> Event:
    """The event that happens now."""
    is_passing = name == "MIGRATION_PASS" or (
        name == "MIGRATION" and data is not None and data.get("status") in _PASSING
    )
    return Event(event_line(name, dict(data) if data is not None else None), is_passing)


class EventQueue:
    """At most EVENTS_MAX events, in order.

    When it is full the oldest passing one is dropped, and one that lasts (STOP, RESUME, the end of
    a migration) only when all that wait are such. The first event after a loss tells in its member
    `x-dropped-events` how many are missing."""

    def __init__(self) -> None:
        self._passing: deque[tuple[int, Event]] = deque()
        self._lasting: deque[tuple[int, Event]] = deque()
        self._next_number = 0
        self._untold = 0  #: dropped since the last event that was taken
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self.dropped_count = 0

    def __len__(self) -> int:
        return len(self._passing) + len(self._lasting)

    def put(self, event: Event) -> None:
        """Never blocks."""
        kind = self._passing if event.is_passing else self._lasting
        kind.append((self._next_number, event))
        self._next_number += 1
        if len(self) > EVENTS_MAX:
            self._drop()
        self._filled.set()
        self._drained.clear()

    async def wait(self) -> None:
        """Wait until there is one to take."""
        while not len(self):
            self._filled.clear()
            await self._filled.wait()

    def take(self) -> bytes:
        """The line of the oldest event; call `done` when it was written."""
        _, event = self._oldest().popleft()
        lost, self._untold = self._untold, 0
        if not lost:
            return event.line
        return event.line.rstrip()[:-1] + b',"x-dropped-events":%d}\r\n' % lost

    def done(self) -> None:
        """What was taken is written."""
        if not len(self):
            self._drained.set()

    async def drained(self) -> None:
        """Wait until nothing waits."""
        await self._drained.wait()

    def _oldest(self) -> deque[tuple[int, Event]]:
        if self._passing and self._lasting:
            return min(self._passing, self._lasting, key=lambda one: one[0][0])
        return self._passing or self._lasting

    def _drop(self) -> None:
        (self._passing or self._lasting).popleft()
        self._untold += 1
        self.dropped_count += 1
        if self.dropped_count == 1:
            log.warning("a monitor's client does not read its events; the oldest are dropped")
