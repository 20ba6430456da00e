"""Rounds that stop to shrink: noticed once, late enough to be sure, and acted on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine.control.stall import ROUNDS_MIN, SHRINKS_TO, TIME_MIN_NS, StallDetector
from engine.control.status import Status

MIB = 1024 * 1024


def run(dirty_mib: Sequence[float], round_ns: int = TIME_MIN_NS) -> list[bool]:
    detector = StallDetector()
    return [
        detector.after_round(int(dirty * MIB), (index + 1) * round_ns)
        for index, dirty in enumerate(dirty_mib)
    ]


def test_shrinking_rounds_are_no_stall() -> None:
    assert not any(run([100 * 0.85**n for n in range(30)]))


def test_a_stall_is_told_once() -> None:
    assert run([100, 99, 101, 95, 100, 100]) == [False, False, False, True, False, False]


def test_a_stall_after_new_progress_is_told_again() -> None:
    assert [n for n, told in enumerate(run([100] * 5 + [50] + [60] * 5)) if told] == [3, 8]


def test_short_rounds_must_last_together() -> None:
    told = run([100] * 20, round_ns=TIME_MIN_NS // 10)
    assert told.index(True) == 10


@given(st.lists(st.integers(1, 2**40), max_size=40), st.integers(1, 2 * TIME_MIN_NS))
def test_between_two_stalls_there_was_progress(dirty: list[int], round_ns: int) -> None:
    detector, best, rounds, may_tell = StallDetector(), None, 0, True
    for index, dirty_bytes in enumerate(dirty):
        told = detector.after_round(dirty_bytes, index * round_ns)
        if best is None or dirty_bytes <= best * SHRINKS_TO:
            best, rounds, may_tell = dirty_bytes, 0, True
            assert not told
            continue
        rounds += 1
        if told:
            assert may_tell
            assert rounds >= ROUNDS_MIN
            may_tell = False


@pytest.mark.process
@pytest.mark.parametrize("action", ["nothing", "throttle", "switchover", "cancel"])
def test_what_is_done_about_it(action: str) -> None:
    """The guest writes faster than the channel carries: without help it never ends."""

    async def scenario() -> tuple[dict[str, Any], engine.Statistics | str]:
        source = engine.Control.start(
            "workload:size=8M,rate=60M,pattern=random,contents=random",
            settings=["max-bandwidth=10M", "downtime-limit=20", f"x-on-stall={action}"],
        )
        destination = engine.Control.start("workload:size=8M", "tcp:127.0.0.1:0")
        async with source, destination:
            with source.listen() as events:
                migration = await source.migrate(destination)
                async for event in events:
                    if event["event"] == "X_MIGRATION_STALLED":
                        break
            assert event["data"]["dirty-bytes"] > 0
            assert event["data"]["expected-downtime"] > 20
            if action == "nothing":
                assert (await migration.statistics()).status is Status.ACTIVE
                await migration.cancel()
            if action in ("nothing", "cancel"):
                with pytest.raises(engine.MigrationFailed) as ended:
                    await migration.result()
                assert ended.value.statistics.status is Status.CANCELLED
                return event["data"], str(ended.value)
            result = await migration.result()
            assert (await engine.verify(source, destination)).is_right
            return event["data"], result

    data, result = asyncio.run(scenario())
    assert data["action"] == action
    if action == "cancel":
        assert result == "the rounds did not shrink any more, and x-on-stall is cancel"
    if action in ("throttle", "switchover"):
        assert isinstance(result, engine.Statistics)
        assert result.status is Status.COMPLETED
