"""Two control processes in postcopy whose parts and connections can be struck, and an operator."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

import engine
from engine.control.status import Status
from engine.errors import UsageError
from tests.survival.proxy import LISTEN, TARGET, Proxy, proxy
from tests.survival.rig import is_right, is_running, is_still

PAGES: Final = 16 * 256
GUEST: Final = "workload:size=16M,contents=random"
#: Half of what is missing comes in 4 s.
WRITES: Final = "rate=2M,pattern=random"
#: Postcopy begins at once, so nearly every page is missing.
SETTINGS: Final = (
    "postcopy-ram=on", "multifd-channels=2", "max-bandwidth=8M", "downtime-limit=1",
    "max-postcopy-bandwidth=1M",
)  # fmt: skip
DEADLINE_S: Final = 60.0
#: Of ports, counted from the main channel's: handover, two channels, the fault channel.
MAIN, HANDOVER, CHANNELS, FAULTS = 0, 1, (2, 3), 257
EVERYTHING = (MAIN, HANDOVER, *CHANNELS, FAULTS)
SIDES: Final = ("source", "destination")
PAUSED: Final = Status.POSTCOPY_PAUSED.value
GONE: Final = "gone"


@dataclass
class Duel:
    """Source and destination, the newest lives of both, and what is between them."""

    directory: Path
    between: Proxy
    base: int
    stack: AsyncExitStack
    guest: str
    writes: str  #: what the source's guest does
    lives: dict[str, engine.Control] = field(default_factory=dict)
    guests: dict[str, psutil.Process] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)  #: sides that have ended, and do not begin again
    seen: list[str] = field(default_factory=list)  #: statuses while it was settled
    events: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})

    @property
    def source(self) -> engine.Control:
        return self.lives["source"]

    @property
    def destination(self) -> engine.Control:
        return self.lives["destination"]

    async def start(self, side: str) -> None:
        """Start a side, or start it again where it was killed."""
        rundir = self.directory / side
        rundir.mkdir(mode=0o700, exist_ok=True)
        spec = f"{self.guest},rundir={rundir}" + (f",{self.writes}" if side == "source" else "")
        settings = [*SETTINGS, f"x-multifd-port-base={self.base + 1}"]
        incoming = f"tcp:{TARGET}:{self.base}" if side == "destination" else None
        control = engine.Control.start(
            spec, incoming, settings, state_dir=self.directory / "state" / side
        )
        self.lives[side] = await self.stack.enter_async_context(control)
        self.guests[side] = psutil.Process((await self.lives[side].query_guest())["pid"])
        events = self.stack.enter_context(self.lives[side].listen())
        task = asyncio.create_task(self._hear(side, events))
        self.stack.push_async_callback(_end, task)

    async def _hear(self, side: str, events: AsyncIterator[dict[str, Any]]) -> None:
        async for event in events:
            if event["event"] == "MIGRATION":
                self.events[side].append(event["data"]["status"])

    async def info(self, side: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.lives[side].execute("query-migrate")
        return found

    async def status(self, side: str) -> str:
        """Empty: no migration that this life knows of."""
        return str((await self.info(side)).get("status", ""))

    async def until(self, side: str, *statuses: Status) -> dict[str, Any]:
        wanted = [status.value for status in statuses]
        async with asyncio.timeout(DEADLINE_S):
            while (info := await self.info(side)).get("status") not in wanted:
                await asyncio.sleep(0.01)
        return info

    async def missing(self) -> int:
        """Pages that have not come."""
        info = await self.info("destination")
        return int(info.get("x-postcopy", {}).get("missing-pages", PAGES))

    async def missing_at_most(self, part: float) -> int:
        """Wait until so much of RAM is missing."""
        async with asyncio.timeout(DEADLINE_S):
            while (left := await self.missing()) > part * PAGES:
                await asyncio.sleep(0.002)
        return left

    # -- what is done to them --------------------------------------------------------------------

    async def begin(self) -> None:
        """Migrate, and go to postcopy as soon as it can be."""
        await self.source.execute("migrate", uri=f"tcp:{LISTEN}:{self.base}")
        await self.source.execute("migrate-start-postcopy")

    async def in_postcopy(self) -> None:
        await self.begin()
        for side in SIDES:
            await self.until(side, Status.POSTCOPY_ACTIVE)

    async def workers(self) -> dict[str, int]:
        """Process ids of those at work on both sides, by name."""
        found: dict[str, int] = {}
        for side in SIDES:
            for thread in await self.lives[side].execute("query-migrationthreads"):
                found[thread["name"]] = thread["thread-id"]
        return found

    async def kill_control(self, side: str) -> None:
        self.lives[side].kill()
        await self.lives[side].wait()

    def cut(self, offsets: Sequence[int]) -> int:
        return self.between.cut([self.base + offset for offset in offsets])

    # -- what an operator does -------------------------------------------------------------------

    async def pause_known(self) -> None:
        for side in SIDES:
            await self.until(side, Status.POSTCOPY_PAUSED)

    async def recover(self) -> None:
        """Both sides are paused."""
        await self.destination.recover(f"tcp:{TARGET}:{self.base}")
        await self.source.execute("migrate", uri=f"tcp:{LISTEN}:{self.base}", resume=True)

    async def repair(self) -> None:
        """Restart what was killed, and recover; it goes on as slowly as before."""
        for side in SIDES:
            await self._status_or_restart(side)
        await self.pause_known()
        await self.recover()
        for side in SIDES:
            await self.until(side, Status.POSTCOPY_ACTIVE)

    async def hurry(self) -> None:
        await self.source.execute(
            "migrate-set-parameters", max_postcopy_bandwidth=0, max_bandwidth=0
        )

    async def settle(self) -> str:
        """Restart what was killed, recover what is paused, until all is over; where the guest is
        then."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                here, there = [await self._status_or_restart(side) for side in SIDES]
                self.seen.append(f"{here}/{there}")
                if there == "completed" or (here == "completed" and there in ("", GONE)):
                    return "destination"
                if here == GONE and there in ("", GONE):
                    return "destination"
                if here in ("", "failed") and there in ("", "setup", "failed", GONE):
                    return "source"
                if here == PAUSED and there in ("setup", "failed", GONE):
                    await self.source.execute("cont")  # nobody runs it there
                elif here == there == PAUSED:
                    await self.hurry()
                    with contextlib.suppress(UsageError):  # it has begun to end meanwhile
                        await self.recover()
                    await self._left()
                await asyncio.sleep(0.02)

    async def _left(self) -> None:
        """The source has begun, or has failed again, which its error says."""
        async with asyncio.timeout(DEADLINE_S):
            while (await self.status("source")) == PAUSED == (await self.status("destination")):
                await asyncio.sleep(0.01)

    async def _status_or_restart(self, side: str) -> str:
        if side in self.gone:
            return GONE
        try:
            return await self.status(side)
        except engine.MigrationError:
            if await self.lives[side].wait() == -9:
                return await self._restart(side)
        self.gone.add(side)
        return GONE

    async def _restart(self, side: str) -> str:
        try:
            await self.start(side)
        except UsageError as exc:
            if "at the destination" not in str(exc):
                raise
            self.gone.add(side)
            return GONE
        return await self.status(side)

    @property
    def story(self) -> str:
        """The statuses of both sides while it was settled."""
        return " ".join(name for name, _ in itertools.groupby(self.seen))

    async def check(self, where: str) -> None:
        """One guest, every page right, no write lost."""
        if where == "source":
            assert await is_running(self.source)
            assert await is_right(self.source)
            return
        await self.until_running(self.destination)
        assert await is_right(self.destination)
        if "source" not in self.gone:  # else nothing runs there
            assert await is_still(self.source)
            assert (await engine.verify(self.source, self.destination)).is_right

    @staticmethod
    async def until_running(control: engine.Control) -> None:
        before = (await control.query_guest())["writes"]
        async with asyncio.timeout(DEADLINE_S):
            while (await control.query_guest())["writes"] <= before:
                await asyncio.sleep(0.01)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def duel(directory: Path, guest: str = GUEST, writes: str = WRITES) -> AsyncIterator[Duel]:
    """Both sides, through a proxy; at the end nothing of them is left."""
    (directory / "state").mkdir()
    async with (
        proxy(EVERYTHING) as (between, base),
        AsyncExitStack() as stack,
    ):
        both = Duel(directory, between, base, stack, guest, writes)
        for side in SIDES:
            await both.start(side)
        yield both


def instant_count(default: int) -> int:
    """How many instants of each kind are run; `RAMFERRY_INSTANTS` wants more."""
    return int(os.environ.get("RAMFERRY_INSTANTS", default))


async def measure(fact: Callable[[], Awaitable[bool]], limit_s: float) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    async with asyncio.timeout(limit_s):
        while not await fact():
            await asyncio.sleep(0.005)
    return time.monotonic() - began
