"""The search for data, which goes on while the first round is sent: no page is left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest

from engine import wire
from engine.control.agreement import Agreement
from engine.control.pool import Pool
from engine.control.senders import SenderGroup
from engine.control.statistics import MigrationNumbers
from engine.memory.blocks import PAGE_SIZE
from engine.memory.pieces import whole_piece
from engine.memory.tracking import TrackerName, Tracking
from engine.multifd.progress import Count
from tests.control.senders_rig import PAGES, PlayedWorker, ram_block, settle


@dataclass
class Search:
    """A group of one lane whose search for data goes on when the test says."""

    group: SenderGroup
    worker: PlayedWorker
    may_look: threading.Event = field(default_factory=threading.Event)
    fails_with: OSError | None = None


@asynccontextmanager
async def searching(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Search]:
    block, worker = ram_block(), PlayedWorker()
    pool = cast(Pool[wire.SenderReport], SimpleNamespace(take=lambda _index: worker))
    group = SenderGroup(
        [block], pool, b"s" * 16, Agreement(["tcp://127.0.0.1:1"], ()), lambda *_: None
    )
    set_data, search = group.dirty.set_data, Search(group, worker)

    def look() -> int:
        assert search.may_look.wait(60)
        if search.fails_with is not None:
            raise search.fails_with
        return set_data()

    monkeypatch.setattr(group.dirty, "set_data", look)
    tracking = Tracking(
        TrackerName.UFFD, "a test", (block.fd,), (whole_piece(0, PAGE_SIZE, block.size),)
    )
    try:
        start = asyncio.ensure_future(group.start(tracking, detect_zero=True))
        await settle()
        worker.on_report(wire.Opened(1))
        await start
        yield search
    finally:
        search.may_look.set()
        await group.end()
        os.close(block.fd)


def test_a_round_that_overtakes_the_search_for_data_ends_with_it_and_leaves_the_rest_dirty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> tuple[bool, int]:
        async with searching(monkeypatch) as search:
            sent = asyncio.ensure_future(search.group.send_round(1))
            await settle()
            search.worker.on_report(wire.RoundSent(1, 1, 0, 0, 0, 0))
            search.group.received(wire.RoundReceived(0, 1, 1, 0, 0, 0, 0))
            await settle()
            was_over = sent.done()
            search.may_look.set()
            await sent
            return was_over, search.group.dirty.count()

    assert asyncio.run(scenario()) == (False, PAGES)


def test_nothing_is_collected_before_all_data_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> tuple[list[str], list[str]]:
        async with searching(monkeypatch) as search:
            harvest = asyncio.ensure_future(search.group.harvest(1))
            await settle()
            before = search.worker.kinds()
            search.may_look.set()
            await search.group.all_found()
            await settle()
            search.worker.on_report(wire.Harvested(1, PAGES, 0))
            await harvest
            return before, search.worker.kinds()[len(before) :]

    assert asyncio.run(scenario()) == (["PrepareSender", "Compress"], ["Harvest"])


def test_what_may_remain_is_told_as_long_as_data_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> list[int]:
        async with searching(monkeypatch) as search:
            numbers, told = MigrationNumbers(0), []
            search.group.lanes[0].progress.add(Count.PAGES, 5)
            search.group.lanes[0].progress.add(Count.ZERO_PAGES, 2)
            for may_look in (False, True):
                if may_look:
                    search.may_look.set()
                    await search.group.all_found()
                search.group.count_up(numbers)
                told.append(numbers.remaining_bytes // PAGE_SIZE)
            return told

    assert asyncio.run(scenario()) == [PAGES - 7, PAGES]


def test_a_search_for_data_ends_before_anything_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> bool:
        async with searching(monkeypatch) as search:
            end = asyncio.ensure_future(search.group.end())
            await settle()
            has_ended = end.done()
            search.may_look.set()
            await end
            return has_ended

    assert asyncio.run(scenario()) is False


def test_memory_that_cannot_be_looked_at_fails_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with searching(monkeypatch) as search:
            sent = asyncio.ensure_future(search.group.send_round(1))
            await settle()
            search.worker.on_report(wire.RoundSent(1, 1, 0, 0, 0, 0))
            search.group.received(wire.RoundReceived(0, 1, 1, 0, 0, 0, 0))
            search.fails_with = OSError(errno.EIO, "torn")
            search.may_look.set()
            await sent

    with pytest.raises(OSError, match="torn"):
        asyncio.run(scenario())
