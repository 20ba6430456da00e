"""Commands that have begun; they outlive the sessions that asked for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

log = logging.getLogger("ramferry.qmp")

COMMANDS_WAIT_S: Final = 5.0  #: a command that has begun may go on for so long when all is closed


class Works:
    """Tasks of all sessions."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[bytes]] = set()

    def begin(self, work: Coroutine[Any, Any, bytes]) -> asyncio.Task[bytes]:
        """Start it. Await it through `asyncio.shield`, or it ends with whoever waits."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Let all come to their end, for COMMANDS_WAIT_S at most, and cancel what is left."""
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=COMMANDS_WAIT_S)
            for task in late:
                log.warning("a command did not end within %.0f s and is given up", COMMANDS_WAIT_S)
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def when_all_ended(tasks: set[asyncio.Task[bytes]], act: Callable[[], None]) -> None:
    """Call `act` once, at once if none is left."""
    left = {task for task in tasks if not task.done()}
    if not left:
        act()
        return

    def forget(task: asyncio.Task[bytes]) -> None:
        left.discard(task)
        if not left:
            act()

    for task in tuple(left):
        task.add_done_callback(forget)
