"""A live sender whose round is ended, and one that follows the guest at the destination."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import _native, wire
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.demands import LAST_DEMAND, NewestDemand
from engine.multifd.progress import Count
from engine.worker import BACKGROUND_NICE
from tests.hugepages import huge_pages
from tests.multifd.encoded import noise, page_numbers, pages_of, runs_of, text
from tests.multifd.rig import SenderRig, memory, sender
from tests.multifd.test_sender import waiting_for_bandwidth
from tests.native.support import pages_of as marked

__all__ = ["huge_pages"]

pytestmark = pytest.mark.process

HUGE = 512
PAGES = 4096


@contextmanager
def ram(content: bytes, *, page_count: int = 0, hugetlb: bool = False) -> Iterator[RamBlock]:
    block = memory(page_count or len(content) // PAGE_SIZE, content, hugetlb=hugetlb)
    try:
        yield block
    finally:
        os.close(block.fd)


@contextmanager
def following(rig: SenderRig) -> Iterator[NewestDemand]:
    """Postcopy has begun; what the page service would write is ours to write."""
    demands = NewestDemand.create()
    rig.worker.order(wire.FollowDemands(), [demands.fd])
    try:
        yield demands
    finally:
        demands.close()


def demand(demands: NewestDemand, page: int) -> None:
    demands.words[LAST_DEMAND] = page + 1


async def rest_of_round(rig: SenderRig, number: int) -> tuple[list[wire.Packet], dict[int, bytes]]:
    """Everything up to ROUND_END, each page once, and what the sender reports of it."""
    packets: list[wire.Packet] = []
    sent: dict[int, bytes] = {}
    while True:
        packet, payload = await rig.packet()
        if packet.kind is wire.PacketKind.OPEN:
            continue
        packets.append(packet)
        assert packet.round_number == number
        if packet.kind is wire.PacketKind.ROUND_END:
            await rig.heard.until(
                lambda: [r for r in rig.heard.of(wire.RoundSent) if r.round_number == number]
            )
            return packets, sent
        new = pages_of(packet, payload)
        assert not new.keys() & sent.keys()
        sent |= new


def check_end(rig: SenderRig, packets: list[wire.Packet]) -> None:
    """ROUND_END and the report say what was sent."""
    end, others = packets[-1], packets[:-1]
    totals = [sum(getattr(packet, name) for packet in others)
              for name in ("pages", "zero_pages", "payload_bytes")]  # fmt: skip
    assert [end.pages, end.zero_pages, end.payload_bytes] == totals
    (report,) = [r for r in rig.heard.of(wire.RoundSent) if r.round_number == end.round_number]
    assert report == wire.RoundSent(1, end.round_number, len(others), *totals)


# -- the end of a round ----------------------------------------------------------------------------


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 7), st.sampled_from([0, 400_000_000, 50_000_000]), st.integers(1, 4))
def test_a_round_that_is_ended_after_any_packet_leaves_what_it_did_not_send_dirty(
    packets_before: int, rate: int, repeats: int
) -> None:
    content = noise(3000) + bytes(500 * PAGE_SIZE) + text(500)

    async def scenario() -> dict[int, bytes]:
        with ram(content, page_count=PAGES) as block:
            async with sender(block, unread_packets_max=2) as rig:
                rig.dirty.set_data()
                rig.budget.rate_bytes_per_s = rate
                rig.worker.order(wire.SendRound(1))
                first: dict[int, bytes] = {}
                taken: list[wire.Packet] = []
                for _ in range(packets_before):
                    packet, payload = await rig.packet()
                    if packet.kind is wire.PacketKind.PAGES:
                        taken.append(packet)
                        first |= pages_of(packet, payload)
                    if packet.kind is wire.PacketKind.ROUND_END:
                        raise AssertionError("too few packets for this test")
                for _ in range(repeats):
                    rig.worker.order(wire.EndRound())
                packets, sent = await rest_of_round(rig, 1)
                check_end(rig, [*taken, *packets])
                sent |= first
                left = marked(rig.dirty[0])
                assert left == set(range(4000)) - sent.keys()
                assert marked(rig.in_flight[0]) == sent.keys()
                rig.budget.rate_bytes_per_s = 0
                rig.worker.order(wire.SendRound(2))
                packets, rest = await rest_of_round(rig, 2)
                check_end(rig, packets)
                assert rest.keys() == left
                return sent | rest

    sent = asyncio.run(scenario())
    assert sent == {
        page: content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] for page in range(4000)
    }


def test_an_end_without_a_round_is_nothing() -> None:
    async def scenario() -> int:
        with ram(noise(64)) as block:
            async with sender(block) as rig:
                rig.dirty.set_data()
                rig.worker.order(wire.EndRound())
                rig.worker.order(wire.SendRound(1))
                _, sent = await rest_of_round(rig, 1)
                rig.worker.order(wire.EndRound())
                rig.worker.order(wire.SendRound(2))
                await rest_of_round(rig, 2)
                assert len(rig.heard.of(wire.RoundSent)) == 2
                return len(sent)

    assert asyncio.run(scenario()) == 64


def test_an_end_in_a_wait_for_bandwidth_ends_the_wait_and_what_was_taken_goes() -> None:
    async def scenario() -> tuple[set[int], set[int]]:
        with ram(noise(256)) as block:
            async with sender(block) as rig:
                rig.dirty.set_data()
                before = await waiting_for_bandwidth(rig)  # a minute for 16 pages
                rig.worker.order(wire.EndRound())
                packets, sent = await rest_of_round(rig, 1)
                check_end(rig, [before, *packets])
                return sent.keys() | page_numbers(runs_of(before)), marked(rig.dirty[0])

    sent, left = asyncio.run(scenario())
    assert sent == set(range(32))
    assert left == set(range(32, 256))


def test_an_end_in_a_wait_for_room_is_heard_before_there_is_any() -> None:
    async def scenario() -> int:
        with ram(noise(32 * HUGE)) as block:
            async with sender(block, unread_packets_max=1) as rig:
                rig.dirty.set_data()
                rig.worker.order(wire.SendRound(1))
                before = -1
                while before != rig.progress[Count.PACKETS]:  # nobody reads: it fills up
                    before = rig.progress[Count.PACKETS]
                    await asyncio.sleep(0.2)
                rig.worker.order(wire.EndRound())
                packets, sent = await rest_of_round(rig, 1)
                check_end(rig, packets)
                assert marked(rig.dirty[0]) == set(range(32 * HUGE)) - sent.keys()
                return len(packets)

    assert asyncio.run(scenario()) < 32


# -- postcopy --------------------------------------------------------------------------------------


def test_a_round_goes_on_where_the_guest_is_and_leaves_nothing() -> None:
    async def scenario() -> list[tuple[int, int]]:
        with ram(noise(PAGES)) as block:
            async with sender(block) as rig:
                with following(rig) as demands:
                    rig.dirty.set_data()
                    demand(demands, 1000)
                    first = await waiting_for_bandwidth(rig)
                    # the next batch is taken already
                    demand(demands, 3000)
                    rig.budget.rate_bytes_per_s = 1_000_000_000
                    packets, sent = await rest_of_round(rig, 1)
                    check_end(rig, [first, *packets])
                    assert sent.keys() | page_numbers(runs_of(first)) == set(range(PAGES))
                    assert rig.dirty.count() == 0
                    return [runs_of(packet)[0] for packet in (first, *packets[:2])]

    first, second, third = asyncio.run(scenario())
    assert first == (1000, 16)
    assert second == (1016, 16)
    assert third[0] == 3000


def test_nothing_is_taken_for_known_in_postcopy_whatever_the_order_says() -> None:
    """Deltas and elision would speak of pages that the guest may have changed."""
    compress = wire.Compress("none", xbzrle_cache_bytes=16 << 20, elide="on")
    content = text(600)

    async def scenario() -> None:
        with ram(content) as block:
            async with sender(block) as rig:
                rig.worker.order(compress)
                for number in (1, 2, 3):
                    rig.dirty.set_data()
                    rig.worker.order(wire.SendRound(number))
                    _, sent = await rest_of_round(rig, number)
                    assert (len(sent) < 600) == (number > 1)  # the test can fail
                before = {count: rig.progress[count] for count in Count}
                with following(rig):
                    rig.worker.order(compress)
                    for number in (4, 5, 6):
                        rig.dirty.set_data()
                        rig.worker.order(wire.SendRound(number))
                        packets, sent = await rest_of_round(rig, number)
                        assert b"".join(sent[page] for page in range(600)) == content
                        assert {packet.kind for packet in packets[:-1]} == {wire.PacketKind.PAGES}
                for count in (Count.DELTA_HITS, Count.DELTA_MISSES, Count.ELIDED_PAGES):
                    assert rig.progress[count] == before[count]

    asyncio.run(scenario())


def test_a_lost_channel_is_made_anew_and_the_guest_followed_still() -> None:
    async def scenario() -> None:
        with ram(noise(PAGES)) as block:
            async with sender(block) as rig:
                with following(rig) as demands:
                    rig.dirty.set_data()
                    demand(demands, 2000)
                    await waiting_for_bandwidth(rig)
                    rig.worker.order(wire.OpenChannel(rig.endpoint, 2))
                    await rig.heard.next(wire.Opened, 2)
                    rig.in_flight.move_to(rig.dirty)
                    rig.budget.rate_bytes_per_s = 0
                    rig.worker.order(wire.SendRound(1))
                    while (packet := (await rig.packet())[0]).incarnation != 2:
                        pass
                    packets, sent = await rest_of_round(rig, 1)
                    assert packet.kind is wire.PacketKind.OPEN
                    assert runs_of(packets[0])[0][0] == 2000
                    assert sent.keys() == set(range(PAGES))

    asyncio.run(scenario())


def test_every_thread_of_a_sender_gives_way() -> None:
    async def scenario() -> set[int]:
        with ram(noise(16)) as block:
            async with sender(block) as rig:
                with following(rig):
                    rig.worker.order(wire.SendRound(1))
                    await rest_of_round(rig, 1)
                    threads = Path(f"/proc/{rig.worker.pid}/task").iterdir()
                    return {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads}

    assert asyncio.run(scenario()) == {BACKGROUND_NICE}


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("rate", [0, 100_000_000])
def test_huge_pages_go_whole_however_little_of_them_is_dirty(codec: str, rate: int) -> None:
    """As when the page service took some of their bits; one is zero, one is clean."""
    content = text(HUGE) + noise(HUGE) + bytes(HUGE * PAGE_SIZE) + noise(HUGE, 2)

    async def scenario() -> dict[int, bytes]:
        with ram(content, hugetlb=True) as block:
            async with sender(block) as rig:
                rig.budget.rate_bytes_per_s = rate
                rig.worker.order(wire.Compress(codec))
                with following(rig):
                    for first, count in ((5, 1), (511, 2), (1030, 300)):
                        _native.bitmap_set_range(rig.dirty[0], first, count)
                    rig.worker.order(wire.SendRound(1))
                    packets, sent = await rest_of_round(rig, 1)
                    check_end(rig, packets)
                    assert [packet.zero_pages for packet in packets[:3]] == [0, 0, HUGE]
                    for packet in packets[:-1]:
                        _native.packet_runs_check(
                            packet.data_runs, packet.plane_runs, packet.encoded_runs,
                            packet.gathered_runs,
                            packet.zero_runs, block.page_count, HUGE,
                        )  # fmt: skip
                    assert (packets[0].encoded_runs == 1) == (codec == "zstd")
                    assert rig.dirty.count() == 0
                    return sent

    sent = asyncio.run(scenario())
    assert b"".join(sent[page] for page in sorted(sent)) == content[: 3 * HUGE * PAGE_SIZE]
