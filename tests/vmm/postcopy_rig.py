"""Two QEMUs, and both control processes of a postcopy between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import engine
from engine.control.status import Status
from tests.kernel import has_userfaultfd
from tests.support import WAIT_S
from tests.vmm.machines import Vm

ON: Final = ("postcopy-ram=on", "multifd-channels=2")
#: No round before it ends, and the background brings a part of the guest in each second.
SLOW: Final = ("max-bandwidth=8M", "downtime-limit=1", "max-postcopy-bandwidth=2M")
PAUSED: Final = Status.POSTCOPY_PAUSED
needs_kernel_faults = pytest.mark.skipif(
    not has_userfaultfd(0), reason="needs root, or vm.unprivileged_userfaultfd=1"
)


async def until(control: engine.Control, *statuses: Status) -> dict[str, Any]:
    """What query-migrate says once it is in one of them."""
    wanted = [status.value for status in statuses]
    async with asyncio.timeout(WAIT_S):
        while True:
            info: dict[str, Any] = await control.execute("query-migrate")
            if info.get("status") in wanted:
                return info
            await asyncio.sleep(0.01)


async def eventually(fact: Callable[[], bool]) -> None:
    """Wait until it is so; it may look into files and at QEMUs."""
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(fact):
            await asyncio.sleep(0.01)


def lacks_pages(machine: Vm) -> bool:
    """Whether a part of its memory is registered for missing pages, so that it waits for them."""
    smaps = Path(f"/proc/{machine.pid}/smaps").read_text()
    return any("um" in line.split() for line in smaps.splitlines() if line.startswith("VmFlags"))


@dataclass
class Couple:
    """Both control processes and their migration."""

    here: engine.Control
    there: engine.Control
    migration: engine.Migration

    async def hurry(self) -> None:
        """No limit holds any more."""
        await self.here.execute("migrate-set-parameters", max_postcopy_bandwidth=0, max_bandwidth=0)

    async def finish(self) -> engine.Statistics:
        """Every page comes."""
        await self.hurry()
        statistics = await self.migration.result()
        info = await until(self.there, Status.COMPLETED)
        assert info["x-postcopy"]["missing-pages"] == 0
        return statistics

    async def paused(self) -> None:
        """Wait until both sides are, for whatever reason."""
        for control in (self.here, self.there):
            await until(control, PAUSED)

    async def recover(self) -> None:
        """Both are paused; no page waits any more for a limit."""
        await self.there.recover()
        await self.migration.resume(self.there)
        for control in (self.here, self.there):
            await until(control, Status.POSTCOPY_ACTIVE, Status.COMPLETED)


def start_source(spec: str, *settings: str, states: Path | None = None) -> engine.Control:
    """:param states: directory for the journals of both sides."""
    state_dir = str(states / "source") if states else ""
    return engine.Control.start(spec, settings=[*ON, *settings], state_dir=state_dir)


def start_destination(spec: str, states: Path | None = None) -> engine.Control:
    state_dir = str(states / "destination") if states else ""
    return engine.Control.start(spec, "tcp:127.0.0.1:0", ON, state_dir=state_dir)


@contextlib.asynccontextmanager
async def couple(
    source: str, destination: str, *settings: str, states: Path | None = None, runs: bool = True
) -> AsyncIterator[Couple]:
    """Started, with a migration that has begun.

    :param runs: the guest runs on its arrival."""
    here = start_source(source, *settings, states=states)
    there = start_destination(destination, states)
    async with here, there:
        if not runs:
            await there.execute("stop")
        yield Couple(here, there, await here.migrate(there))


@contextlib.asynccontextmanager
async def in_postcopy(
    source: str, destination: str, *settings: str, states: Path | None = None, runs: bool = False
) -> AsyncIterator[Couple]:
    """The guest is at the destination, which lacks nearly every page; it stands unless `runs`."""
    settings = (*SLOW, *settings)
    async with couple(source, destination, *settings, states=states, runs=runs) as both:
        await both.migration.start_postcopy()
        for control in (both.here, both.there):
            await until(control, Status.POSTCOPY_ACTIVE)
        yield both
