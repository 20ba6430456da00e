"""The background of postcopy: a rig's dirty pages, pushed by real senders and receivers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

from engine import wire
from engine.control.pool import Worker
from engine.memory.bitmaps import PageBitmaps
from engine.multifd.progress import Budget, Count, Progress
from tests.postcopy.rig import SESSION, Heard, Rig

ROUND: Final = 1


@dataclass
class Background:
    """As many senders as receivers, in one round; owns them and what it lent them."""

    rig: Rig
    dirty: PageBitmaps
    in_flight: PageBitmaps
    placed: PageBitmaps
    compress: wire.Compress
    progress: list[Progress] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget.create)
    workers: list[Worker[Any]] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)

    def _worker(self, role: str, reports: Any) -> tuple[Worker[Any], Heard]:
        worker: Worker[Any] = Worker(role, reports)
        heard = Heard(worker)
        self.workers.append(worker)
        self.heard.append(heard)
        self.progress.append(Progress.create())
        return worker, heard

    async def start_channel(self, index: int, count: int) -> None:
        """A receiver that inserts, a sender that follows the guest, and the round's order."""
        rig, shapes = self.rig, self.rig.shapes()
        receiver, heard = self._worker("receiver", wire.ReceiverReport)
        receiver.order(
            wire.PrepareReceiver(index, SESSION, "tcp://127.0.0.1:*", 1, shapes),
            [self.placed.fd, self.progress[-1].fd, rig.block.fd],
        )
        receiver.order(wire.InsertPages([rig.toucher.address]), [rig.received.fd, rig.toucher.uffd])
        endpoint = (await heard.next(wire.Ready)).endpoint
        sender, _ = self._worker("sender", wire.SenderReport)
        progress = self.progress[-1]
        lent = (self.dirty, self.in_flight, self.placed, self.placed, progress, self.budget)
        sender.order(
            wire.PrepareSender(index, count, SESSION, endpoint, 1, shapes, "none", [], True, 0),
            [*(shared.fd for shared in lent), rig.source.fd],
        )
        sender.order(self.compress)
        sender.order(wire.FollowDemands(), [rig.page_statistics.fd])
        sender.order(wire.SendRound(ROUND))

    async def finished(self) -> None:
        """Every receiver has all that its sender had to send."""
        for heard in self.heard[::2]:
            await heard.next(wire.RoundReceived)

    @property
    def fresh_pages(self) -> int:
        """That nobody else had placed."""
        return sum(progress[Count.FRESH_PAGES] for progress in self.progress[::2])

    async def close(self) -> None:
        """End the workers, whatever they do."""
        for worker in self.workers:
            await worker.end()
        for bitmaps in (self.in_flight, self.placed):
            bitmaps.close()
        for page in (*self.progress, self.budget):
            page.close()


@contextlib.asynccontextmanager
async def pushing(
    rig: Rig, channels: int, dirty: PageBitmaps | None = None, codec: str = "none"
) -> AsyncIterator[Background]:
    """Push what is dirty (the rig's, or `dirty`) over so many channels."""
    in_flight, placed = (PageBitmaps.create(name, [rig.block]) for name in ("in-flight", "placed"))
    background = Background(rig, dirty or rig.dirty, in_flight, placed, wire.Compress(codec))
    try:
        for index in range(channels):
            await background.start_channel(index, channels)
        yield background
    finally:
        await background.close()
