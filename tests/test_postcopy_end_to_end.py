"""Whole postcopy migrations: the switch, pauses, recovery, and what is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

import engine
from engine.control.status import Status
from engine.errors import UsageError
from tests.kernel import has_userfaultfd

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(150),
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]

GUEST: Final = "workload:size=32M"
WRITING: Final = f"{GUEST},rate=15M,pattern=random"
ON: Final = ("postcopy-ram=on", "postcopy-blocktime=on", "multifd-channels=2")
SLOW: Final = (*ON, "max-bandwidth=20M", "downtime-limit=1", "max-postcopy-bandwidth=2M")
DEADLINE_S: Final = 60.0
QEMUS: Final = ["setup", "active", "device", "postcopy-active", "completed"]


@asynccontextmanager
async def couple(*settings: str) -> AsyncIterator[tuple[engine.Control, engine.Control]]:
    source = engine.Control.start(WRITING, settings=settings)
    destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0", ON)
    async with source, destination, asyncio.timeout(DEADLINE_S):
        yield source, destination


async def until(control: engine.Control, *statuses: Status) -> dict[str, Any]:
    """What query-migrate says once it is in one of them."""
    wanted = [status.value for status in statuses]
    while True:
        info: dict[str, Any] = await control.execute("query-migrate")
        if info.get("status") in wanted:
            return info
        await asyncio.sleep(0.01)


async def in_postcopy(source: engine.Control, destination: engine.Control) -> engine.Migration:
    """A migration whose guest runs at the destination; it does not end before its limit goes."""
    migration = await source.migrate(destination)
    await migration.start_postcopy()
    await until(source, Status.POSTCOPY_ACTIVE)
    await until(destination, Status.POSTCOPY_ACTIVE)
    return migration


async def finish(
    source: engine.Control, destination: engine.Control, migration: engine.Migration
) -> engine.Statistics:
    """Let it complete; every page is right."""
    await source.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
    statistics = await migration.result()
    info = await until(destination, Status.COMPLETED)
    assert info["x-postcopy"]["missing-pages"] == 0
    assert (await engine.verify(source, destination)).is_right
    return statistics


def test_postcopy_moves_the_guest_first_and_every_page_after_it() -> None:
    async def scenario() -> tuple[engine.Statistics, dict[str, Any], list[str]]:
        seen: list[str] = []
        async with couple(*SLOW) as (source, destination):
            with source.listen() as events:

                async def hear() -> None:
                    async for event in events:
                        if event["event"] == "MIGRATION":
                            seen.append(event["data"]["status"])

                hearing = asyncio.create_task(hear())
                migration = await source.migrate(destination)
                await until(source, Status.ACTIVE)
                await migration.start_postcopy()
                statistics = await finish(source, destination, migration)
                while len(seen) < len(QEMUS):
                    await asyncio.sleep(0.01)
                hearing.cancel()
            guest = await destination.query_guest()
            assert guest["writes"] > 0
            return statistics, await destination.execute("query-migrate"), seen

    statistics, info, seen = asyncio.run(scenario())
    assert seen == QEMUS
    assert statistics.downtime_ms is not None
    sent = statistics.postcopy
    pages = sent["demand-pages"] + sent["prefetch-pages"] + sent["rest-pages"]
    assert pages + sent["background-pages"] > 0
    assert statistics.raw["ram"]["postcopy-requests"] == sent["requests"]
    assert statistics.raw["ram"]["postcopy-bytes"] >= sent["fault-channel-bytes"] > 0
    assert sum(info["postcopy-latency-dist"]) > 0
    assert info["postcopy-latency"] > 0
    assert len(info["postcopy-vcpu-blocktime"]) == 1


def test_postcopy_that_begins_at_once_needs_no_round_before() -> None:
    async def scenario() -> engine.Statistics:
        async with couple(*ON, "max-bandwidth=1M") as (source, destination):
            migration = await source.migrate(destination)
            await migration.start_postcopy()
            return await finish(source, destination, migration)

    assert asyncio.run(scenario()).status is Status.COMPLETED


@pytest.mark.parametrize("codec", ["lz4", "zstd", "auto"])
def test_the_background_is_encoded(codec: str) -> None:
    async def scenario() -> engine.Statistics:
        async with couple(*SLOW, f"multifd-compression={codec}", "xbzrle=on") as (
            source,
            destination,
        ):
            migration = await in_postcopy(source, destination)
            while not (await source.execute("query-migrate"))["x-compression"]["tried-bytes"]:
                await asyncio.sleep(0.01)
            return await finish(source, destination, migration)

    compression = asyncio.run(scenario()).compression
    assert compression["tried-bytes"] > 0
    assert compression["encoded-bytes"] > 0


@pytest.mark.parametrize("who", ["source", "destination"])
def test_a_pause_keeps_what_is_there_and_recovery_brings_the_rest(who: str) -> None:
    async def scenario() -> None:
        async with couple(*SLOW) as (source, destination):
            migration = await in_postcopy(source, destination)
            for _ in range(2):
                pausing = source if who == "source" else destination
                await pausing.execute("migrate-pause")
                there = await until(destination, Status.POSTCOPY_PAUSED)
                here = await until(source, Status.POSTCOPY_PAUSED)
                told = here if who == "source" else there
                assert told["error-desc"] == "Postcopy migration is paused by the user"
                assert there["x-postcopy"]["missing-pages"] > 0
                with pytest.raises(UsageError, match="cannot cancel"):
                    await migration.cancel()
                await destination.recover()
                await migration.resume(destination)
                await until(source, Status.POSTCOPY_ACTIVE)
                await until(destination, Status.POSTCOPY_ACTIVE)
            await finish(source, destination, migration)

    asyncio.run(scenario())


def test_a_recovery_that_reaches_nobody_pauses_again_and_may_be_repeated() -> None:
    async def scenario() -> None:
        async with couple(*SLOW) as (source, destination):
            migration = await in_postcopy(source, destination)
            await migration.pause()
            await until(source, Status.POSTCOPY_PAUSED)
            await until(destination, Status.POSTCOPY_PAUSED)
            await migration.resume("tcp:127.0.0.1:1")
            info = await until(source, Status.POSTCOPY_PAUSED)
            while "Failed to connect" not in info["error-desc"]:
                info = await until(source, Status.POSTCOPY_PAUSED)
            await destination.recover()
            first = await destination.address()
            await destination.recover()
            assert await destination.address() != first
            await migration.resume(destination)
            await finish(source, destination, migration)

    asyncio.run(scenario())


def test_a_guest_that_lends_no_userfaultfd_stays_where_it_is() -> None:
    async def scenario() -> tuple[engine.Statistics, str]:
        source = engine.Control.start("ram:size=8M", settings=[*ON, "max-bandwidth=1M"])
        destination = engine.Control.start("ram:size=8M", "tcp:127.0.0.1:0", ON)
        async with source, destination, asyncio.timeout(DEADLINE_S):
            migration = await source.migrate(destination)
            await migration.start_postcopy()
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            status = await source.execute("query-status")
            return failed.value.statistics, status["status"]

    statistics, status = asyncio.run(scenario())
    assert status == "running"
    assert statistics.error is not None
    assert "userfaultfd" in statistics.error
