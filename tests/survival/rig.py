"""Two real control processes whose parts can be killed, and the question who runs afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import engine
from engine.control.status import Status

SIZE = "48M"
GUEST = f"workload:size={SIZE},contents=random"
#: Several times as fast as BANDWIDTH, so that every round takes long and leaves most of RAM dirty:
#: a migration that must not end never finds nothing to send while the guest gets no CPU.
WRITES = "rate=200M,pattern=random"
WRITING = f"{GUEST},{WRITES}"
BANDWIDTH = 60_000_000  #: the first round takes about 0.8 s
DOWNTIME_MAX_MS = 30_000  #: long enough for all of RAM, on any machine
DEADLINE_S = 60.0
STILL_S = 1.0  #: a guest that writes nothing for so long stands


@dataclass
class Pair:
    """A source whose guest writes and a destination that waits; `parts` are what can be killed."""

    source: engine.Control
    destination: engine.Control
    directory: Path
    uri: str = ""  #: how the source reaches the destination; empty: where that listens

    def side(self, name: str) -> engine.Control:
        return self.source if name == "source" else self.destination

    def parts(self, control: engine.Control, module: str) -> list[psutil.Process]:
        """Child processes that run a module, like `engine.multifd.sender`."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(control.pid).children()
            return [child for child in children if module in " ".join(_command(child))]
        return []

    async def orphan(self, name: str) -> str | None:
        """The socket of an orphaned guest of a side; None if its process has ended instead."""
        guests = self.guests[name]
        async with asyncio.timeout(DEADLINE_S):
            while True:
                found = list((self.directory / name).glob("guest-*.sock"))
                if found:
                    return str(found[0])
                if not any(_is_alive(guest) for guest in guests):
                    return None
                await asyncio.sleep(0.01)

    def __post_init__(self) -> None:
        self.guests = {
            name: self.parts(self.side(name), "engine.guest.agent")
            for name in ("source", "destination")
        }


def _command(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
    return command


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextlib.asynccontextmanager
async def pair(
    directory: Path,
    uri: str = "tcp:127.0.0.1:0",
    guest: str = GUEST,
    settings: Sequence[str] = (),
    writes: str = WRITES,
) -> AsyncIterator[Pair]:
    """Start both sides; at the end every process that they ever started must be gone.

    :param settings: of both sides.
    :param writes: what the source's guest does."""
    rundirs = [f"rundir={_private(directory, name)}" for name in ("source", "destination")]
    source = engine.Control.start(f"{guest},{writes},{rundirs[0]}", settings=settings)
    destination = engine.Control.start(f"{guest},{rundirs[1]}", uri, settings)
    try:
        async with source, destination:
            both = Pair(source, destination, directory)
            family = [psutil.Process(control.pid) for control in (source, destination)]
            family += [child for parent in family for child in parent.children(recursive=True)]
            yield both
    finally:
        _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
        for process in alive:
            process.kill()
        assert alive == []


def _private(directory: Path, name: str) -> Path:
    path = directory / name
    path.mkdir(mode=0o700)
    return path


async def is_running(control: engine.Control, wait_s: float = DEADLINE_S) -> bool:
    """Whether the guest's own write counter grows within this time."""
    before = (await control.query_guest())["writes"]
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        if (await control.query_guest())["writes"] > before:
            return True
        await asyncio.sleep(0.02)
    return False


async def is_still(control: engine.Control) -> bool:
    """Whether the guest writes nothing."""
    return not await is_running(control, STILL_S)


async def is_right(control: engine.Control) -> bool:
    """Every page right by itself, and no write lost."""
    judged = await control.judge()
    counters = np.fromfile(judged["counters-path"], dtype=np.uint64)
    page_writes = int(counters.sum())
    sums = (judged["page-writes"], judged["vcpu-writes"])
    return bool(judged["wrong-pages"] == 0 and sums == (page_writes, page_writes))


def kill(process: psutil.Process) -> None:
    """kill -9; a process that has ended by itself is as dead."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


async def begin(both: Pair, **parameters: Any) -> engine.Migration:
    """Migrate, but not to the end: a limit of 0 waits for a guest that writes nothing."""
    return await both.source.migrate(
        both.uri or both.destination, max_bandwidth=BANDWIDTH, downtime_limit=0, **parameters
    )


async def let_end(source: engine.Control) -> None:
    """Let a migration that `begin` began switch over, if there is still somebody to be told."""
    with contextlib.suppress(engine.MigrationError):
        await source.execute("migrate-set-parameters", downtime_limit=DOWNTIME_MAX_MS)


async def reached(migration: engine.Migration, part: float) -> None:
    """Wait until this part of RAM was sent in the first round, or all ended; 0 is now."""
    if not part:
        return
    async for now in migration.progress(0.005):
        if now.rounds > 1 or (
            now.total_bytes and now.remaining_bytes <= (1 - part) * now.total_bytes
        ):
            return


async def healed(migration: engine.Migration) -> engine.Statistics:
    """Wait until a channel was made anew; the migration must not have ended."""
    async for now in migration.progress(0.005):
        if now.raw.get("x-heals"):
            return now
    raise AssertionError("the migration ended without healing anything")


async def switching(migration: engine.Migration) -> None:
    """Wait for the switchover of a migration that may end."""
    async for now in migration.progress(0.002):
        if now.status is Status.DEVICE:
            return


async def ended(control: engine.Control) -> engine.Statistics:
    """Wait until this source's migration has ended, however."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            statistics = engine.Statistics.of(await control.execute("query-migrate"))
            if statistics.status.value in ("completed", "failed", "cancelled"):
                return statistics
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def adopted(socket: str) -> AsyncIterator[engine.Control]:
    """A new control process for an orphaned guest; the guest ends with it."""
    async with engine.Control.start(f"workload:socket={socket}") as control:
        yield control


async def gave_up(destination: engine.Control) -> bool:
    """Wait until it has ended with its failed migration (True), or know that it still waits for a
    source, since none ever said who it is (False)."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                status = (await destination.execute("query-migrate"))["status"]
            except engine.MigrationError:
                return await destination.wait() == 1
            if status == "setup":
                return False
            await asyncio.sleep(0.02)
