"""What a guest's agent does beside its event loop: all that takes long, or may wait for a page."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from engine.guest.judgement import Judgement
from engine.guest.vcpus import Machine

T = TypeVar("T")


class Threads:
    """Work in threads; `wait` must see the end of each before what it works on is closed."""

    def __init__(self) -> None:
        self._running: set[asyncio.Future[Any]] = set()
        self._judging: asyncio.Future[Judgement] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """Do it; if the caller is cancelled, it goes on."""
        return await asyncio.shield(self._begin(work))

    def _begin(self, work: Callable[[], T]) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(None, work)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    async def judge(self, machine: Machine) -> Judgement:
        """One at a time.

        :raise asyncio.CancelledError: it was given up."""
        is_given_up = threading.Event()
        work = self._begin(lambda: machine.judge(is_given_up.is_set))
        self._judging = asyncio.shield(work)
        try:
            return await self._judging
        except asyncio.CancelledError:
            is_given_up.set()
            work.add_done_callback(_close_unwanted)
            raise
        finally:
            self._judging = None

    def give_up_judging(self) -> None:
        """Who judges is cancelled at once, though the thread may wait for a page for ever."""
        if self._judging is not None:
            self._judging.cancel()

    async def wait(self) -> None:
        """Until all have ended."""
        await asyncio.gather(*self._running, return_exceptions=True)


def _close_unwanted(work: asyncio.Future[Judgement]) -> None:
    if work.exception() is None:
        work.result().close()
