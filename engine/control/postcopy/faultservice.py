"""The destination's fault service as control sees it: started, restarted, asked for the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from engine import wire
from engine.control.pool import REPORT_WAIT_S, Pool, Worker
from engine.errors import MigrationError, WorkerLost, text_of
from engine.guest.base import Missing
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import RamBlock
from engine.postcopy.statistics import FaultStatistics

log = logging.getLogger("ramferry.destination")

RESTART_PAUSE_S: Final = 0.5  #: before one that follows another at once
DISCARD_BYTES_PER_S_MIN: Final = 200_000_000


class FaultService:
    """Owns the worker, the bitmaps `received` and `stale`, and the statistics.

    Once the guest may run there is a service until `end`: a dead one is replaced at once, and
    `moved(endpoint)` says where the new one listens."""

    def __init__(
        self,
        pool: Pool[wire.FaultsReport],
        session: bytes,
        blocks: Sequence[RamBlock],
        missing: Missing,
        moved: Callable[[str], None],
        *,
        prefetch_pages_max: int,
        is_new: bool = True,
    ) -> None:
        """
        :param prefetch_pages_max: asked for at once in advance; 0: none.
        :param is_new: all pages are here, but for what will be called stale; else those that surely
            were placed. Others that were, too, stay as they are when they come again.
        :raise OSError: no memory or descriptors for what it shares; nothing is left of it."""
        self._pool, self._session, self._blocks = pool, session, tuple(blocks)
        self._missing, self._moved = missing, moved
        self._prefetch_pages_max = prefetch_pages_max
        with contextlib.ExitStack() as made:
            self.received = PageBitmaps.create("received", blocks)
            made.callback(self.received.close)
            self.stale = PageBitmaps.create("stale", blocks)
            made.callback(self.stale.close)
            self.statistics = FaultStatistics.create()
            made.callback(self.statistics.close)
            if is_new:
                self.received.fill()
            else:
                self.received.set_data(surely=True)
            self._shared = made.pop_all()
        self.endpoint = ""
        self._bind = ""
        self._worker: Worker[wire.FaultsReport] | None = None
        self._failure: MigrationError | None = None
        self._employed_ns = 0
        self._has_discarded = self._is_rest_wanted = False
        self.has_all = asyncio.Event()
        self._news = asyncio.Event()
        self._restarting: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the worker, if there is one."""
        return None if self._worker is None else self._worker.pid

    # -- life ------------------------------------------------------------------------------------

    async def start(self, bind: str) -> str:
        """Serve faults, and listen for the page service; return where.

        :raise MigrationError: it cannot be started, or cannot listen there.
        :raise TimeoutError: it does not answer, and is lost."""
        self._bind = bind
        await self._employ()
        return self.endpoint

    async def _employ(self) -> None:
        if self._worker is not None:
            await self._worker.end()
        self._employed_ns = time.monotonic_ns()
        worker = self._worker = self._pool.take(0)
        self.endpoint, self._failure = "", None
        worker.listen(lambda report: self._take(worker, report), self._lose)
        shapes = [wire.BlockShape.of(block) for block in self._blocks]
        fds = [self.received.fd, self.stale.fd, self.statistics.fd]
        fds += [*self._missing.uffds, *(block.fd for block in self._blocks)]
        order = wire.PrepareFaults(
            self._session, self._bind, 1, shapes, list(self._missing.addresses),
            self._missing.vcpus, self._prefetch_pages_max,
        )  # fmt: skip
        worker.order(order, fds)
        await self._listening(worker)
        if self._is_rest_wanted:
            worker.order(wire.FetchRest())

    async def _listening(self, worker: Worker[wire.FaultsReport]) -> None:
        """Wait until it says where it listens. One that does not is replaced, and so is one that is
        waited for no longer: its answer could be taken for the next one."""
        try:
            await self._until(lambda: self.endpoint, REPORT_WAIT_S)
        except TimeoutError:
            worker.give_up("it does not answer")
            raise
        except asyncio.CancelledError:
            worker.give_up("its answer is not waited for any more")
            raise

    async def _restarted(self) -> None:
        if self._restarting is not None:
            await asyncio.wait({self._restarting}, timeout=REPORT_WAIT_S)
            if not self._restarting.done():
                raise self._failure or TimeoutError

    async def listen(self, bind: str) -> str:
        """Listen here instead, for a page service that comes another way; return where.

        :raise MigrationError: it cannot listen there, or cannot be restarted.
        :raise TimeoutError: it does not answer."""
        self._bind = bind
        await self._restarted()
        if self._worker is None or not self._worker.is_alive:
            await self._employ()
        else:
            self.endpoint = ""
            self._worker.order(wire.ListenFaults(bind))
            await self._listening(self._worker)
        return self.endpoint

    async def where(self) -> str:
        """Where it listens, also when it has just been replaced.

        :raise MigrationError: it was lost again, or cannot be restarted.
        :raise TimeoutError: it is not there in time."""
        await self._restarted()
        await self._until(lambda: self.endpoint, REPORT_WAIT_S)
        return self.endpoint

    async def end(self) -> None:
        """Give everything back. Idempotent, and again where it was cancelled."""
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        if self._worker is not None:
            await self._worker.end()
            self._worker = None
        self._shared.close()

    # -- what it says ----------------------------------------------------------------------------

    def _take(self, worker: Worker[wire.FaultsReport], report: wire.FaultsReport) -> None:
        match report:
            case wire.Ready(endpoint):
                self.endpoint = endpoint
            case wire.Discarded():
                self._has_discarded = True
            case wire.AllReceived():
                self.has_all.set()
            case wire.FaultChannelBroken(_, reason) if not self.has_all.is_set():
                log.warning("the fault channel is broken: %s", reason)
            case wire.WorkerFailed(reason):
                worker.give_up(reason)
        self._news.set()

    def _lose(self, lost: WorkerLost) -> None:
        self.endpoint, self._failure = "", lost
        self._news.set()
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        """Until it works: without it the guest stands at its next missing page."""
        while not self.endpoint:
            if time.monotonic_ns() - self._employed_ns < int(RESTART_PAUSE_S * 1e9):
                await asyncio.sleep(RESTART_PAUSE_S)
            try:
                await self._employ()
            except (MigrationError, OSError, TimeoutError) as exc:
                log.error("the fault service cannot be restarted: %s", text_of(exc))
        log.warning("the fault service was restarted")
        self._moved(self.endpoint)

    async def _until(self, is_done: Callable[[], object], wait_s: float) -> None:
        async with asyncio.timeout(wait_s):
            while not is_done():
                if self._failure is not None:
                    raise self._failure
                self._news.clear()
                await self._news.wait()

    # -- what it does ----------------------------------------------------------------------------

    async def discard(self) -> None:
        """Free what is stale. Only before the guest runs.

        :raise MigrationError: it failed, or the service is lost.
        :raise TimeoutError: it takes too long."""
        assert self._worker is not None
        self._has_discarded = False
        self._worker.order(wire.Discard())
        byte_count = sum(block.size for block in self._blocks)
        wait_s = REPORT_WAIT_S + byte_count / DISCARD_BYTES_PER_S_MIN
        await self._until(lambda: self._has_discarded, wait_s)

    def fetch_rest(self) -> None:
        """The background is done: ask for what is missing; `has_all` follows."""
        self._is_rest_wanted = True
        if self._worker is not None and self._worker.is_alive:
            self._worker.order(wire.FetchRest())
