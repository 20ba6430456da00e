"""kill -9 as an ordinary event: one verified guest on exactly one side, and nothing left over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import engine
from engine.control.status import Status
from tests.survival.rig import (
    Pair,
    adopted,
    begin,
    ended,
    gave_up,
    healed,
    is_right,
    is_running,
    is_still,
    kill,
    let_end,
    pair,
    reached,
    switching,
)

pytestmark = pytest.mark.process

#: How much of RAM was sent when the kill strikes, in the first round, which cannot be the last.
MIDDLE = [0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0]
#: Before that nothing may be connected yet; after it all may be over when the kill arrives.
SETUP, SWITCHOVER = 0.0, 2.0
at_every_instant = pytest.mark.parametrize("part", [SETUP, *MIDDLE, SWITCHOVER])


async def begin_until(both: Pair, part: float) -> engine.Migration:
    """Begin a migration and wait for the instant; `let_end` is still to come."""
    migration = await begin(both, x_heal_limit=8)
    if part == SWITCHOVER:
        await let_end(both.source)
        await switching(migration)
    else:
        await reached(migration, part)
    return migration


@at_every_instant
@pytest.mark.parametrize(
    ("side", "module"),
    [("source", "engine.multifd.sender"), ("destination", "engine.multifd.receiver")],
)
def test_a_killed_worker_is_replaced_and_every_page_arrives(
    tmp_path: Path, side: str, module: str, part: float
) -> None:
    killed = int(part * 100) // 5 % 2

    async def scenario() -> tuple[engine.Statistics, engine.Verdict]:
        async with pair(tmp_path) as both:
            workers = both.parts(both.side(side), module)
            assert len(workers) == 2
            migration = await begin_until(both, part)
            kill(workers[killed])
            if part in MIDDLE:
                healing = await healed(migration)
                assert 1 <= healing.raw["x-heals"] <= 2
                assert [channel["incarnation"] for channel in healing.channels] == [
                    1 + healing.raw["x-heals"] if index == killed else 1 for index in range(2)
                ]
            await let_end(both.source)
            result = await migration.result()
            return result, await engine.verify(both.source, both.destination)

    result, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    assert result.raw["x-heals"] <= 2


@at_every_instant
def test_a_killed_source_control_leaves_one_guest(tmp_path: Path, part: float) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin_until(both, part)
            both.source.kill()
            orphan = await both.orphan("source")
            if orphan is None:  # it had handed over, and ended
                assert await is_running(both.destination)
                assert await is_right(both.destination)
                return
            assert await gave_up(both.destination) or part == SETUP
            async with adopted(orphan) as control:
                assert await is_running(control)
                assert await is_right(control)

    asyncio.run(scenario())


@at_every_instant
def test_a_killed_destination_control_leaves_one_guest(tmp_path: Path, part: float) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin_until(both, part)
            both.destination.kill()
            await let_end(both.source)
            orphan = await both.orphan("destination")
            statistics = await ended(both.source)
            if orphan is None:
                assert statistics.status is Status.FAILED
                assert await is_running(both.source)
                assert await is_right(both.source)
                return
            assert statistics.status is Status.COMPLETED
            assert await is_still(both.source)
            async with adopted(orphan) as control:
                assert await is_running(control)
                assert await is_right(control)

    asyncio.run(scenario())


@at_every_instant
def test_a_killed_destination_guest_leaves_the_one_at_the_source(
    tmp_path: Path, part: float
) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin_until(both, part)
            kill(both.guests["destination"][0])
            await let_end(both.source)
            statistics = await ended(both.source)
            if statistics.status is Status.COMPLETED:  # it died after it had taken over
                assert await is_still(both.source)
                return
            assert await is_running(both.source)
            assert await is_right(both.source)
            assert await both.destination.wait() == 1

    asyncio.run(scenario())


async def check_nobody_came(destination: engine.Control, part: float) -> None:
    """It ends with its migration; or the source had not connected yet, and it waits for another."""
    ended = asyncio.ensure_future(destination.wait())
    await asyncio.wait({ended}, timeout=20 if part == SETUP else None)
    if ended.done():
        assert ended.result() == 1
        return
    ended.cancel()
    assert (await destination.execute("query-migrate"))["status"] == "setup"
    assert (await destination.execute("query-status"))["status"] == "inmigrate"


@at_every_instant
def test_a_killed_source_guest_ends_the_migration_or_has_left(tmp_path: Path, part: float) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as both:
            await begin_until(both, part)
            kill(both.guests["source"][0])
            await let_end(both.source)
            statistics = await ended(both.source)
            if statistics.status is Status.COMPLETED:
                assert await is_running(both.destination)
                assert await is_right(both.destination)
                return
            assert "guest" in str(statistics.error)
            await check_nobody_came(both.destination, part)

    asyncio.run(scenario())
