"""The senders as one group, with workers that a test plays: nothing forgotten, nothing twice."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from engine import _native, wire
from engine.control import senders, watch
from engine.control.agreement import Agreement
from engine.control.lane import HarvestTotals
from engine.control.pool import Pool
from engine.control.senders import SenderGroup
from engine.errors import MemoryRefused, MigrationError, WireError, WorkerLost
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.pieces import whole_piece
from engine.memory.tracking import TrackerName, Tracking
from engine.multifd.progress import Count, Progress
from tests.control.senders_rig import PAGES, Played, PlayedWorker, played, ram_block, settle
from tests.support import open_descriptors


def test_a_worker_that_lives_gets_no_harvest_twice() -> None:
    async def scenario() -> list[str]:
        async with played() as rig:
            await rig.break_channel()
            harvest = await rig.run(rig.group.harvest(1))
            rig.worker.on_report(wire.Opened(2))
            await settle()
            rig.worker.on_report(wire.Harvested(1, 0, 0))
            await harvest
            return rig.worker.kinds()

    orders = asyncio.run(scenario())
    assert orders == ["PrepareSender", "Compress", "SendRound", "OpenChannel", "Harvest"]


def test_a_peek_is_one_for_the_sender_too() -> None:
    async def scenario() -> list[wire.Message]:
        async with played() as rig:
            for number, is_peek in ((1, True), (2, False)):
                harvest = await rig.run(rig.group.harvest(number, is_peek=is_peek))
                rig.worker.on_report(wire.Harvested(number, 0, 0))
                await harvest
            return rig.worker.orders[-2:]

    assert asyncio.run(scenario()) == [wire.Harvest(1, is_peek=True), wire.Harvest(2)]


def test_a_worker_that_dies_in_a_harvest_makes_its_slice_dirty_and_the_next_harvests_again() -> (
    None
):
    async def scenario() -> tuple[HarvestTotals, list[str], int]:
        async with played() as rig:
            harvest = await rig.run(rig.group.harvest(1))
            rig.worker.die()
            await settle()
            rig.worker.on_report(wire.Opened(2))
            rig.worker.on_report(wire.Harvested(1, PAGES, 3))
            return await harvest, rig.worker.kinds(), rig.group.dirty.count()

    totals, orders, dirty = asyncio.run(scenario())
    assert totals == HarvestTotals(PAGES, 3)
    assert orders == ["PrepareSender", "Compress", "Harvest"]
    assert dirty == PAGES


def test_a_harvest_that_control_no_longer_waits_for_still_counts_when_its_worker_dies() -> None:
    async def scenario() -> int:
        async with played() as rig:
            forgotten = await rig.run(rig.group.harvest(1))
            forgotten.cancel()
            harvest = await rig.run(rig.group.harvest(2))
            rig.worker.on_report(wire.Harvested(2, 0, 0))  # as if only the newer was answered
            await harvest
            rig.worker.die()
            await settle()
            return rig.group.dirty.count()

    assert asyncio.run(scenario()) == PAGES


def test_a_worker_that_dies_with_all_its_harvests_answered_costs_nothing() -> None:
    async def scenario() -> int:
        async with played() as rig:
            harvest = await rig.run(rig.group.harvest(1))
            rig.worker.on_report(wire.Harvested(1, 0, 0))
            await harvest
            rig.worker.die()
            await settle()
            rig.worker.on_report(wire.Opened(2))
            return rig.group.dirty.count()

    assert asyncio.run(scenario()) == 0


def test_a_round_that_begins_in_the_instant_of_opening_is_ordered_once() -> None:
    async def scenario() -> list[str]:
        async with played() as rig:
            await rig.break_channel()
            rig.worker.on_report(wire.Opened(2))  # and the heal has not run on yet
            await rig.run(rig.group.send_round(2))
            return rig.worker.kinds()

    orders = asyncio.run(scenario())
    assert orders == ["PrepareSender", "Compress", "SendRound", "OpenChannel", "SendRound"]


def test_all_data_is_found_beside_the_loop_and_before_anything_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_look = threading.Event()
    found: list[int] = []

    async def scenario() -> tuple[bool, bool]:
        block, worker = ram_block(), PlayedWorker()
        pool = cast(Pool[wire.SenderReport], SimpleNamespace(take=lambda _index: worker))
        group = SenderGroup(
            [block], pool, b"s" * 16, Agreement(["tcp://127.0.0.1:1"], ()), lambda *_: None
        )
        set_data = group.dirty.set_data

        def look() -> None:
            may_look.wait(60)
            found.append(set_data())

        monkeypatch.setattr(group.dirty, "set_data", look)
        piece = whole_piece(0, PAGE_SIZE, block.size)
        tracking = Tracking(TrackerName.UFFD, "a test", (block.fd,), (piece,))
        start = asyncio.ensure_future(group.start(tracking, detect_zero=True))
        await settle()
        worker.on_report(wire.Opened(1))
        await settle()
        has_started = start.done()
        start.cancel()
        end = asyncio.ensure_future(group.end())
        await settle()
        has_ended = end.done()
        may_look.set()
        await end
        os.close(block.fd)
        return has_started, has_ended

    try:
        assert asyncio.run(scenario()) == (False, False)
        assert found == [PAGES]
    finally:
        may_look.set()


def test_what_was_lost_is_dirty_before_the_round_is_ordered_again() -> None:
    async def scenario() -> tuple[list[wire.Message], int, int]:
        async with played() as rig:
            rig.group.dirty.set_data()
            await rig.run(rig.group.send_round(2))
            _native.bitmap_set_range(rig.group.in_flight[0], 0, 10)
            _native.bitmap_clear_slice(rig.group.dirty[0], (PAGES, 64, 0, 1))
            await rig.break_channel()
            rig.worker.on_report(wire.Opened(2))
            return rig.worker.orders, rig.group.dirty.count(), rig.group.in_flight.count()

    orders, dirty, in_flight = asyncio.run(scenario())
    assert orders[3:] == [
        wire.SendRound(2),
        wire.OpenChannel("tcp://127.0.0.1:1", 2),
        wire.SendRound(2),
    ]
    assert (dirty, in_flight) == (10, 0)


def test_a_lane_that_is_lost_after_its_part_was_acknowledged_sends_nothing_again() -> None:
    async def scenario() -> list[str]:
        async with played() as rig:
            await rig.break_channel()
            rig.worker.on_report(wire.Opened(2))
            await settle()
            return rig.worker.kinds()

    assert asyncio.run(scenario()) == ["PrepareSender", "Compress", "SendRound", "OpenChannel"]


@pytest.mark.parametrize(
    ("process", "is_gone", "says"),
    [
        pytest.param(0, True, r"^the guest has ended or replaced its program, and", id="gone"),
        pytest.param(0, False, r"^memory of the guest .* mapped anew", id="mapped-anew"),
    ],
)
def test_what_no_other_worker_would_find_out_makes_no_lane_anew(
    process: int, is_gone: bool, says: str
) -> None:
    async def scenario() -> tuple[str, int]:
        async with played() as rig:
            harvest = await rig.run(rig.group.harvest(1))
            rig.worker.on_report(wire.TrackerLost(process, is_gone))
            rig.worker.die()
            with pytest.raises(MemoryRefused) as lost:
                await harvest
            return str(lost.value), len(rig.heals)

    reason, heals = asyncio.run(scenario())
    assert re.search(says, reason)
    assert heals == 0


def test_totals_of_another_round_are_not_believed() -> None:
    async def scenario() -> bool:
        async with played() as rig:
            await rig.run(rig.group.send_round(2))
            rig.worker.on_report(wire.RoundSent(1, 1, 1, 0, 0, 0))
            rig.group.received(wire.RoundReceived(0, 1, 2, 1, 0, 0, 0))
            return bool(rig.lane.round_due) and rig.lane.sent is None

    assert asyncio.run(scenario())


def test_a_harvest_during_a_round_and_a_heal_during_both_lose_nothing() -> None:
    """Pages 0-9 are in flight, 10-19 dirty; 3 and 30 are found; then the channel is lost."""

    async def scenario() -> tuple[HarvestTotals, list[str], int, int]:
        async with played() as rig:
            group = rig.group
            _native.bitmap_set_range(group.dirty[0], 10, 10)
            _native.bitmap_set_range(group.in_flight[0], 0, 10)
            round_ = await rig.run(group.send_round(2))
            harvest = await rig.run(group.harvest(1))
            await rig.break_channel()
            for page in (3, 30):
                _native.bitmap_set_range(group.dirty[0], page, 1)
            rig.worker.on_report(wire.Harvested(1, 12, 2))
            totals = await harvest
            orders = rig.worker.kinds()
            rig.worker.on_report(wire.Opened(2))
            dirty = group.dirty.count()
            rig.finish_round(2, dirty)
            await round_
            orders += rig.worker.kinds()[len(orders) :]
            return totals, orders, dirty, group.delivered.count()

    totals, orders, dirty, delivered = asyncio.run(scenario())
    assert totals == HarvestTotals(12 + 10, 2)  # in flight on a lost lane counts as dirty
    assert orders == [
        "PrepareSender", "Compress", "SendRound", "SendRound", "Harvest", "OpenChannel",
        "SendRound",
    ]  # fmt: skip
    assert dirty == 21
    assert delivered == PAGES


def test_pages_that_come_back_after_the_lanes_answer_are_counted() -> None:
    async def scenario() -> HarvestTotals:
        async with played() as rig:
            _native.bitmap_set_range(rig.group.in_flight[0], 0, 10)
            harvest = await rig.run(rig.group.harvest(1))
            await rig.break_channel()
            rig.worker.on_report(wire.Harvested(1, 0, 0))
            rig.worker.on_report(wire.Opened(2))
            totals: HarvestTotals = await harvest
            return totals

    assert asyncio.run(scenario()) == HarvestTotals(10, 0)


@pytest.mark.parametrize("where", ["dirty", "in_flight"])
def test_a_page_left_after_the_last_round_is_an_error_that_counts(where: str) -> None:
    async def scenario() -> None:
        async with played() as rig:
            rig.group.check_all_delivered()
            _native.bitmap_set_range(getattr(rig.group, where)[0], 7, 2)
            rig.group.check_all_delivered()

    counts = "2 pages are dirty and 0" if where == "dirty" else "0 pages are dirty and 2"
    with pytest.raises(MigrationError, match=counts):
        asyncio.run(scenario())


class EndOfTest(Exception):
    """So far it must come."""


class Clock:
    """Time that passes when the group waits for news, with something happening at each wait."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, rig: Played, each_wait: Callable[[int], None]
    ) -> None:
        self.now_ns, self._waits, self._each_wait = 0, 0, each_wait
        clock = SimpleNamespace(monotonic_ns=lambda: self.now_ns)
        for module in (senders, watch):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(rig.group, "_news", self._news)

    async def _news(self) -> None:
        await asyncio.sleep(0)
        self.now_ns += 15_000_000_000
        self._waits += 1
        self._each_wait(self._waits)


def test_a_harvest_may_take_as_long_as_it_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> HarvestTotals:
        async with played() as rig:

            def get_on(waits: int) -> None:
                rig.lane.progress.add(Count.HARVEST_PAGES, 1)
                if waits == 100:
                    rig.worker.on_report(wire.Harvested(1, 5, 5))

            Clock(monkeypatch, rig, get_on)
            return await rig.group.harvest(1)

    assert asyncio.run(scenario()) == HarvestTotals(5, 5)


def test_a_harvest_that_does_not_get_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with played() as rig:
            Clock(monkeypatch, rig, lambda _waits: None)
            await rig.group.harvest(1)

    with pytest.raises(WorkerLost, match="no answer while collecting dirty pages"):
        asyncio.run(scenario())


def test_short_harvests_do_not_hide_that_no_byte_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with played() as rig:
            rig.group.dirty.set_data()
            Clock(monkeypatch, rig, lambda _: rig.lane.progress.add(Count.HARVEST_PAGES, PAGES))
            await rig.group.send_round(2)

    with pytest.raises(MigrationError, match="no byte moved"):
        asyncio.run(scenario())


@pytest.mark.parametrize("count", [Count.ELIDED_PAGES, Count.DELTA_UNCHANGED])
def test_a_round_may_go_on_as_long_as_it_finds_pages_unchanged(
    count: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with played() as rig:
            rig.group.dirty.set_data()

            def get_on(waits: int) -> None:
                rig.lane.progress.add(count, 512)
                if waits == 100:
                    raise EndOfTest

            Clock(monkeypatch, rig, get_on)
            await rig.group.send_round(2)

    with pytest.raises(EndOfTest):
        asyncio.run(scenario())


def test_a_group_that_cannot_be_made_keeps_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    create = Progress.create

    def fail_at_the_third() -> Progress:
        nonlocal made
        made += 1
        if made == 3:
            raise OSError(24, "Too many open files")
        return create()

    monkeypatch.setattr(Progress, "create", fail_at_the_third)
    block = ram_block()
    before = open_descriptors()
    pool = cast(Pool[wire.SenderReport], None)

    with pytest.raises(OSError, match="Too many"):
        SenderGroup(
            [block], pool, b"s" * 16, Agreement(["a", "b", "c"], ()), lambda _index, _reason: None
        )

    assert open_descriptors() == before
    os.close(block.fd)


@pytest.mark.parametrize("may_postcopy", [False, True])
def test_senders_are_told_whether_a_guest_may_wait_for_pages(may_postcopy: bool) -> None:
    async def scenario() -> list[bool]:
        async with played(may_postcopy=may_postcopy) as rig:
            orders = [one for one in rig.worker.orders if isinstance(one, wire.PrepareSender)]
            return [one.may_postcopy for one in orders]

    assert asyncio.run(scenario()) == [may_postcopy]


def test_more_blocks_than_one_order_can_carry_are_refused_in_one_line() -> None:
    block = ram_block()
    blocks = [RamBlock(f"ram{i}", block.size, block.fd) for i in range(wire.BLOCKS_MAX + 1)]
    pool = cast(Pool[wire.SenderReport], None)

    with pytest.raises(WireError, match=r"^a guest of 124 RAM blocks; 1 to 123 can be migrated$"):
        SenderGroup(blocks, pool, b"s" * 16, Agreement(["a"], ()), lambda _index, _reason: None)

    os.close(block.fd)
