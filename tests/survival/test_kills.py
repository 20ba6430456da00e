"""kill -9 as an ordinary event: one verified guest on exactly one side, and nothing left over."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import engine
from engine.control.status import Status
from tests.survival.rig import (
    BANDWIDTH,
    Pair,
    adopted,
    ended,
    is_right,
    is_running,
    kill,
    pair,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

INSTANTS = [round(random.Random(seed).uniform(0.0, 1.3), 3) for seed in range(10)]
at_ten_instants = pytest.mark.parametrize("instant_s", INSTANTS)


async def begin(both: Pair) -> engine.Migration:
    return await both.source.migrate(
        both.destination, max_bandwidth=BANDWIDTH, downtime_limit=100, x_heal_limit=8
    )


@at_ten_instants
@pytest.mark.parametrize(
    ("side", "module"),
    [("source", "engine.multifd.sender"), ("destination", "engine.multifd.receiver")],
)
def test_a_killed_worker_is_replaced_and_every_page_arrives(
    tmp_path: Path, side: str, module: str, instant_s: float
) -> None:
    async def scenario() -> tuple[engine.Statistics, engine.Verdict]:
        async with pair(tmp_path) as both:
            workers = both.parts(both.side(side), module)
            assert len(workers) == 2
            migration = await begin(both)
            await asyncio.sleep(instant_s)
            kill(workers[int(instant_s * 1000) % 2])
            result = await migration.result()
            return result, await engine.verify(both.source, both.destination)

    result, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    assert result.raw["x-heals"] <= 2


@at_ten_instants
def test_a_killed_source_control_leaves_one_guest(tmp_path: Path, instant_s: float) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin(both)
            await asyncio.sleep(instant_s)
            both.source.kill()
            orphan = await both.orphan("source")
            if orphan is None:  # it had handed over, and ended
                assert await is_running(both.destination)
                assert await is_right(both.destination)
                return
            assert await both.destination.wait() == 1  # a failed load ends the destination
            async with adopted(orphan) as control:
                assert await is_running(control)
                assert await is_right(control)

    asyncio.run(scenario())


@at_ten_instants
def test_a_killed_destination_control_leaves_one_guest(tmp_path: Path, instant_s: float) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin(both)
            await asyncio.sleep(instant_s)
            both.destination.kill()
            orphan = await both.orphan("destination")
            statistics = await ended(both.source)
            if orphan is None:
                assert statistics.status is Status.FAILED
                assert await is_running(both.source)
                assert await is_right(both.source)
                return
            assert statistics.status is Status.COMPLETED
            assert not await is_running(both.source)
            async with adopted(orphan) as control:
                assert await is_running(control)
                assert await is_right(control)

    asyncio.run(scenario())


@at_ten_instants
def test_a_killed_destination_guest_leaves_the_one_at_the_source(
    tmp_path: Path, instant_s: float
) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin(both)
            await asyncio.sleep(instant_s)
            kill(both.guests["destination"][0])
            statistics = await ended(both.source)
            if statistics.status is Status.COMPLETED:  # it died after it had taken over
                assert not await is_running(both.source)
                return
            assert await is_running(both.source)
            assert await is_right(both.source)
            assert await both.destination.wait() == 1

    asyncio.run(scenario())


@at_ten_instants
def test_a_killed_source_guest_ends_the_migration_or_has_left(
    tmp_path: Path, instant_s: float
) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin(both)
            await asyncio.sleep(instant_s)
            kill(both.guests["source"][0])
            statistics = await ended(both.source)
            if statistics.status is Status.COMPLETED:
                assert await is_running(both.destination)
                assert await is_right(both.destination)
                return
            assert "guest" in str(statistics.error)
            assert await both.destination.wait() == 1

    asyncio.run(scenario())
