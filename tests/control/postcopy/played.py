"""Workers of the two services that a test plays, and the RAM that they are lent."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from engine import wire
from engine.errors import WorkerLost
from engine.memory.bitmaps import shared_memory
from engine.memory.blocks import RamBlock

SIZE = 1 << 20

Answers = Callable[[wire.Message], wire.Message | None]


class PlayedWorker:
    """Answers each order a turn of the loop later; the newest `answers` count."""

    pid = 1

    def __init__(self, answers: Answers) -> None:
        self.answers, self.is_alive = answers, True
        self.orders: list[Any] = []

    def listen(
        self, on_report: Callable[[Any], None], on_lost: Callable[[WorkerLost], None]
    ) -> None:
        self.report, self._on_lost = on_report, on_lost

    def order(self, message: wire.Message, fds: Any = ()) -> None:
        self.orders.append(message)
        answer = self.answers(message)
        if answer is not None:
            asyncio.get_running_loop().call_soon(self._say, answer)

    def _say(self, report: wire.Message) -> None:
        if self.is_alive:
            self.report(report)

    def give_up(self, reason: str) -> None:
        """As a death that is noticed."""
        if self.is_alive:
            self.is_alive = False
            self._on_lost(WorkerLost("played", 0, reason))

    async def end(self) -> None:
        self.is_alive = False
        await asyncio.sleep(0)


class PlayedPool:
    """Hands these out in turn, and then none."""

    def __init__(self, *workers: PlayedWorker) -> None:
        self.workers = list(workers)
        self.tries = 0

    def take(self, _: int) -> PlayedWorker:
        self.tries += 1
        if not self.workers:
            raise WorkerLost("played", 0, "cannot be started")
        return self.workers.pop(0)


def silent(_: wire.Message) -> None:
    """A worker that hangs."""


@contextlib.contextmanager
def ram() -> Iterator[RamBlock]:
    block = RamBlock("ram", SIZE, shared_memory("test", SIZE))
    try:
        yield block
    finally:
        os.close(block.fd)
