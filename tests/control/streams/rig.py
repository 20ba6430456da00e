"""Two control processes and one stream between them, of every kind that goes from here to here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import engine
from engine.wire import CHUNK

GUEST = "workload:size=24M,contents=random"
WRITING = f"{GUEST},rate=10M,pattern=random"
SLOW = 6_000_000  #: bytes/s: the first round takes 4 s
WAIT_S = 60.0


@dataclass
class Couple:
    """A source whose guest writes, a destination that was told nothing yet, and how they reach each
    other."""

    source: engine.Control
    destination: engine.Control
    way: str
    directory: Path
    outgoing: str = ""
    incoming: str = ""
    inodes: frozenset[int] = frozenset()  #: of the descriptors that were given to both

    async def connect(self) -> None:
        """Make the way; nothing of it stays open here."""
        if self.way in ("socket", "pipe"):
            await self._give()
        elif self.way == "exec":
            fifo = self.directory / "fifo"
            os.mkfifo(fifo)
            self.outgoing, self.incoming = f"exec:cat >{fifo}", f"exec:cat {fifo}"
        else:
            raise ValueError(self.way)

    async def _give(self) -> None:
        if self.way == "socket":
            here, there = (end.detach() for end in socket.socketpair())
        else:
            there, here = os.pipe()
        try:
            await self.source.give("way", here)
            await self.destination.give("way", there)
            self.inodes = frozenset({os.fstat(here).st_ino, os.fstat(there).st_ino})
        finally:
            os.close(here)
            os.close(there)
        self.outgoing = self.incoming = "fd:way"

    async def listen(self) -> None:
        await self.destination.execute("migrate-incoming", uri=self.incoming, exit_on_error=False)

    async def migrate(self, **parameters: Any) -> engine.Migration:
        """Begin, with the destination listening."""
        await self.connect()
        await self.listen()
        return await self.source.migrate(self.outgoing, **parameters)

    async def until_given_back(self) -> None:
        """No process of either side holds what was given to them; a status is told before."""

        async def is_given_back() -> bool:
            return not any(
                self.inodes & _inodes(process)
                for control in (self.source, self.destination)
                for process in family(control)
            )

        await until(is_given_back)


def family(control: engine.Control) -> list[psutil.Process]:
    """A control process and all that it has started."""
    process = psutil.Process(control.pid)
    return [process, *process.children(recursive=True)]


def parts(control: engine.Control, text: str) -> list[psutil.Process]:
    """Those in whose command line the text is."""
    found = []
    for process in family(control)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if text in " ".join(process.cmdline()):
                found.append(process)
    return found


async def until_gone(text: str, *controls: engine.Control) -> None:
    """None of them has such a process any more."""

    async def are_gone() -> bool:
        return not any(parts(control, text) for control in controls)

    await until(are_gone)


def _inodes(process: psutil.Process) -> set[int]:
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(entry.stat().st_ino)
    return found


@contextlib.asynccontextmanager
async def couple(
    way: str, directory: Path, *settings: str, guest: str = WRITING
) -> AsyncIterator[Couple]:
    source = engine.Control.start(guest, settings=settings)
    destination = engine.Control.start(guest.partition(",rate")[0], "defer")
    async with source, destination:
        yield Couple(source, destination, way, directory)


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await fact():
            await asyncio.sleep(0.01)


async def status_of(control: engine.Control) -> str:
    return str((await control.execute("query-migrate")).get("status", "none"))


async def until_status(control: engine.Control, *wanted: str) -> str:
    status = ""

    async def has_it() -> bool:
        nonlocal status
        status = await status_of(control)
        return status in wanted

    await until(has_it)
    return status


async def until_data(destination: engine.Control) -> None:
    """Pages arrive, while the source goes on."""

    async def has_data() -> bool:
        return bool((await destination.query_guest())["blocks"][0]["allocated"])

    await until(has_data)


async def runs(control: engine.Control) -> None:
    """Its vCPUs write.

    :raise TimeoutError: they do not."""
    before = (await control.query_guest())["writes"]

    async def writes() -> bool:
        return bool((await control.query_guest())["writes"] > before)

    await until(writes)


async def check_nothing_came(destination: engine.Control) -> str:
    """The migration has failed there, nothing runs, its RAM is free; return why."""
    assert await until_status(destination, "failed", "completed") == "failed"
    guest = await destination.query_guest()

    async def is_free() -> bool:
        return not (await destination.query_guest())["blocks"][0]["allocated"]

    await until(is_free)
    assert not guest["running"]
    assert (await destination.execute("query-status"))["status"] == "inmigrate"
    return str((await destination.execute("query-migrate"))["error-desc"])


async def check_arrived(both: Couple) -> None:
    """Every page is right at the destination, where the guest runs, and nowhere else."""
    assert await until_status(both.destination, "completed", "failed") == "completed"
    assert (await both.source.execute("query-status"))["status"] == "postmigrate"
    assert not (await both.source.query_guest())["running"]
    await runs(both.destination)
    assert (await engine.verify(both.source, both.destination)).is_right
    await both.until_given_back()


def chunks_of(stream: bytes) -> list[tuple[int, int, int]]:
    """Of each chunk in a stream: where it begins, where its body begins, where it ends."""
    found, at = [], 0
    while at < len(stream):
        head, body, _ = CHUNK.unpack_from(stream, at)
        found.append((at, at + CHUNK.size + head, at + CHUNK.size + head + body))
        at = found[-1][2]
    return found
