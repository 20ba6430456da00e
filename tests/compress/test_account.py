"""What `auto` says of itself, in worlds whose truth is known, and what people read of that."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.compress.account import Account, Estimate, Why, account_of, words_count
from engine.compress.auto import LADDER, Auto
from engine.compress.choice import policy_of
from engine.control.compression import auto_info, auto_line
from engine.wire import Compress
from tests.compress.world import CHANNELS, TEXT, World, auto

GIB = 2**30
words = st.integers(0, 2**64 - 1)
index = st.integers(0, len(LADDER) - 1)


def known(world: World) -> Account:
    policy = world.lanes[0].policy
    assert isinstance(policy, Auto)
    return policy.account()


@given(st.builds(
    Account, index, index, words, words, st.sampled_from(Why), words, st.booleans(), words, words,
    words, st.tuples(*[st.builds(Estimate, words, words, words, words)] * len(LADDER)),
))  # fmt: skip
def test_an_account_is_read_as_it_was_written(account: Account) -> None:
    written = account.words()
    assert len(written) == words_count(LADDER)
    assert account_of(written, LADDER) == account


@given(st.lists(words, min_size=words_count(LADDER), max_size=words_count(LADDER)))
def test_whatever_the_words_are_they_are_read_or_not(written: list[int]) -> None:
    account = account_of(written, LADDER)
    assert account is None or auto_info(account, 0)["codec"]


def test_nothing_was_written() -> None:
    assert account_of([0] * words_count(LADDER), LADDER) is None


@pytest.mark.parametrize(("gbit", "drain"), [(0.3, 18.75e6), (0.8, 50e6)])
def test_on_a_slow_link_it_says_that_the_channel_is_slower_than_the_encoder(
    gbit: float, drain: float
) -> None:
    world = World(gbit, TEXT).start(auto)
    world.move(GIB)
    account = known(world)

    assert LADDER[account.current].name == "zstd"
    assert account.why is Why.STRONGER
    assert account.is_full
    assert account.drain_rate == pytest.approx(drain, rel=0.15)
    assert account.worth == pytest.approx(850, abs=60)
    left, cost_ns = TEXT[account.current]
    estimate = account.estimates[account.current]
    assert estimate.left_ppm == pytest.approx(left * 1e6, rel=0.15)
    assert estimate.codec_ps == pytest.approx(cost_ns * 1e3, rel=0.2)
    assert estimate.ram_rate == max(one.ram_rate for one in account.estimates)


def test_when_the_link_becomes_fast_it_says_that_encoding_took_too_long() -> None:
    world = World(1, TEXT, is_local=False).start(auto)
    world.move(GIB)
    world.gbit = 100
    world.move_until(world.now_ns + 3_000_000_000)
    account = known(world)

    assert account.current < account.before
    assert account.why in (Why.WEAKER, Why.DISPROVED)


def test_what_was_learnt_outlives_another_limit() -> None:
    before = policy_of(Compress("auto"), CHANNELS)
    world = World(1, TEXT).start(lambda: before)
    world.move(GIB // 4)

    after = policy_of(Compress("auto", cpu_percent=10), CHANNELS, before)

    assert isinstance(after, Auto)
    assert after.account().estimates[1].times
    assert after.account().cpu_budget < 200
    assert policy_of(Compress("zstd"), CHANNELS, after) is not after
    fresh = policy_of(Compress("auto"), CHANNELS)
    assert isinstance(fresh, Auto)
    assert not fresh.account().estimates[1].times


def channel(codec: str, drain: int, reason: str, age: int | None = None) -> dict[str, Any]:
    change = {} if age is None else {"last-change": {"from": "none", "to": codec, "age": age}}
    auto = {"codec": codec, "reason": reason, "drain-bytes-per-second": drain, **change}
    return {"index": 0, "auto": auto}


@pytest.mark.parametrize(
    ("channels", "line"),
    [
        ([], ""),
        ([{"index": 0, "codec": "zstd"}], ""),
        ([channel("none", 0, "so")], "none on 1 (so; never full)"),
        (
            [channel("zstd:1", 10_000_000, "old", 9), channel("lz4:1", 20_000_000, "new", 3)],
            "lz4:1 on 1, zstd:1 on 1 (new; 30 MB/s drained)",
        ),
    ],
)
def test_people_read_one_line(channels: list[dict[str, Any]], line: str) -> None:
    assert auto_line({"channels": channels}) == line
