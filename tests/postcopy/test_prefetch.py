"""The prefetcher: what it asks for after which faults, and what it leaves alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.postcopy.prefetch import Prefetcher, Span


def replay(pages: list[int], pages_max: int = 64) -> tuple[int, set[int]]:
    """Touch pages in order, as if what is asked for came at once: faults, and pages fetched."""
    prefetcher, there = Prefetcher(pages_max), set[int]()
    faults = 0
    for page in pages:
        if page in there:
            continue
        faults += 1
        there.add(page)
        for span in prefetcher.faulted(0, page):
            there.update(range(span.first_page, span.first_page + span.pages))
    return faults, there


@pytest.mark.parametrize("stride", [1, -1, 2, -3, 17, 32])
def test_a_sweep_faults_once_a_window_and_fetches_little_beyond(stride: int) -> None:
    start = 0 if stride > 0 else 64_000
    pages = [start + i * stride for i in range(1000)]
    faults, there = replay(pages)

    assert faults < 1000 // min(64, 256 // abs(stride) - 1) + 12
    assert len(there - set(pages)) <= 2 * 64 + 16


def test_two_sweeps_at_once_are_two_streams() -> None:
    pages = [page for i in range(1000) for page in (i, 500_000 - i)]
    faults, _ = replay(pages)
    assert faults < 80


def test_random_touches_of_large_memory_fetch_next_to_nothing() -> None:
    rng = random.Random(7)
    pages = [rng.randrange(1 << 20) for _ in range(4000)]
    faults, there = replay(pages)
    assert len(there) - faults < faults // 50


def test_a_hot_spot_faults_less_often_than_it_is_touched() -> None:
    rng = random.Random(7)
    pages = [5000 + rng.randrange(64) for _ in range(500)]
    faults, _ = replay(pages)
    assert faults < 40


def test_a_window_doubles_up_to_the_limit() -> None:
    prefetcher = Prefetcher(32)
    sizes, page = [], 0
    for _ in range(6):
        spans = prefetcher.faulted(0, page)
        sizes.append(sum(span.pages for span in spans))
        page = max([page, *(span.first_page + span.pages - 1 for span in spans)]) + 1
    assert sizes == [0, 0, 8, 16, 32, 32]


def test_a_fault_on_a_page_that_is_on_its_way_moves_the_window_on() -> None:
    prefetcher = Prefetcher(64)
    for page in (100, 101, 102):
        last = prefetcher.faulted(0, page)
    end = last[-1].first_page + last[-1].pages

    spans = prefetcher.faulted(0, 105)

    assert spans[0].first_page == end


def test_blocks_have_nothing_to_do_with_each_other() -> None:
    prefetcher = Prefetcher(64)
    assert [prefetcher.faulted(i % 2, 100 + 10 * (i % 3)) for i in range(2)] == [[], []]
    prefetcher.faulted(0, 50_000)
    assert prefetcher.faulted(1, 50_001) == []


def test_no_prefetch_is_no_prefetch() -> None:
    prefetcher = Prefetcher(0)
    assert [prefetcher.faulted(0, page) for page in range(20)] == [[]] * 20


@given(
    st.integers(1, 128),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), max_size=200),
)
def test_whatever_faults_no_decision_is_over_the_limit_or_before_the_block(
    pages_max: int, faults: list[tuple[int, int]]
) -> None:
    prefetcher = Prefetcher(pages_max)
    for block, page in faults:
        spans: list[Span] = prefetcher.faulted(block, page)
        assert sum(span.pages for span in spans) <= pages_max
        assert all(span.block == block and span.first_page >= 0 for span in spans)
