"""When to stop the guest and how much to throttle it: plain numbers in and out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.policy import (
    PauseModel,
    Round,
    Throttle,
    ThrottleSettings,
    may_finish,
    may_pause,
)

MIB = 1024 * 1024
MS = 1_000_000


def settings(*, is_on: bool = True, tailslow: bool = False) -> ThrottleSettings:
    return ThrottleSettings(is_on, 50, 20, 10, 99, tailslow)


@pytest.mark.parametrize(
    ("predicted_ms", "limit_ms", "expected"),
    [
        pytest.param(24, 30, True, id="fits-with-margin"),
        pytest.param(25, 30, False, id="would-fit-without-margin"),
        pytest.param(31, 30, False, id="too-long"),
    ],
)
def test_the_guest_is_stopped_only_when_the_pause_fits_with_a_margin(
    predicted_ms: int, limit_ms: int, expected: bool
) -> None:
    fits = may_pause(predicted_ms * MS, limit_ms * MS, is_running=True, dirty_bytes=MIB)

    assert fits is expected


@given(st.integers(0, 2**62), st.integers(0, 2**40))
def test_a_stopped_guest_never_waits(predicted_ns: int, limit_ns: int) -> None:
    assert may_pause(predicted_ns, limit_ns, is_running=False, dirty_bytes=2**40)
    assert may_finish(2**62, predicted_ns, limit_ns, is_running=False)


@pytest.mark.parametrize(("dirty", "expected"), [(0, True), (4096, False)])
def test_a_limit_of_zero_waits_until_nothing_is_dirty(dirty: int, expected: bool) -> None:
    assert may_pause(5 * MS, 0, is_running=True, dirty_bytes=dirty) is expected


def test_a_pause_goes_on_only_while_it_can_still_end_in_time() -> None:
    assert may_finish(10 * MS, 20 * MS, 30 * MS, is_running=True)
    assert not may_finish(10 * MS, 21 * MS, 30 * MS, is_running=True)


def test_the_model_learns_the_rate_of_large_rounds() -> None:
    model = PauseModel()
    for _ in range(10):
        model.learn(
            Round(harvest_ns=1 * MS, send_ns=100 * MS, sent_bytes=100 * MIB, wire_bytes=100 * MIB)
        )

    predicted_ns = model.send_ns(100 * MIB, 0)

    assert predicted_ns == pytest.approx(105 * MS, rel=0.05)


def test_small_rounds_teach_the_fixed_cost_not_the_rate() -> None:
    model = PauseModel()
    model.learn(Round(MS, 100 * MS, 100 * MIB, 100 * MIB))
    rate = model.rate_bytes_per_s
    for _ in range(10):
        model.learn(Round(MS, 12 * MS, 2 * MIB, 2 * MIB))

    assert model.rate_bytes_per_s == rate
    assert model.send_ns(2 * MIB, 0) == pytest.approx(12 * MS, rel=0.05)


def test_without_any_measurement_nothing_fits() -> None:
    assert PauseModel().send_ns(4096, 0) > 10**18


def test_avail_switchover_bandwidth_replaces_the_measured_rate() -> None:
    model = PauseModel()
    model.learn(Round(MS, 100 * MS, 100 * MIB, 100 * MIB))

    slow = model.send_ns(100 * MIB, 10 * MIB)

    assert slow == pytest.approx(10_000 * MS, rel=0.01)


def test_what_codecs_leave_is_what_takes_time() -> None:
    model = PauseModel()
    for _ in range(10):
        model.learn(Round(MS, 100 * MS, 100 * MIB, 25 * MIB))

    assert model.send_ns(100 * MIB, 0) == pytest.approx(105 * MS, rel=0.05)
    assert model.send_ns(100 * MIB, 10 * MIB) == pytest.approx(2_500 * MS, rel=0.05)


def test_a_round_of_zero_pages_says_nothing_about_codecs() -> None:
    model = PauseModel()
    model.learn(Round(MS, 10 * MS, 0, 3 * MIB))

    assert model.send_ns(100 * MIB, 10 * MIB) == pytest.approx(10_000 * MS, rel=0.01)


def test_auto_converge_starts_in_the_second_round_that_dirties_too_much() -> None:
    throttle = Throttle()

    steps = [throttle.after_round(60 * MIB, 100 * MIB, settings()) for _ in range(6)]

    assert steps == [0, 20, 20, 30, 30, 40]


def test_rounds_below_the_threshold_keep_the_throttle() -> None:
    throttle = Throttle(percent=40)

    assert throttle.after_round(50 * MIB, 100 * MIB, settings()) == 40


def test_the_throttle_stops_at_its_maximum() -> None:
    throttle = Throttle(percent=95)

    for _ in range(4):
        throttle.after_round(90 * MIB, 100 * MIB, settings())

    assert throttle.percent == 99


def test_tailslow_takes_smaller_steps_near_the_goal() -> None:
    throttle = Throttle(percent=80)
    throttle.after_round(51 * MIB, 100 * MIB, settings(tailslow=True))

    percent = throttle.after_round(51 * MIB, 100 * MIB, settings(tailslow=True))

    assert percent == 81


def test_turning_auto_converge_off_takes_the_throttle_away() -> None:
    throttle = Throttle(percent=80)

    assert throttle.after_round(90, 100, settings(is_on=False)) == 0
