"""The source's page service as control sees it: started, connected, made anew when lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from engine import wire
from engine.control.pool import REPORT_WAIT_S, Pool, Worker
from engine.errors import MigrationError, WorkerLost
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import RamBlock
from engine.postcopy.statistics import PageStatistics

log = logging.getLogger("ramferry.source")

#: Tries to make the fault channel anew before the migration is paused, and what is waited between
#: them: 50 ms, then twice as long each time, at most 1 s; a fault service that has moved says so.
TRIES_MAX: Final = 10
FIRST_PAUSE_S: Final = 0.05
PAUSE_MAX_S: Final = 1.0


class PageService:
    """Owns the worker. `fail(reason)` is called once it cannot be made to work again."""

    def __init__(
        self,
        pool: Pool[wire.PagesReport],
        session: bytes,
        blocks: Sequence[RamBlock],
        statistics: PageStatistics,
        fail: Callable[[str], None],
    ) -> None:
        self._pool, self._session, self._blocks = pool, session, tuple(blocks)
        self._statistics, self._fail = statistics, fail
        self._worker: Worker[wire.PagesReport] | None = None
        self._dirty_fd = -1  #: the senders'
        self._endpoint = ""
        self._moves = 0  #: of the fault service, which may come back to the same endpoint
        self.incarnation = 0  #: of the fault channel; each opening has a new one
        self.is_open = False
        self._why_broken = ""
        self._news = asyncio.Event()
        self._mending: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the worker, if there is one."""
        return None if self._worker is None else self._worker.pid

    async def start(self, endpoint: str, dirty: PageBitmaps) -> None:
        """Start the worker, and wait until the fault channel is open.

        :raise MigrationError: it does not start, or cannot reach the fault service."""
        await self.stop()
        self._endpoint, self._dirty_fd = endpoint, dirty.fd
        self._mending = asyncio.get_running_loop().create_task(self._mend())
        while self._mending is not None and not self._mending.done():  # again, where it moves
            await asyncio.wait({self._mending})
        if not self.is_open:
            raise MigrationError(f"the fault channel cannot be opened: {self._why_broken}")

    def move(self, endpoint: str) -> None:
        """The fault service listens here now."""
        self._endpoint, self._moves = endpoint, self._moves + 1
        self.is_open = False
        self._mend_soon()
        self._news.set()

    def _mend_soon(self) -> None:
        if self._mending is None or self._mending.done():
            self._mending = asyncio.get_running_loop().create_task(self._mend_or_fail())

    async def _mend_or_fail(self) -> None:
        await self._mend()
        if not self.is_open:
            self._fail(f"the fault channel cannot be made anew: {self._why_broken}")

    async def _mend(self) -> None:
        """Open the channel, with a new worker if there is none, until it works or TRIES_MAX."""
        pause_s, tried = FIRST_PAUSE_S, -1
        for _ in range(TRIES_MAX):
            if tried == self._moves:
                self._news.clear()
                try:
                    await asyncio.wait_for(self._news.wait(), pause_s)
                except TimeoutError:
                    pause_s = min(2 * pause_s, PAUSE_MAX_S)
            tried = self._moves
            try:
                await self._open()
            except MigrationError as exc:
                self._why_broken = str(exc)
            if self.is_open:
                return

    async def _open(self) -> None:
        """One try, which ends where the fault service moves.

        :raise MigrationError: the worker does not start."""
        self.incarnation += 1
        incarnation, self._why_broken = self.incarnation, ""
        self._news.clear()
        worker = self._worker
        if worker is not None and worker.is_alive:
            worker.order(wire.OpenFaultChannel(self._endpoint, incarnation))
        else:
            worker = await self._employ(incarnation)
        moves = self._moves
        try:
            async with asyncio.timeout(REPORT_WAIT_S):
                while not (self.is_open or self._why_broken or self._moves != moves):
                    await self._news.wait()
                    self._news.clear()
        except TimeoutError:
            worker.give_up("no answer while opening the fault channel")

    async def _employ(self, incarnation: int) -> Worker[wire.PagesReport]:
        if self._worker is not None:
            await self._worker.end()
        worker = self._worker = self._pool.take(0)
        worker.listen(lambda report: self._take(worker, report), self._lose)
        shapes = [wire.BlockShape.of(block) for block in self._blocks]
        fds = [self._dirty_fd, self._statistics.fd, *(block.fd for block in self._blocks)]
        worker.order(wire.PreparePages(self._session, self._endpoint, incarnation, shapes), fds)
        return worker

    def _take(self, worker: Worker[wire.PagesReport], report: wire.PagesReport) -> None:
        match report:
            case wire.FaultChannelOpened(incarnation) if incarnation == self.incarnation:
                self.is_open = True
            case wire.FaultChannelBroken(incarnation, reason) if incarnation == self.incarnation:
                self._break(reason)
            case wire.WorkerFailed(reason):
                worker.give_up(reason)
        self._news.set()

    def _lose(self, lost: WorkerLost) -> None:
        self._break(str(lost))
        self._news.set()

    def _break(self, reason: str) -> None:
        self.is_open, self._why_broken = False, reason or "it is lost"
        self._mend_soon()

    async def stop(self) -> None:
        """End the worker. Idempotent, and again where it was cancelled; `start` may follow."""
        mending, self._mending = self._mending, None
        if mending is not None:
            mending.cancel()
            await asyncio.gather(mending, return_exceptions=True)
        if self._worker is not None:
            await self._worker.end()
            self._worker = None
        self.is_open = False
