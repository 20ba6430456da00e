"""`auto` in a simulated world: it must be about as fast as the best fixed codec."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.compress.auto import AGE_MAX_NS, LADDER, SURE_TIMES, VAIN_NS
from engine.compress.drain import Drain
from engine.compress.policy import Done, Fixed, Probe
from tests.compress.world import (
    CHANNELS,
    CPUS,
    HEAP,
    LETTERS,
    MIB,
    TEXT,
    Contents,
    World,
    auto,
    in_batches,
    in_runs,
)

GIB = 2**30
SECOND = 1_000_000_000

Make = Callable[[], World]
Move = Callable[[World], float]


def slowness(make: Make, move: Move) -> float:
    """The time of `auto` by that of the best fixed codec."""
    best_ns = min(move(make().start(functools.partial(Fixed, arm))) for arm in LADDER)
    return move(make().start(auto)) / best_ns


SEEDS = (1, 2, 3)


def move_gib(world: World) -> float:
    return world.move(GIB)


def after(**changes: object) -> Move:
    """Half a GiB, two seconds after the world changed."""

    def move(world: World) -> float:
        world.move_until(world.now_ns + 3 * SECOND)
        for name, value in changes.items():
            setattr(world, name, value)
        world.move_until(world.now_ns + 2 * SECOND)
        return world.move(GIB // 2)

    return move


@pytest.mark.parametrize("contents", [TEXT, HEAP, LETTERS], ids=["text", "heap", "letters"])
@pytest.mark.parametrize("gbit", [0.1, 0.3, 1, 2.5, 5, 7, 10, 100])
@pytest.mark.parametrize("is_local", [True, False], ids=["loopback", "network"])
def test_it_is_about_as_fast_as_the_best_codec(
    contents: Contents, gbit: float, is_local: bool
) -> None:
    for seed in SEEDS:
        make = functools.partial(World, gbit, contents, seed=seed, is_local=is_local)
        assert slowness(make, move_gib) <= 1.05


@pytest.mark.parametrize("gbit", [0.1, 1, 2.5, 5, 10])
@pytest.mark.parametrize("kernel_bytes", [MIB // 2, 4 * MIB], ids=["512k", "4m"])
def test_what_the_kernel_queues_does_not_mislead_it(gbit: float, kernel_bytes: int) -> None:
    assert slowness(lambda: World(gbit, kernel_bytes=kernel_bytes), move_gib) <= 1.05


@pytest.mark.parametrize("gbit", [0.1, 1, 2.5, 5, 10])
@pytest.mark.parametrize("others", [1, 2])
def test_threads_that_never_sleep_do_not_mislead_it(gbit: float, others: int) -> None:
    assert slowness(lambda: World(gbit, others=others), move_gib) <= 1.05


@pytest.mark.parametrize("gbit", [0.3, 1, 7, 10, 100])
def test_a_destination_that_decodes_slowly_is_noticed(gbit: float) -> None:
    """The channel is full then, as on a slow link; it takes trials to see the difference."""
    for seed in SEEDS:
        make = functools.partial(World, gbit, seed=seed, is_local=False, decode_factor=3.0)
        assert slowness(make, move_gib) <= 1.15


@pytest.mark.parametrize("gbit", [0.1, 1, 2.5, 5, 10])
def test_content_in_runs_of_noise_and_heap_does_not_mislead_it(gbit: float) -> None:
    for seed in SEEDS:
        make = functools.partial(World, gbit, HEAP, in_runs(seed), seed)
        assert slowness(make, move_gib) <= 1.05


@pytest.mark.parametrize("gbit", [1, 2.5])
@pytest.mark.parametrize("part", [0.1, 0.2, 0.5])
def test_batches_of_noise_between_others_do_not_mislead_it(gbit: float, part: float) -> None:
    for seed in (*SEEDS, 4):
        worth = in_batches(seed, part)
        assert slowness(functools.partial(World, gbit, HEAP, worth, seed), move_gib) <= 1.05


@pytest.mark.parametrize("gbit", [0.3, 1, 2.5, 5, 10])
def test_short_rounds_do_not_mislead_it(gbit: float) -> None:
    def move(world: World) -> float:
        took_ns = world.move(GIB)
        for pages in range(20, 220, 5):
            took_ns += world.move(pages * 4096)
            world.now_ns += 8_000_000
        return took_ns + world.move(GIB // 2)

    assert slowness(lambda: World(gbit), move) <= 1.05


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.125, 0.3, 0.5, 1.0])
def test_a_bandwidth_limit_is_like_a_slow_link(limit: float) -> None:
    assert slowness(lambda: World(100, limit=limit), move_gib) <= 1.05


@pytest.mark.parametrize(
    ("before", "then"), [(10, 1), (1, 10), (2.5, 0.3), (0.3, 5), (10, 0.1), (1, 2.5)]
)
def test_a_change_of_bandwidth_is_followed_within_two_seconds(before: float, then: float) -> None:
    for contents in (TEXT, HEAP):
        assert slowness(functools.partial(World, before, contents), after(gbit=then)) <= 1.05


@pytest.mark.parametrize("gbit", [0.3, 1, 2.5, 5])
@pytest.mark.parametrize(
    ("worth", "then"),
    [(0.02, {"worth": lambda _offset: 0.95}), (0.95, {"contents": LETTERS})],
    ids=["noise-to-text", "text-to-letters"],
)
def test_a_change_of_content_is_followed_within_two_seconds(
    gbit: float, worth: float, then: dict[str, object]
) -> None:
    assert slowness(lambda: World(gbit, worth=lambda _offset: worth), after(**then)) <= 1.05


@pytest.mark.parametrize("percent", [1, 5, 20, 50])
@pytest.mark.parametrize("gbit", [0.1, 1, 2.5])
def test_encoding_takes_no_more_cpu_than_it_may(percent: int, gbit: float) -> None:
    world = World(gbit).start(lambda: auto(percent))

    took_ns = world.move(GIB)

    at_once_ns = 2 * 100_000_000
    assert 0 < world.encoded_ns <= percent / 100 * CPUS * took_ns + at_once_ns


def test_what_the_cpu_budget_allows_is_used_well() -> None:
    with_budget = World(2.5).start(lambda: auto(20)).move(GIB)
    without = World(2.5).start(lambda: Fixed(LADDER[0])).move(GIB)
    assert with_budget <= 0.8 * without


def test_a_channel_that_is_never_full_gets_pages_as_they_are() -> None:
    world = World(100).start(auto)
    world.move(GIB)
    assert {name for _, name in world.choices} == {"none 0"}


@pytest.mark.parametrize(("gbit", "contents"), [(10, LETTERS), (14, TEXT)], ids=["letters", "text"])
def test_a_codec_that_never_pays_is_looked_at_and_never_used(
    gbit: float, contents: Contents
) -> None:
    world = World(gbit, contents).start(auto)
    took_ns = world.move(2 * GIB)
    assert {name for _, name in world.choices} == {"none 0"}
    assert 0 < world.probes <= CHANNELS * (SURE_TIMES + took_ns / AGE_MAX_NS)


def test_content_that_is_never_worth_trying_is_looked_at_now_and_then() -> None:
    world = World(10, worth=lambda _offset: 0.0).start(auto)
    took_ns = world.move(2 * GIB)
    assert {name for _, name in world.choices} == {"none 0"}
    assert 0 < world.probes <= CHANNELS * (1 + took_ns / VAIN_NS)


def test_a_sample_of_noise_is_noise_for_every_codec() -> None:
    ms, policy = 1_000_000, auto()
    timing = (20 * ms, ms, ms, 19 * ms, 0.0, 1.0)
    for number in range(1, 20):
        policy.learn(Done(LADDER[0], number * 20 * ms, MIB, 0, 0, MIB, 0, *timing))
    good = Probe(LADDER[1], LADDER[0], 400 * ms, MIB, MIB, MIB // 3, MIB, ms)
    policy.learn_probe(good)
    assert policy.probe(401 * ms) == LADDER[2]
    policy.learn_probe(replace(good, at_ns=430 * ms, tried_bytes=0, encoded_bytes=0, used_bytes=0))
    assert policy.probe(431 * ms) is None
    assert policy.probe(430 * ms + VAIN_NS) == LADDER[2]


def test_probes_are_few() -> None:
    for gbit in (0.3, 1, 2.5):
        world = World(gbit).start(auto)
        took_ns = world.move(2 * GIB)
        assert 0 < world.probed_ns <= 0.03 * took_ns + 200_000_000


def test_a_batch_that_waited_with_nothing_queued_before_it_says_nothing_of_the_drain() -> None:
    """Until the queue is full nothing has left it, which is no drain of 0."""
    drain, ms = Drain(), 1_000_000
    for number in range(1, 6):
        drain.learn(
            Done(LADDER[0], number * 10 * ms, MIB, 0, 0, MIB, 0, 10 * ms, 0, 0, 5 * ms, 0.0, 1.0)
        )
        assert drain.is_full
        assert drain.rate == (MIB / (10 * ms) if number > 3 else 0.0)


def test_the_drain_is_what_left_between_two_moments_at_which_the_queue_was_full() -> None:
    """Also where it was not full in between."""
    drain, ms, now_ns = Drain(), 1_000_000, 0
    for total_ms, waited_ms in ((5, 4), (5, 4), (5, 4), (5, 4), (5, 4), (30, 0), (5, 4), (5, 4)):
        now_ns += total_ms * ms
        timing = (total_ms * ms, 0, 0, waited_ms * ms, 0.0, 1.0)
        drain.learn(Done(LADDER[0], now_ns, MIB, 0, 0, MIB, 0, *timing))
    assert drain.rate == 5 * MIB / (50 * ms)


def test_packets_that_go_in_twos_are_no_slow_drain() -> None:
    """ZeroMQ and the kernel take two at a time, of which one waits; two that wait in a row, as when
    the receiver did not get a CPU for a moment, are the exception."""
    drain, ms, now_ns = Drain(), 1_000_000, 0
    for total_ms, waited_ms in [(1, 0), (5, 4)] * 10 + [(5, 4)]:
        now_ns += total_ms * ms
        timing = (total_ms * ms, 0, 0, waited_ms * ms, 0.0, 1.0)
        drain.learn(Done(LADDER[0], now_ns, MIB, 0, 0, MIB, 0, *timing))
    assert drain.is_steady
    assert drain.rate == pytest.approx(2 * MIB / (6 * ms), rel=0.1)


def test_batches_that_went_as_deltas_or_in_part_say_nothing_of_the_pace() -> None:
    """Nothing on the wire for a page would be a codec that takes for ever for a byte of it."""
    ms, policy = 1_000_000, auto()
    for number in range(1, 200):
        timing = (ms, ms, ms, 0, 0.0, 1.0)
        whole = Done(LADDER[0], number * ms, MIB, 0, 0, MIB, 0, *timing)
        policy.learn(whole)
        policy.learn(replace(whole, wire_bytes=0, total_ns=50 * ms, is_whole=False))
    assert policy.pace.is_sure
    assert policy.pace.ns_per_byte == pytest.approx(ms / MIB)
