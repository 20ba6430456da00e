"""kill -9 of an agent with the right to run on its way: afterwards exactly one guest runs."""

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
from engine.control.status import Status
from engine.control.streams.opening import Sources
from engine.control.streams.source import StreamRoute
from engine.control.uri import FileAddress
from engine.guest.base import Handover
from engine.guest.foreignguest import attach_process
from tests.guest.support import run
from tests.support import eventually
from tests.survival.test_switchover import Gate, gate, handing_over
from tests.vmm.machines import Vm, needs_qemu, pair
from tests.vmm.postcopy_rig import until
from tests.vmm.test_end_to_end import LIMIT_MS, agents_of, failure
from tests.vmm.test_process import Stepper, directory, steppers

pytestmark = pytest.mark.process
__all__ = ["directory"]


@dataclass
class Armed:
    """Both control processes; the destination waits for the token."""

    here: engine.Control
    there: engine.Control
    between: Gate
    migration: engine.Migration

    @property
    def agents(self) -> tuple[int, int]:
        return agents_of(self.here.pid)[0], agents_of(self.there.pid)[0]


@contextlib.asynccontextmanager
async def armed(source: str, destination: str, tmp_path: Path) -> AsyncIterator[Armed]:
    """A migration whose source has not heard that the destination is armed."""
    path = tmp_path / "main"
    here = engine.Control.start(source)
    there = engine.Control.start(destination, f"unix:{path}")
    async with here, there, gate(path) as between:
        migration = await here.migrate(f"unix:{path}", max_bandwidth=0, downtime_limit=LIMIT_MS)
        await between.armed.wait()
        yield Armed(here, there, between, migration)


@contextlib.contextmanager
def stopped(agent: int) -> Iterator[None]:
    """It does nothing meanwhile."""
    os.kill(agent, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent, signal.SIGCONT)


async def kill_before_the_token_leaves(source: str, destination: str, tmp_path: Path) -> str:
    async with armed(source, destination, tmp_path) as found:
        agent, _ = found.agents
        with stopped(agent):
            found.between.open()
            await handing_over(found.here)
            os.kill(agent, signal.SIGKILL)
            return await failure(found.migration)


def test_a_process_runs_at_the_source_when_its_agent_is_killed_before_the_token_leaves(
    directory: Path, tmp_path: Path
) -> None:
    with steppers(directory) as (source, destination):
        reason = asyncio.run(kill_before_the_token_leaves(source.spec, destination.spec, tmp_path))

        assert "was killed by SIGKILL" in reason
        assert source.goes_on()
        assert destination.stands()


@pytest.mark.guest
@needs_qemu
def test_a_qemu_runs_at_the_source_when_its_agent_is_killed_before_the_token_leaves(
    tmp_path: Path,
) -> None:
    with pair() as (source, destination):
        asyncio.run(kill_before_the_token_leaves(source.spec, destination.spec, tmp_path))

        assert source.goes_on()
        assert destination.status != "running"


@pytest.mark.guest
@needs_qemu
@pytest.mark.parametrize("end", ["kill", "quit"])
def test_a_qemu_that_hangs_as_it_is_taken_over_runs_without_its_agent(
    tmp_path: Path, end: str
) -> None:
    """QEMU forgets an order when the client hangs up that gave it."""

    async def scenario(source: Vm, destination: Vm) -> None:
        async with armed(source.spec, destination.spec, tmp_path) as found:
            _, agent = found.agents
            with stopped(destination.pid):
                found.between.open()
                await until(found.there, Status.COMPLETED)
                if end == "kill":
                    os.kill(agent, signal.SIGKILL)
                else:
                    await found.there.execute("quit")
                assert await asyncio.to_thread(eventually, lambda: agents_of(found.there.pid) == [])
            assert await asyncio.to_thread(destination.goes_on)

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.status == "postmigrate"


def test_one_process_runs_when_the_sources_agent_is_killed_behind_the_token(
    directory: Path, tmp_path: Path
) -> None:
    """The token has left, and lies before an agent that does not look."""

    async def scenario(source: Stepper, destination: Stepper) -> None:
        async with armed(source.spec, destination.spec, tmp_path) as found:
            agent, other = found.agents
            with stopped(other):
                found.between.open()
                await handing_over(found.here)
                await asyncio.sleep(0.2)  # so that it is sent, mostly; both orders must do
                os.kill(agent, signal.SIGKILL)
            with contextlib.suppress(engine.MigrationError):
                await found.migration.result()
            assert await asyncio.to_thread(
                eventually, lambda: source.stands() != destination.stands()
            )

    with steppers(directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.stands() != destination.stands()


def test_a_process_runs_when_its_agent_is_killed_as_it_is_given_to_a_stream(
    directory: Path,
) -> None:
    """Nobody waits for a word of the destination there: nothing was written."""

    async def scenario(source: Stepper) -> None:
        guest = await attach_process(source.process.pid, str(source.path), incoming=False)
        watching = asyncio.create_task(guest.died())
        try:
            await guest.pause(for_migration=True)
            route = StreamRoute(FileAddress("unwritten"), Sources(), answers=False)
            with stopped(guest.agent_pid):
                giving = asyncio.create_task(route.hand_over(guest, keeps_ram=False))
                await asyncio.sleep(0)  # it is asked
                os.kill(guest.agent_pid, signal.SIGKILL)
                outcome, reason = await giving
            assert outcome is Handover.REFUSED
            assert "was killed by SIGKILL" in reason
            assert await asyncio.to_thread(source.goes_on)
            await watching
        finally:
            await guest.quit()

    with steppers(directory) as (source, _):
        run(scenario(source))
