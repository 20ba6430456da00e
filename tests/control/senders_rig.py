"""A group of senders whose workers a test plays."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from engine import wire
from engine.control.agreement import Agreement
from engine.control.lane import Lane
from engine.control.pool import Pool
from engine.control.senders import SenderGroup
from engine.errors import WorkerLost
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import whole_piece
from engine.memory.tracking import TrackerName, Tracking

PAGES = 64


@dataclass
class PlayedWorker:
    """A worker process that does what the test says."""

    orders: list[wire.Message] = field(default_factory=list)
    is_alive: bool = True
    on_report: Callable[[Any], None] = lambda _report: None
    on_lost: Callable[[WorkerLost], None] = lambda _lost: None

    def listen(
        self, on_report: Callable[[Any], None], on_lost: Callable[[WorkerLost], None]
    ) -> None:
        self.on_report, self.on_lost = on_report, on_lost

    def order(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        if not self.is_alive:
            raise WorkerLost("sender", 0, "it is not running")
        self.orders.append(message)

    async def end(self) -> None:
        self.is_alive = False

    def die(self) -> None:
        self.is_alive = False
        self.on_lost(WorkerLost("sender", 0, "killed"))

    def kinds(self) -> list[str]:
        return [type(order).__name__ for order in self.orders]


@dataclass
class Played:
    """A group of one lane over 64 pages with data, all delivered, and its workers."""

    group: SenderGroup
    workers: list[PlayedWorker]
    heals: list[asyncio.Task[None]]

    @property
    def worker(self) -> PlayedWorker:
        return self.workers[-1]

    @property
    def lane(self) -> Lane:
        return self.group.lanes[0]

    def finish_round(self, number: int, pages: int) -> None:
        """Both ends have counted the same."""
        self.group.dirty.move_to(self.group.in_flight)
        counts = (number, 1, pages, 0, pages * PAGE_SIZE)
        self.worker.on_report(wire.RoundSent(self.lane.incarnation, *counts))
        self.group.received(wire.RoundReceived(0, self.lane.incarnation, *counts))

    async def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start something of the group, up to where it waits."""
        task = asyncio.ensure_future(work)
        await settle()
        return task

    async def break_channel(self) -> None:
        """The destination gives the channel up; the heal is under way when this returns."""
        self.group.broken(wire.ChannelBroken(0, self.lane.incarnation, "gap"))
        await settle()


async def settle() -> None:
    """Let everything run that can run."""
    for _ in range(20):
        await asyncio.sleep(0)


def ram_block(name: str = "ram", pages: int = PAGES) -> RamBlock:
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, pages * PAGE_SIZE)
    os.pwrite(fd, b"x" * pages * PAGE_SIZE, 0)
    return RamBlock(name, pages * PAGE_SIZE, fd)


@asynccontextmanager
async def played(*, may_postcopy: bool = False) -> AsyncIterator[Played]:
    block = ram_block()
    workers: list[PlayedWorker] = []
    heals: list[asyncio.Task[None]] = []

    def take(_index: int) -> PlayedWorker:
        workers.append(PlayedWorker())
        return workers[-1]

    async def reopen(_index: int, _incarnation: int) -> str:
        return "tcp://127.0.0.1:1"

    def on_lost(index: int, _reason: str) -> None:
        heals.append(asyncio.ensure_future(group.heal(index, reopen)))

    pool = cast(Pool[wire.SenderReport], SimpleNamespace(take=take))
    agreement = Agreement(["tcp://127.0.0.1:1"], ())
    group = SenderGroup([block], pool, b"s" * 16, agreement, on_lost, may_postcopy=may_postcopy)
    rig = Played(group, workers, heals)
    piece = whole_piece(0, PAGE_SIZE, block.size)
    tracking = Tracking(TrackerName.UFFD, "a test", (block.fd,), (piece,))
    try:
        start = await rig.run(group.start(tracking, detect_zero=True))
        rig.worker.on_report(wire.Opened(1))
        await start
        sent = await rig.run(group.send_round(1))
        rig.finish_round(1, PAGES)
        await sent
        yield rig
    finally:
        for heal in heals:
            heal.cancel()
        await asyncio.gather(*heals, return_exceptions=True)
        await group.end()
        os.close(block.fd)
