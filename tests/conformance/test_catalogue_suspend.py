"""The rows of QEMU's own migration tests whose guest sleeps (ACPI S3): it arrives asleep, and only
`system_wakeup` has it go on. Named after their paths, and every page is checked, as in
test_catalogue.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import engine
from tests.conformance.test_catalogue import (
    WAIT_S,
    check_lives,
    check_success,
    couple,
    set_and_read,
    until,
    until_status,
)
from tests.kernel import has_userfaultfd

pytestmark = pytest.mark.process
RUN_STATES = {"STOP", "RESUME", "SUSPEND", "WAKEUP"}


@contextlib.asynccontextmanager
async def heard(control: engine.Control) -> AsyncIterator[list[str]]:
    """The names of the events about its run state, as they come."""
    names: list[str] = []

    async def hear(events: AsyncIterator[dict[str, Any]]) -> None:
        async for event in events:
            names.extend({event["event"]} & RUN_STATES)

    with control.listen() as events:
        hearing = asyncio.ensure_future(hear(events))
        try:
            yield names
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)


async def run_state(control: engine.Control) -> tuple[str, bool]:
    status = await control.execute("query-status")
    return status["status"], status["running"]


async def fall_asleep(control: engine.Control) -> int:
    """Return what it had written."""
    await check_lives(control)
    await control.execute("x-guest-sleep")
    assert await run_state(control) == ("suspended", False)
    return int((await control.query_guest())["writes"])


async def wake(control: engine.Control, slept_at: int) -> None:
    """Nothing was written until now."""
    assert await run_state(control) == ("suspended", False)
    assert (await control.query_guest())["writes"] == slept_at
    await control.execute("system_wakeup")
    assert await run_state(control) == ("running", True)


async def until_heard(names: list[str], expected: list[str]) -> None:
    async def are_there() -> bool:
        assert names == expected[: len(names)]
        return names == expected

    await until(are_there)


def test_migration_precopy_unix_suspend_live() -> None:
    async def scenario() -> None:
        async with (
            asyncio.timeout(2 * WAIT_S),
            couple(uri=f"unix:{tempfile.gettempdir()}/m") as (source, destination),
            heard(source) as here,
            heard(destination) as there,
        ):
            slept_at = await fall_asleep(source)
            await (await source.migrate(destination)).result()
            await until_status(destination, "completed")
            await wake(destination, slept_at)
            await until_heard(here, ["SUSPEND", "STOP"])
            await until_heard(there, ["RESUME", "WAKEUP"])
            await check_success(source, destination)

    asyncio.run(scenario())


def test_migration_precopy_unix_suspend_notlive() -> None:
    async def scenario() -> None:
        async with (
            asyncio.timeout(2 * WAIT_S),
            couple(uri=f"unix:{tempfile.gettempdir()}/m") as (source, destination),
            heard(source) as here,
            heard(destination) as there,
        ):
            slept_at = await fall_asleep(source)
            await source.execute("stop")
            assert await run_state(source) == ("paused", False)
            await (await source.migrate(destination)).result()
            await until_status(destination, "completed")
            assert await run_state(destination) == ("paused", False)
            await destination.execute("cont")
            await wake(destination, slept_at)
            await until_heard(here, ["SUSPEND", "STOP"])
            await until_heard(there, ["RESUME", "WAKEUP"])
            await check_success(source, destination)

    asyncio.run(scenario())


@pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")
def test_migration_postcopy_suspend() -> None:
    async def scenario() -> None:
        async with (
            asyncio.timeout(2 * WAIT_S),
            couple("postcopy-ram", "postcopy-blocktime") as (source, destination),
            heard(source) as here,
            heard(destination) as there,
        ):
            await set_and_read(source, {"max_bandwidth": 3_000_000, "downtime_limit": 1})
            slept_at = await fall_asleep(source)
            migration = await source.migrate(destination)
            await migration.start_postcopy()
            await migration.result()
            await until_status(destination, "completed")
            assert "postcopy-blocktime" in await destination.execute("query-migrate")
            await wake(destination, slept_at)
            await until_heard(here, ["SUSPEND", "STOP"])
            await until_heard(there, ["RESUME", "WAKEUP"])
            await check_success(source, destination)

    asyncio.run(scenario())


def test_a_guest_that_is_cancelled_on_its_way_sleeps_on_where_it_was() -> None:
    async def scenario() -> None:
        async with (
            asyncio.timeout(2 * WAIT_S),
            couple("pause-before-switchover") as (source, destination),
            heard(source) as here,
        ):
            slept_at = await fall_asleep(source)
            with pytest.raises(engine.UsageError, match="Unable to suspend: guest is not running"):
                await source.execute("x-guest-sleep")
            await source.migrate(destination)
            await until_status(source, "pre-switchover")
            with pytest.raises(engine.UsageError, match="guest is not in suspended state"):
                await source.execute("system_wakeup")
            await source.execute("migrate_cancel")
            await until_heard(here, ["SUSPEND", "STOP", "RESUME"])
            await wake(source, slept_at)
            await check_lives(source)

    asyncio.run(scenario())


def test_a_sleeper_that_is_adopted_sleeps_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        guest = "workload:size=16M,rate=5M"
        async with asyncio.timeout(2 * WAIT_S):
            first = engine.Control.start(guest, state_dir=str(tmp_path))
            async with first:
                slept_at = await fall_asleep(first)
                first.kill()
                await first.wait()
                async with engine.Control.start(guest, state_dir=str(tmp_path)) as second:
                    await wake(second, slept_at)
                    await check_lives(second)

    asyncio.run(scenario())
