"""VMMs that hand their memory over, the reference clients, are migrated while they write to it."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine
from engine.control.status import Status
from tests.support import eventually as soon
from tests.vmm.handoff import CLIENTS, Client, agent_of, c_client, client, clients, command
from tests.vmm.postcopy_rig import couple, eventually, in_postcopy, needs_kernel_faults, until

pytestmark = [pytest.mark.process]
__all__ = ["c_client", "command"]

LIMIT_MS = 60_000  #: however slow the machine is, the rounds end


@pytest.fixture
def directory() -> Iterator[Path]:
    """For sockets, with a short name."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def c_command(c_client: str) -> list[str]:
    return [c_client]


def test_the_c_client_is_short_enough_to_be_read() -> None:
    assert len((CLIENTS / "client.c").read_text().splitlines()) < 200


async def migrate(
    source: Client, destination: Client, *, stands: bool = False
) -> engine.Statistics:
    here = engine.Control.start(source.spec)
    there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
    async with here, there:
        if stands:
            await there.execute("stop")
        migration = await here.migrate(
            there, multifd_channels=2, max_bandwidth=0, downtime_limit=LIMIT_MS
        )
        statistics = await migration.result()
        if stands:
            assert source.memory() == destination.memory()
            await there.execute("cont")
            assert destination.goes_on()
        return statistics


@pytest.mark.parametrize("stands", [True, False], ids=["stands", "runs"])
def test_the_memory_arrives_byte_by_byte_and_the_guest_goes_on(
    directory: Path, command: list[str], stands: bool
) -> None:
    """It would end if its device state and its memory were of different times."""
    with clients(command, directory) as (source, destination):
        result = asyncio.run(migrate(source, destination, stands=stands))

        assert result.tracker == "uffd-wp"
        assert f"handed over by process {source.pid}" in result.tracker_reason
        assert destination.goes_on()
        assert source.stands()
        assert source.flags() == destination.flags() == set()


@pytest.mark.parametrize("rounds", [0, 2], ids=["postcopy", "hybrid"])
@needs_kernel_faults
def test_the_memory_arrives_behind_the_guest(
    directory: Path, command: list[str], rounds: int
) -> None:
    async def scenario(source: Client, destination: Client) -> None:
        settings = ("max-bandwidth=32M", "downtime-limit=1")
        async with couple(source.spec, destination.spec, *settings, runs=False) as both:
            async for progress in both.migration.progress(0.01):
                if progress.status is Status.ACTIVE and progress.rounds > rounds:
                    break
            await both.migration.start_postcopy()
            await both.finish()
            assert source.memory() == destination.memory()
            await both.there.execute("cont")
            assert await asyncio.to_thread(destination.goes_on)

    with clients(command, directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.flags() == set()
        assert destination.goes_on()
        assert source.stands()


@needs_kernel_faults
def test_a_guest_runs_while_its_pages_are_missing(directory: Path, c_command: list[str]) -> None:
    async def scenario(source: Client, destination: Client) -> None:
        async with in_postcopy(source.spec, destination.spec, runs=True) as both:
            assert destination.flags() == {"um"}
            await both.finish()
            assert await asyncio.to_thread(destination.goes_on)

    with clients(c_command, directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.flags() == set()


def test_a_guest_that_arrived_is_migrated_on(directory: Path, c_command: list[str]) -> None:
    """The userfaultfd that waited for its pages tracks what it writes."""

    async def scenario(one: Client, two: Client, three: Client) -> None:
        controls = [
            engine.Control.start(each.spec, *incoming)
            for each, *incoming in ((one,), (two, "tcp:127.0.0.1:0"), (three, "tcp:127.0.0.1:0"))
        ]
        async with controls[0], controls[1], controls[2]:
            for here, there in ((controls[0], controls[1]), (controls[1], controls[2])):
                migration = await here.migrate(there, max_bandwidth=0, downtime_limit=LIMIT_MS)
                await migration.result()
            assert await asyncio.to_thread(three.goes_on)

    with (
        clients(c_command, directory) as (one, two),
        client(c_command, directory / "c", "wait") as last,
    ):
        asyncio.run(scenario(one, two, last))

        assert one.stands()
        assert two.stands()


def test_a_guest_is_throttled_and_freed(directory: Path, c_command: list[str]) -> None:
    async def scenario(source: Client) -> None:
        async with engine.hosted(source.spec) as process:
            way = await process.guest.throttle(90)
            assert way
            await process.guest.throttle(0)
            assert await asyncio.to_thread(source.goes_on)

    with client(c_command, directory / "a") as source:
        asyncio.run(scenario(source))

        assert source.goes_on()


# -- deaths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", ["agent", "control", "both"])
def test_a_source_runs_when_ramferry_is_killed_while_it_stands(
    directory: Path, c_command: list[str], killed: str
) -> None:
    async def scenario(source: Client, destination: Client) -> None:
        here = engine.Control.start(source.spec, settings=["pause-before-switchover=on"])
        there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
        async with here, there:
            await here.migrate(there, max_bandwidth=0, downtime_limit=LIMIT_MS)
            await until(here, engine.Status.PRE_SWITCHOVER)
            assert source.stands()
            victims = {"agent": agent_of(here.pid), "control": here.pid}
            for name in victims if killed == "both" else [killed]:
                os.kill(victims[name], signal.SIGKILL)
            assert await asyncio.to_thread(source.goes_on)
            await eventually(lambda: source.flags() == set())

    with clients(c_command, directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.goes_on()
        assert destination.process.wait(60) == 3  # half a guest


def test_a_stop_of_its_user_outlasts_ramferry(directory: Path, c_command: list[str]) -> None:
    async def scenario(source: Client) -> None:
        async with engine.Control.start(source.spec) as here:
            await here.execute("stop")
            os.kill(agent_of(here.pid), signal.SIGKILL)
            here.kill()
            await here.wait()

    with client(c_command, directory / "a") as source:
        asyncio.run(scenario(source))

        assert source.stands()
        assert source.process.poll() is None


def test_a_source_that_dies_fails_the_migration(directory: Path, c_command: list[str]) -> None:
    async def scenario(source: Client, destination: Client) -> str:
        here = engine.Control.start(source.spec)
        there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
        async with here, there:
            await here.migrate(there, max_bandwidth=1_000_000, downtime_limit=1)
            source.process.kill()
            await until(here, Status.FAILED)
            return here.stderr

    with clients(c_command, directory) as (source, destination):
        said = asyncio.run(scenario(source, destination))

        assert f"handoff (pid {source.pid}) or its agent is gone" in said
        assert destination.process.wait(60) == 3


def test_a_destination_that_dies_leaves_the_source_running(
    directory: Path, c_command: list[str]
) -> None:
    async def scenario(source: Client, destination: Client) -> None:
        here = engine.Control.start(source.spec)
        there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
        async with here, there:
            await here.migrate(there, max_bandwidth=1_000_000, downtime_limit=1)
            destination.process.kill()
            await until(here, Status.FAILED)
            assert await asyncio.to_thread(source.goes_on)
            await eventually(lambda: source.flags() == set())

    with clients(c_command, directory) as (source, destination):
        asyncio.run(scenario(source, destination))


@needs_kernel_faults
@pytest.mark.parametrize("side", ["here", "there"])
def test_every_page_comes_when_an_agent_is_killed(
    directory: Path, c_command: list[str], side: str
) -> None:
    async def scenario(source: Client, destination: Client) -> None:
        async with in_postcopy(source.spec, destination.spec, runs=True) as both:
            os.kill(agent_of(getattr(both, side).pid), signal.SIGKILL)
            await both.finish()
            assert await asyncio.to_thread(destination.goes_on)

    with clients(c_command, directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.goes_on()
        assert destination.flags() == set()
        assert source.stands()


@needs_kernel_faults
def test_a_guest_waits_for_ever_when_all_of_ramferry_is_killed(
    directory: Path, c_command: list[str]
) -> None:
    """It would end if it saw a zero that is not its own. So much takes it seconds to ask for."""

    async def scenario(source: Client, destination: Client) -> None:
        async with in_postcopy(source.spec, destination.spec, runs=True) as both:
            os.kill(agent_of(both.there.pid), signal.SIGKILL)
            both.there.kill()
            await both.there.wait()

    with clients(c_command, directory, 256) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.stands()
        assert destination.process.poll() is None
        assert destination.flags() == {"um"}


@needs_kernel_faults
def test_a_control_process_that_was_killed_is_followed_by_another(
    directory: Path, c_command: list[str], tmp_path: Path
) -> None:
    async def scenario(source: Client, destination: Client) -> None:
        states = tmp_path / "states"
        async with in_postcopy(source.spec, destination.spec, states=states, runs=True) as both:
            both.there.kill()
            await both.there.wait()
            again = engine.Control.start(
                destination.spec, "tcp:127.0.0.1:0", ["postcopy-ram=on"],
                state_dir=str(states / "destination"),
            )  # fmt: skip
            async with again:
                assert "its guest lives and is taken over" in again.stderr
                await until(both.here, Status.POSTCOPY_PAUSED)
                both.there = again
                await both.recover()
                await both.finish()
                assert await asyncio.to_thread(destination.goes_on)

    with clients(c_command, directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert soon(lambda: destination.flags() == set())
