"""The bandwidth budget against its definition, and between processes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from tests.native.support import Peer, shared_memory

U64_MAX = 2**64 - 1
sizes = st.one_of(st.integers(0, 10**7), st.integers(0, U64_MAX))
times = st.one_of(st.integers(0, 10**13), st.integers(0, U64_MAX))


@given(sizes, times, sizes, times, times)
def test_take_is_virtual_scheduling(
    rate: int, sold_until: int, byte_count: int, now: int, burst: int
) -> None:
    budget = bytearray(struct.pack("QQQ", rate, sold_until, 0))

    may_go = _native.budget_take(budget, byte_count, now, burst)

    if rate == 0:
        assert may_go == now
        assert budget == struct.pack("QQQ", rate, sold_until, 0)
        return
    start = max(sold_until, now - burst)
    end = min(U64_MAX, start - (-byte_count * 10**9 // rate))
    assert may_go == max(start, now)
    assert budget == struct.pack("QQQ", rate, end, 0)


def test_a_second_of_traffic_is_the_rate() -> None:
    budget, now, sent = bytearray(struct.pack("QQQ", 100_000_000, 0, 0)), 10**12, 0
    while (now := _native.budget_take(budget, 65536, now, 1_000_000)) < 10**12 + 10**9:
        sent += 65536

    assert sent == pytest.approx(100_000_000, rel=0.01)


@pytest.mark.process
def test_two_processes_never_buy_the_same_bandwidth() -> None:
    with shared_memory(4096) as (fd, budget), Peer("buy", fd) as one, Peer("buy", fd) as two:
        budget[:24] = struct.pack("QQQ", 10**9, 0, 0)
        for peer in (one, two):
            peer.answer()
        for peer in (one, two):
            peer.tell(200_000)
        for peer in (one, two):
            peer.answer()

        assert struct.unpack("QQ", budget[:16]) == (10**9, 2 * 200_000 * 3)


def test_a_new_rate_takes_back_what_was_sold_and_counts_up() -> None:
    budget = bytearray(struct.pack("QQQ", 1, 10**18, 4))

    _native.budget_set_rate(budget, 1000, 77)

    assert struct.unpack("QQQ", budget) == (1000, 77, 5)
    assert _native.budget_take(budget, 1, 10**9, 0) == 10**9
