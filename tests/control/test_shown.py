"""What `query-migrate` shows is made once for many, and never older than what was told."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.control import views
from engine.control.blockers import Blockers
from engine.control.machine import Phase
from engine.control.process import ControlProcess
from engine.control.qmp.commands import migration
from engine.control.qmp.commands.migration import SHOWN_AGE_NS, Shown
from engine.control.status import Status


class Clock:
    now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    one.now_ns = 10 * SHOWN_AGE_NS
    monkeypatch.setattr(migration, "time", one)
    made = iter(range(1_000_000))
    monkeypatch.setattr(views, "migration_info", lambda *_: {"made": next(made)})
    return one


def process() -> Any:
    return SimpleNamespace(
        told_count=0,
        inherits_unknown=False,
        blockers=Blockers(lambda: False),
        outgoing=SimpleNamespace(
            machine=SimpleNamespace(phase=Phase.SENDING), is_outcome_unknown=False
        ),
        incoming=SimpleNamespace(status=Status.SETUP, address=None),
    )


def test_all_who_ask_within_the_time_get_the_same(clock: Clock) -> None:
    shown = Shown(cast(ControlProcess, process()))
    first = shown.now()
    clock.now_ns += SHOWN_AGE_NS - 1
    assert shown.now() is first
    clock.now_ns += 1
    assert shown.now()["made"] == first["made"] + 1


def told(one: Any) -> None:
    one.told_count += 1


def next_phase(one: Any) -> None:
    one.outgoing.machine.phase = Phase.HANDING_OVER


def unknown(one: Any) -> None:
    one.outgoing.is_outcome_unknown = True


def inherited(one: Any) -> None:
    one.inherits_unknown = True


def blocked(one: Any) -> None:
    one.blockers.add("why")


def arrives(one: Any) -> None:
    one.incoming.status = Status.ACTIVE


def another(one: Any) -> None:
    one.outgoing = None


@pytest.mark.parametrize("step", [told, next_phase, unknown, inherited, blocked, arrives, another])
def test_after_a_step_it_is_made_anew_at_once(clock: Clock, step: Callable[[Any], None]) -> None:
    one = process()
    shown = Shown(cast(ControlProcess, one))
    first = shown.now()
    step(one)
    assert shown.now()["made"] == first["made"] + 1
    assert shown.now() is shown.now()
