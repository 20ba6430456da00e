"""A real, unmodified QEMU goes to another one while its guest sweeps its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine
from tests.support import eventually
from tests.vmm.back_end import BackEnd
from tests.vmm.machines import SETTINGS, Vm, needs_qemu, pair, vm
from tests.vmm.postcopy_rig import until

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu]

LIMIT_MS = 60_000  #: however slow the machine is, the rounds end


async def migrate(
    source: Vm, destination: Vm, *capabilities: str, stands: bool = False, **parameters: object
) -> engine.Statistics:
    """One whole migration, over two channels. `stands`: the destination's user does not want it to
    run on its arrival."""
    here = engine.Control.start(source.spec, settings=capabilities)
    there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
    async with here, there:
        if stands:
            await there.execute("stop")
        settings = {"multifd_channels": 2, "max_bandwidth": 0, "downtime_limit": LIMIT_MS}
        migration = await here.migrate(there, **{**settings, **parameters})
        return await migration.result()


@dataclass
class Standing:
    """Both control processes, and a migration that waits for `migrate-continue`."""

    here: engine.Control
    there: engine.Control
    migration: engine.Migration


def is_tracked(machine: Vm | BackEnd) -> bool:
    """Whether any of its memory is registered with a userfaultfd, or the process is traced."""
    flags = re.findall(r"^VmFlags:(.*)$", Path(f"/proc/{machine.pid}/smaps").read_text(), re.M)
    assert flags
    status = Path(f"/proc/{machine.pid}/status").read_text()
    return any("uw" in each.split() for each in flags) or "TracerPid:\t0" not in status


def is_let_go(machine: Vm | BackEnd) -> bool:
    """Nothing tracks it any more, soon."""
    return eventually(lambda: not is_tracked(machine))


def stand_as(source: Vm, destination: Vm, status: str) -> bool:
    """The guest has left the one and is so in the other, soon: QEMU is told, and not waited for."""
    return eventually(lambda: (source.status, destination.status) == ("postmigrate", status))


@contextlib.asynccontextmanager
async def standing(source: Vm, destination: Vm) -> AsyncIterator[Standing]:
    """A migration whose guest stands for the switchover."""
    here = engine.Control.start(source.spec, settings=["pause-before-switchover=on"])
    there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
    async with here, there:
        migration = await here.migrate(there, max_bandwidth=0, downtime_limit=LIMIT_MS)
        await until(here, engine.Status.PRE_SWITCHOVER)
        assert source.status == "paused"
        yield Standing(here, there, migration)


async def failure(migration: engine.Migration) -> str:
    """Why it failed; the guest is at the source."""
    with pytest.raises(engine.MigrationFailed) as failed:
        await migration.result()
    return str(failed.value)


def agents_of(control: int) -> list[int]:
    """The agents of QEMUs that a control process has started."""
    found = []
    for child in Path(f"/proc/{control}/task/{control}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            found += [int(child)] if b"engine.guest.foreign_agent" in command else []
    return found


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_running_guest_arrives_byte_by_byte(blocks: int) -> None:
    """It does not run on its arrival, so that every byte can be compared."""
    with pair(mib=128, blocks=blocks) as (source, destination):
        result = asyncio.run(migrate(source, destination, stands=True))

        assert source.memory() == destination.memory()
        assert stand_as(source, destination, "paused")
        assert result.tracker == "uffd-wp"
        assert result.rounds >= 2
        assert is_let_go(source)
        before = source.rounds()
        destination.monitor.ask("cont")
        assert destination.goes_on()
        assert 0 <= destination.said()[0][1] - before <= 2  # a line may be halved


def test_a_running_guest_goes_on_and_finds_no_page_wrong() -> None:
    with pair() as (source, destination):
        result = asyncio.run(migrate(source, destination))

        assert stand_as(source, destination, "running")
        before = source.rounds()
        assert destination.goes_on()
        assert 0 <= destination.said()[0][1] - before <= 2  # a line may be halved
        assert result.downtime_ms is not None


def test_a_stopped_guest_stays_stopped() -> None:
    with pair() as (source, destination):
        source.monitor.ask("stop")

        asyncio.run(migrate(source, destination))

        assert source.memory() == destination.memory()
        assert stand_as(source, destination, "paused")
        destination.monitor.ask("cont")
        assert destination.goes_on()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_what_is_compressed_arrives_right(codec: str) -> None:
    with pair() as (source, destination):
        asyncio.run(migrate(source, destination, stands=True, multifd_compression=codec))

        assert source.memory() == destination.memory()


def test_the_settings_of_its_operator_are_as_before() -> None:
    with pair() as (source, destination):
        wanted, before = [{"capability": "events", "state": True}], []
        for each in (source, destination):
            each.monitor.ask("migrate-set-capabilities", capabilities=wanted)
            before += [each.monitor.ask(f"query-migrate-{what}") for what in SETTINGS]

        asyncio.run(migrate(source, destination))

        after = []
        for each in (source, destination):
            after += [each.monitor.ask(f"query-migrate-{what}") for what in SETTINGS]
        assert after == before


def test_a_guest_goes_there_and_another_one_back() -> None:
    """What a migration leaves in the source QEMU is no burden for the next one."""
    with pair() as (first, second), vm("-incoming", "defer") as third:
        for source, destination in ((first, second), (second, third)):
            asyncio.run(migrate(source, destination))
            assert destination.goes_on()


def test_after_a_failure_before_the_handover_the_source_runs_untracked() -> None:
    """The destination's QEMU dies when the guest has been stopped for it."""

    async def scenario(source: Vm, destination: Vm) -> str:
        async with standing(source, destination) as found:
            assert is_tracked(source)
            destination.process.kill()
            reason = await failure(found.migration)
            assert await asyncio.to_thread(source.goes_on)
            return reason

    with pair() as (source, destination):
        assert f"qemu (pid {destination.pid})" in asyncio.run(scenario(source, destination))

        assert source.status == "running"
        assert is_let_go(source)


@pytest.mark.parametrize("victim", ["control", "agent"])
def test_a_source_runs_untracked_when_one_of_ramferrys_processes_is_killed(victim: str) -> None:
    """The guest stands for the switchover at that moment."""

    async def scenario(source: Vm, destination: Vm) -> None:
        async with standing(source, destination) as found:
            pid = found.here.pid
            os.kill(pid if victim == "control" else agents_of(pid)[0], signal.SIGKILL)
            assert await asyncio.to_thread(source.goes_on)
            assert await asyncio.to_thread(is_let_go, source)
            assert destination.status == "inmigrate"

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.goes_on()


def test_a_guest_that_its_operator_continues_behind_the_last_round_is_not_handed_over() -> None:
    async def scenario(source: Vm, destination: Vm) -> str:
        async with standing(source, destination) as found:
            source.monitor.ask("cont")
            await found.here.execute("migrate-continue", state="pre-switchover")
            return await failure(found.migration)

    with pair() as (source, destination):
        assert "the guest runs" in asyncio.run(scenario(source, destination))

        assert source.goes_on()
        assert is_let_go(source)
        assert destination.status == "inmigrate"


@pytest.mark.parametrize("victim", ["control", "agent"])
def test_a_source_runs_when_one_of_the_destinations_processes_is_killed(victim: str) -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with standing(source, destination) as found:
            pid = found.there.pid
            os.kill(pid if victim == "control" else agents_of(pid)[0], signal.SIGKILL)
            await failure(found.migration)
            assert await asyncio.to_thread(source.goes_on)
            assert destination.status == "inmigrate"

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.goes_on()
        assert is_let_go(source)


def test_a_source_qemu_that_ends_is_told_as_what_it_is() -> None:
    async def scenario(source: Vm, destination: Vm) -> str:
        async with standing(source, destination) as found:
            source.process.kill()
            reason = await failure(found.migration)
            assert destination.status == "inmigrate"
            return reason

    with pair() as (source, destination):
        assert f"qemu (pid {source.pid})" in asyncio.run(scenario(source, destination))


def test_a_source_qemu_that_hangs_ends_the_migration_and_runs_when_it_is_back() -> None:
    async def scenario(source: Vm, destination: Vm) -> str:
        async with standing(source, destination) as found:
            os.kill(source.pid, signal.SIGSTOP)
            await found.here.execute("migrate-continue", state="pre-switchover")
            reason = await failure(found.migration)
            os.kill(source.pid, signal.SIGCONT)
            assert await asyncio.to_thread(source.goes_on)
            assert destination.status == "inmigrate"
            return reason

    with pair() as (source, destination):
        assert "in 10 s" in asyncio.run(scenario(source, destination))

        assert is_let_go(source)


def test_the_destinations_qemu_runs_on_when_all_of_ramferry_is_killed_after_the_handover() -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        here = engine.Control.start(source.spec)
        there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
        async with here, there:
            migration = await here.migrate(there, max_bandwidth=0, downtime_limit=LIMIT_MS)
            await migration.result()
            for each in (here, there):
                for agent in agents_of(each.pid):
                    os.kill(agent, signal.SIGKILL)
                os.kill(each.pid, signal.SIGKILL)

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.goes_on()
        assert stand_as(source, destination, "running")
