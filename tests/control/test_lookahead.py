"""A round is ended where the rest, and what was written meanwhile, fit in the limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from engine.control import lookahead
from engine.control.convergence import Convergence
from engine.control.dirtysync import DirtySync
from engine.control.host import Host
from engine.control.lookahead import LookAhead
from engine.control.policy import Round
from engine.control.statistics import MigrationNumbers

FITS = 50
STEPS = 50  #: of the event loop; a look takes two at most


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookahead, "PERIOD_S", 0)


class Estimates(Convergence):
    """What fits is known exactly."""

    def __init__(self, numbers: MigrationNumbers) -> None:
        super().__init__(cast(Host, None), numbers)
        self.looks_ahead = True

    def may_pause(self, dirty_bytes: int) -> bool:
        return dirty_bytes <= FITS


class Collected(DirtySync):
    """What was dirty at each collection; `looks` counts them."""

    def __init__(self, *found: int, is_cheap: bool = True) -> None:
        self.looks, self._cheap = 0, is_cheap
        self._found: Iterator[int] = iter(found)

    @property
    def is_cheap(self) -> bool:
        return self._cheap

    async def peek(self) -> int:
        self.looks += 1
        return next(self._found)


async def look(ahead: LookAhead, sync: Collected, is_sending: bool = True) -> list[str]:
    """Let it look so many times; what it has done."""
    ended: list[str] = []
    task = asyncio.create_task(
        ahead.run(sync, lambda: is_sending, lambda: None, lambda: ended.append("round"))
    )
    for _ in range(STEPS):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return ended


def ahead_of(remaining_bytes: int) -> tuple[LookAhead, Estimates]:
    numbers = MigrationNumbers(remaining_bytes=remaining_bytes)
    estimates = Estimates(numbers)
    return LookAhead(estimates, numbers), estimates


def test_a_round_ends_once_when_all_that_is_dirty_fits() -> None:
    ahead, _ = ahead_of(FITS)
    sync = Collected(FITS)

    assert asyncio.run(look(ahead, sync)) == ["round"]
    assert sync.looks == 1
    assert ahead.take() == FITS
    assert ahead.take() is None


def test_a_round_goes_on_when_too_much_was_written_meanwhile() -> None:
    ahead, _ = ahead_of(FITS)
    sync = Collected(*[FITS + 1] * 100)

    assert asyncio.run(look(ahead, sync)) == []
    assert sync.looks >= 1
    assert ahead.take() is None


@pytest.mark.parametrize("why", ["much-left", "rounds-help", "not-sending", "costly"])
def test_nobody_looks_where_it_is_of_no_use(why: str) -> None:
    ahead, estimates = ahead_of(FITS + (why == "much-left"))
    estimates.looks_ahead = why != "rounds-help"
    sync = Collected(FITS, is_cheap=why != "costly")

    assert asyncio.run(look(ahead, sync, is_sending=why != "not-sending")) == []
    assert sync.looks == 0


@pytest.mark.parametrize(("left", "looks"), [(75, False), (76, True)])
def test_rounds_help_when_they_leave_less_than_they_sent(left: int, looks: bool) -> None:
    convergence = Convergence(cast(Host, None), MigrationNumbers())
    assert not convergence.looks_ahead

    convergence.learn(Round(harvest_ns=1, send_ns=1, sent_bytes=100, wire_bytes=100))
    convergence.left(left)

    assert convergence.looks_ahead is looks


def test_nobody_looks_again_in_a_round_after_a_pause_that_did_not_fit() -> None:
    """Whole rounds are what a throttle is set after."""
    settings = SimpleNamespace(downtime_limit=1, avail_switchover_bandwidth=0)
    host = cast(Host, SimpleNamespace(parameters=settings))
    convergence = Convergence(host, MigrationNumbers())
    convergence.looks_ahead = True

    assert convergence.may_finish(0, 0, is_running=False)
    assert convergence.looks_ahead
    assert not convergence.may_finish(10_000_000_000, 0, is_running=True)
    assert not convergence.looks_ahead


def test_a_pause_after_which_nothing_is_tracked_is_not_undone() -> None:
    settings = SimpleNamespace(downtime_limit=1, avail_switchover_bandwidth=0)
    convergence = Convergence(cast(Host, SimpleNamespace(parameters=settings)), MigrationNumbers())
    convergence.is_pause_final = True

    assert convergence.may_finish(10_000_000_000, 0, is_running=True)
