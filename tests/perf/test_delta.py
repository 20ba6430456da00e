"""`bench delta`: the search for the highest rate, and what a page costs."""

from __future__ import annotations

import itertools

import pytest

from engine.errors import UsageError
from perf import delta, links
from perf.delta import RATE_MAX, RATE_MIN, Counted, Guest, Trial, figures, highest, rates


def trial(rate: int, limit: int) -> Trial:
    first, end = Counted(1, 1000, 10, 0), Counted(4, 1000 + 50 * 300, 60, 45)
    return Trial(rate, rate <= limit, 1.0, first, end)


@pytest.mark.parametrize("limit", [rates()[0], rates()[7], rates()[-1]])
def test_a_bisection_finds_the_highest_rate_that_converges(limit: int) -> None:
    trials, best = highest(lambda rate: trial(rate, limit), rates())

    assert best == limit
    assert len(trials) <= 6


def test_where_nothing_converges_the_rate_is_zero() -> None:
    trials, best = highest(lambda rate: trial(rate, 0), rates())

    assert best == 0
    assert figures(trials, best)["highest_write_rate_mb_per_s"] == [0.0]


def test_rates_are_a_tenth_apart() -> None:
    tried = rates()

    assert tried[0] == RATE_MIN
    assert RATE_MAX / 1.1 < tried[-1] <= RATE_MAX
    for low, high in itertools.pairwise(tried):
        assert high / low == pytest.approx(1.1, abs=0.001)


def test_a_dirty_page_costs_what_was_sent_after_the_first_pass() -> None:
    trials, best = highest(lambda rate: trial(rate, 10**8), rates())

    found = figures(trials, best)

    assert found["bytes_per_dirty_page"] == [300.0]
    assert found["rounds"] == [4.0]
    assert found["delta_pages"] == [45.0]
    assert Trial(1, True, 1.0, Counted(), Counted()).bytes_per_dirty_page == 0


def test_pages_are_counted_with_and_without_a_cache() -> None:
    ram = {"dirty-sync-count": 3, "transferred": 500, "normal": 7, "duplicate": 2}

    assert Counted.of({"ram": ram}) == Counted(3, 500, 9, 0)
    assert Counted.of({"ram": ram, "xbzrle-cache": {"pages": 5}}) == Counted(3, 500, 14, 5)
    assert Counted.of({}) == Counted()


def test_a_guest_is_told_what_it_writes() -> None:
    spec = Guest(2**20, 4, "heap", 300).spec(5000)

    assert spec == "workload:size=1048576,rate=5000,pattern=sweep,words=4,contents=heap"


@pytest.mark.process
def test_a_guest_converges_on_a_link_that_is_faster_than_it_writes() -> None:
    try:
        links.check_possible()
    except UsageError as exc:
        pytest.skip(str(exc))
    guest = Guest(16 * 2**20, 4, "heap", 100)
    with links.make_link(10**8) as link:
        slow = delta.trial(link, guest, 2_000_000, 30, xbzrle=False)
        fast = delta.trial(link, guest, 500_000_000, 8, xbzrle=False)

    assert slow.has_converged
    assert slow.end.pages >= 16 * 2**20 // 4096
    assert not fast.has_converged
    assert 4000 < fast.bytes_per_dirty_page < 4200
