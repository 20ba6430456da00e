"""A QEMU whose vhost-user back end writes into its RAM all the time is migrated, or refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine
from engine.errors import MigrationError
from engine.guest.foreignguest import attach_qemu
from tests.guest.support import run
from tests.support import WAIT_S, eventually
from tests.vmm.back_end import MEMORY_MIB, BackEnd, back_end, steps, writes
from tests.vmm.machines import Vm, needs_qemu, vm
from tests.vmm.test_end_to_end import LIMIT_MS, Standing, failure, is_let_go

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu]


@dataclass
class Pair:
    """A QEMU whose back end writes, and its twin that waits with one of its own."""

    source: Vm
    destination: Vm
    back_end: BackEnd
    other: BackEnd

    @property
    def ram(self) -> Path:
        return self.source.rams[0]

    @property
    def named(self) -> str:
        """The source with its back end."""
        return f"{self.source.spec},vhost-user={self.back_end.pid}"

    @property
    def named_there(self) -> str:
        return f"{self.destination.spec},vhost-user={self.other.pid}"


@contextlib.contextmanager
def machine(directory: Path, *options: str) -> Iterator[tuple[Vm, BackEnd]]:
    with (
        back_end(directory / "back_end") as found,
        vm(*found.options, *options, mib=MEMORY_MIB) as qemu,
    ):
        yield qemu, found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    for name in ("source", "destination"):
        (tmp_path / name).mkdir()
    with (
        machine(tmp_path / "source") as (source, found),
        machine(tmp_path / "destination", "-incoming", "defer") as (destination, other),
    ):
        assert eventually(lambda: source.rounds() > 2, WAIT_S)
        assert writes(source.rams[0])
        yield Pair(source, destination, found, other)


@contextlib.asynccontextmanager
async def sending(pair: Pair, **settings: object) -> AsyncIterator[Standing]:
    """A migration in its first round, which takes long."""
    here = engine.Control.start(pair.named)
    there = engine.Control.start(pair.named_there, "tcp:127.0.0.1:0")
    async with here, there:
        slow = {"multifd_channels": 2, "max_bandwidth": 2**20, "downtime_limit": LIMIT_MS}
        migration = await here.migrate(there, **{**slow, **settings})
        async for progress in migration.progress(0.01):
            if progress.status is engine.Status.ACTIVE:
                break
        yield Standing(here, there, migration)
        assert await asyncio.to_thread(pair.source.goes_on)


async def go_on(found: Standing) -> None:
    """At full speed."""
    await found.here.execute("migrate-set-parameters", max_bandwidth=0)


def test_what_a_back_end_writes_all_the_time_arrives_byte_by_byte(pair: Pair) -> None:
    async def scenario() -> engine.Statistics:
        here = engine.Control.start(pair.named)
        there = engine.Control.start(pair.named_there, "tcp:127.0.0.1:0")
        async with here, there:
            await there.execute("stop")
            settings = {"multifd_channels": 2, "max_bandwidth": 0, "downtime_limit": LIMIT_MS}
            migration = await here.migrate(there, **settings)
            return await migration.result()

    before = steps(pair.ram)
    result = asyncio.run(scenario())

    assert pair.source.memory() == pair.destination.memory()
    assert steps(pair.ram) > before + 100
    assert f"process {pair.source.pid}, {pair.back_end.pid}" in result.tracker_reason
    assert is_let_go(pair.source)
    pair.destination.monitor.ask("cont")
    assert pair.destination.goes_on()
    assert writes(pair.destination.rams[0])  # its own back end, from where the other one stood


def test_a_back_end_that_nobody_has_named_is_refused(pair: Pair) -> None:
    async def scenario() -> None:
        with pytest.raises(MigrationError, match=r"other processes map .*: vhost-user=PID"):
            await attach_qemu(f"{pair.source.directory}/ramferry.qmp", incoming=False)

    run(scenario())

    assert pair.source.goes_on()
    assert writes(pair.ram)


def test_what_is_no_back_end_is_refused(pair: Pair) -> None:
    async def scenario(pid: int, says: str) -> None:
        with pytest.raises(MigrationError, match=says):
            await attach_qemu(f"{pair.source.directory}/ramferry.qmp", [pid], incoming=False)

    run(scenario(2**22, "there is no vhost-user back end with pid 4194304"))
    run(scenario(pair.source.pid, "is no vhost-user back end, but QEMU"))


def test_a_back_end_that_dies_in_a_round_ends_the_migration(pair: Pair) -> None:
    async def scenario() -> str:
        async with sending(pair) as found:
            pair.back_end.process.kill()
            return await failure(found.migration)

    assert f"vhost-user back end (pid {pair.back_end.pid}) has ended" in asyncio.run(scenario())

    assert is_let_go(pair.source)


def test_a_back_end_that_forks_ends_the_migration(pair: Pair) -> None:
    async def scenario() -> str:
        async with sending(pair) as found:
            os.kill(pair.back_end.pid, signal.SIGUSR1)
            assert await asyncio.to_thread(writes, pair.ram)  # the fork waits for nobody for long
            await go_on(found)
            return await failure(found.migration)

    assert f"process {pair.back_end.pid} has forked meanwhile" in asyncio.run(scenario())

    assert is_let_go(pair.source)


def test_a_back_end_that_maps_the_memory_anew_ends_the_migration(pair: Pair) -> None:
    """At the same place, most likely: what it maps looks as before."""

    async def scenario() -> str:
        async with sending(pair) as found:
            os.kill(pair.back_end.pid, signal.SIGUSR2)
            assert await asyncio.to_thread(writes, pair.ram)
            await go_on(found)
            return await failure(found.migration)

    assert "migrate it once more" in asyncio.run(scenario())

    assert is_let_go(pair.source)
    assert writes(pair.ram)
