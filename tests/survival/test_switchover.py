"""The last moments: what is killed, frozen, stopped, continued or cancelled while the right to run
is about to change hands, or on its way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import engine
from engine.control.status import Status
from tests.survival.rig import (
    DEADLINE_S,
    DOWNTIME_MAX_MS,
    Pair,
    ended,
    is_right,
    is_running,
    is_still,
    kill,
    pair,
)
from tests.survival.test_faults import TAKE, in_the_switchover

pytestmark = pytest.mark.process


class Gate:
    """Stands in for the destination's main channel, and holds back its word that it is armed."""

    def __init__(self) -> None:
        self.armed = asyncio.Event()
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if b"Armed" in data:
                    self.armed.set()
                    await self._open.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def gate(path: Path) -> AsyncIterator[Gate]:
    """Take the place of the listener at `path`."""
    behind = path.with_suffix(".behind")
    path.rename(behind)
    gate, pumps = Gate(), set[asyncio.Task[None]]()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_unix_connection(behind)
        except OSError:
            writer.close()
            return
        for one in (gate.pump(reader, there_writer), gate.pump(there_reader, writer)):
            pumps.add(asyncio.get_running_loop().create_task(one))

    server = await asyncio.start_unix_server(accept, path)
    try:
        yield gate
    finally:
        server.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        await asyncio.sleep(0)  # closing takes a step of the loop
        for left in (behind, path, *path.parent.glob(f"{path.name}.*")):  # of the killed ones
            left.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def about_to_switch(directory: Path, *, stopped: bool = False) -> AsyncIterator[Any]:
    """A pair whose destination is armed and has not been heard: (pair, gate, migration)."""
    path = directory / "main"
    async with pair(directory, f"unix:{path}") as both, gate(path) as between:
        if stopped:
            await both.source.execute("stop")
        migration = await both.source.migrate(
            f"unix:{path}", max_bandwidth=0, downtime_limit=DOWNTIME_MAX_MS
        )
        await between.armed.wait()
        yield both, between, migration


def agent(both: Pair, name: str) -> psutil.Process:
    return both.guests[name][0]


async def status_of(control: engine.Control) -> str:
    return str((await control.execute("query-status"))["status"])


async def becomes(control: engine.Control, wanted: str) -> None:
    """Until query-status says so; the test's timeout bounds it."""
    while await status_of(control) != wanted:
        await asyncio.sleep(0.02)


async def handing_over(control: engine.Control) -> None:
    """Until the source's guest has been told to pass its right to run."""
    while (await control.execute("query-migrate"))["x-phase"] != "handing-over":
        await asyncio.sleep(0.002)


def test_cont_and_stop_in_the_switchover_lose_no_write(tmp_path: Path) -> None:
    async def scenario() -> tuple[Status, engine.Verdict, str]:
        async with about_to_switch(tmp_path, stopped=True) as (both, between, migration):
            with pytest.raises(engine.UsageError, match="Migration is not finalized yet"):
                await both.source.execute("cont")
            await both.source.execute("stop")
            assert await is_still(both.source)
            between.open()
            statistics = await migration.result()
            verdict = await engine.verify(both.source, both.destination)
            return statistics.status, verdict, await status_of(both.destination)

    status, verdict, state = asyncio.run(scenario())
    assert status is Status.COMPLETED
    assert verdict.is_right
    assert state == "paused"


def test_a_stop_in_the_switchover_is_kept_when_the_migration_is_cancelled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with about_to_switch(tmp_path) as (both, _, migration):
            await both.source.execute("stop")
            await migration.cancel()
            assert (await ended(both.source)).status is Status.CANCELLED
            assert await status_of(both.source) == "paused"
            assert await is_still(both.source)
            await both.source.execute("cont")
            assert await is_running(both.source)
            assert await is_right(both.source)

    asyncio.run(scenario())


def test_a_cancel_in_the_switchover_leaves_the_guest_running_at_the_source(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with about_to_switch(tmp_path) as (both, _, migration):
            assert await status_of(both.source) == "finish-migrate"
            await migration.cancel()
            assert (await ended(both.source)).status is Status.CANCELLED
            assert await is_running(both.source)
            assert await is_right(both.source)
            assert await both.destination.wait() == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("part", ["guest", "control"])
def test_an_armed_destination_that_dies_leaves_the_guest_at_the_source(
    tmp_path: Path, part: str
) -> None:
    async def scenario() -> None:
        async with about_to_switch(tmp_path) as (both, between, _):
            if part == "guest":
                kill(agent(both, "destination"))
            else:
                kill(psutil.Process(both.destination.pid))
            guest = agent(both, "destination")
            psutil.wait_procs([guest], timeout=DEADLINE_S)  # before a token can come
            between.open()
            assert (await ended(both.source)).status is Status.FAILED
            assert await is_running(both.source)
            assert await is_right(both.source)

    asyncio.run(scenario())


def test_a_source_guest_that_freezes_in_the_exchange_finds_its_answer_when_it_wakes(
    tmp_path: Path,
) -> None:
    """Also when control has given everything back meanwhile."""

    async def scenario() -> None:
        async with in_the_switchover(tmp_path, 1, TAKE) as (both, _, _, hold, _):
            here = agent(both, "source")
            here.suspend()
            hold.released.set()
            await becomes(both.destination, "running")
            while (await both.destination.execute("query-migrate"))["status"] != "completed":
                await asyncio.sleep(0.02)
            here.resume()

            assert (await ended(both.source)).status is Status.COMPLETED
            assert await is_still(both.source)
            assert await is_running(both.destination)
            assert await is_right(both.destination)

    asyncio.run(scenario())


def test_a_source_guest_that_dies_in_the_exchange_ends_the_migration_all_the_same(
    tmp_path: Path,
) -> None:
    """The destination's control process knows that its guest has taken over."""

    async def scenario() -> None:
        async with about_to_switch(tmp_path) as (both, between, _):
            there = agent(both, "destination")
            there.suspend()
            between.open()
            await handing_over(both.source)
            kill(agent(both, "source"))
            there.resume()

            status = (await ended(both.source)).status
            if status is Status.COMPLETED:  # the token had left
                assert await is_running(both.destination)
                assert await is_right(both.destination)
            await both.source.execute("quit")
            assert await both.source.wait() == 0

    asyncio.run(scenario())


def test_a_destination_that_freezes_while_armed_keeps_its_memory_until_it_has_decided(
    tmp_path: Path,
) -> None:
    """For the source the outcome is unknown; it asks once more before it runs again."""

    async def scenario() -> None:
        async with about_to_switch(tmp_path) as (both, between, migration):
            there = agent(both, "destination")
            there.suspend()
            between.open()
            with pytest.raises(engine.OutcomeUnknown):
                await migration.result()
            assert (await both.source.execute("query-migrate"))["x-handover"] == "unknown"
            assert await is_still(both.source)
            with pytest.raises(engine.UsageError, match="nobody has said"):
                await both.source.migrate("tcp:127.0.0.1:9")
            there.resume()

            await becomes(both.destination, "running")
            assert await is_running(both.destination)
            assert await is_right(both.destination)
            with pytest.raises(engine.MigrationError, match="runs at the destination now"):
                await both.source.execute("cont")
            assert await is_still(both.source)

    asyncio.run(scenario())


def test_a_source_guest_that_freezes_while_it_is_cancelled_obeys_when_it_wakes(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with about_to_switch(tmp_path) as (both, _, migration):
            here = agent(both, "source")
            here.suspend()
            await migration.cancel()
            assert (await ended(both.source)).status is Status.CANCELLED
            assert await status_of(both.source) != "finish-migrate"
            here.resume()

            await both.source.execute("stop")
            assert await is_still(both.source)
            await both.source.execute("cont")
            assert await is_running(both.source)
            assert await is_right(both.source)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("commands", "state"), [(("stop",), "paused"), (("stop", "cont"), "running")]
)
def test_stop_and_cont_before_the_arrival_say_whether_the_guest_runs_then(
    tmp_path: Path, commands: tuple[str, ...], state: str
) -> None:
    async def scenario() -> tuple[str, engine.Verdict]:
        async with pair(tmp_path) as both:
            for command in commands:
                await both.destination.execute(command)
            migration = await both.source.migrate(
                both.destination, max_bandwidth=0, downtime_limit=DOWNTIME_MAX_MS
            )
            await migration.result()
            await becomes(both.destination, state)
            verdict = await engine.verify(both.source, both.destination)
            return await status_of(both.destination), verdict

    said, verdict = asyncio.run(scenario())
    assert said == state
    assert verdict.is_right


def test_a_guest_killed_by_a_nameless_signal_is_noticed(tmp_path: Path) -> None:
    async def scenario() -> int | None:
        async with pair(tmp_path) as both:
            agent(both, "source").send_signal(40)
            await becomes(both.source, "internal-error")
            await both.source.execute("quit")
            return await both.source.wait()

    assert asyncio.run(scenario()) == 0
