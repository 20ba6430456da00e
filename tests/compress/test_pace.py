"""How fast RAM moved with a codec, and for how long that is believed."""

from __future__ import annotations

import pytest

from engine.compress.pace import PACE_NS, SEEN_NS, SETTLING_BATCHES, SURE_NS, Pace, Seen

MS = 1_000_000


def test_packets_of_the_codec_before_say_nothing() -> None:
    pace = Pace()
    for _ in range(SETTLING_BATCHES):
        pace.learn(100 * MS, 1, is_steady=True)
    assert not pace.is_sure
    assert pace.ns_per_byte == 0

    pace.learn(SURE_NS, SURE_NS // 4, is_steady=True)

    assert pace.is_sure
    assert pace.ns_per_byte == 4


def test_it_follows_what_is_new() -> None:
    pace = Pace(settling=0)
    for _ in range(1000):
        pace.learn(MS, MS, is_steady=True)
    for _ in range(3 * PACE_NS // MS):
        pace.learn(MS, MS // 2, is_steady=True)
    assert pace.ns_per_byte == pytest.approx(2, rel=0.05)


def test_a_channel_that_is_full_and_one_that_is_not_are_not_mixed() -> None:
    pace = Pace(settling=0)
    pace.learn(SURE_NS, SURE_NS, is_steady=False)
    assert pace.is_sure

    pace.learn(MS, MS // 8, is_steady=True)

    assert not pace.is_sure
    assert pace.ns_per_byte == 8


def test_what_was_seen_is_for_as_much_on_the_wire_and_grows_old() -> None:
    seen = Seen(at_ns=5 * MS, ns_per_byte=12.0)
    assert seen.ns_with(0.5, 5 * MS) == 6.0
    assert seen.ns_with(0.25, 5 * MS + SEEN_NS) == 3.0
    assert seen.ns_with(0.5, 5 * MS + SEEN_NS + 1) == 0.0
    assert Seen(ns_per_byte=3.0).ns_with(1.0, 1) == 0.0
