"""A client that waits for a migration: until when, and who wakes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from engine.control.status import Status
from engine.errors import UsageError

#: Statuses in which `migrate` without -d waits. In others it has ended, or waits for a command
#: (`pre-switchover`, `postcopy-paused`), or the guest runs at the destination (`postcopy-active`).
HOLDING: Final = frozenset(
    {
        Status.SETUP,
        Status.ACTIVE,
        Status.CANCELLING,
        Status.DEVICE,
        Status.WAIT_UNPLUG,
        Status.POSTCOPY_RECOVER_SETUP,
        Status.POSTCOPY_RECOVER,
    }
)
LOOK_S: Final = 1.0  #: as QEMU's timer; a look more, where no event tells


class Outgoing(Protocol):
    """What is looked at of a migration away from here."""

    @property
    def status(self) -> Status: ...

    @property
    def ended(self) -> asyncio.Event: ...


class Held:
    """Wakes those who wait at every event and at the migration's end."""

    def __init__(self, newest: Callable[[], Outgoing | None]) -> None:
        """:param newest: the newest outgoing migration, None before there was one."""
        self._newest = newest
        self._news = asyncio.Event()  #: of the next event; each is set once
        self._is_closing = False

    def notify(self, event: str, data: dict[str, Any] | None = None) -> None:
        """An event of QMP was emitted; `process.send_event` calls this too."""
        self._news.set()
        self._news = asyncio.Event()

    def close(self) -> None:
        """Whoever waits goes on. Idempotent."""
        self._is_closing = True
        self._news.set()

    async def migration(self) -> None:
        """Return when the newest outgoing migration needs no more waiting for."""
        while not self._is_closing:
            outgoing = self._newest()
            if outgoing is None or outgoing.status not in HOLDING:
                return
            await self._first_of(self._news.wait(), outgoing.ended.wait())

    async def news(self) -> None:
        """Return at the next event, and after LOOK_S in any case.

        :raise UsageError: there is no waiting any more, the process ends."""
        if self._is_closing:
            raise UsageError("this process ends; nobody waits any more")
        await self._first_of(self._news.wait())

    @staticmethod
    async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
