"""The page service as control sees it, with workers that a test plays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

import pytest

from engine import wire
from engine.control.pool import Pool
from engine.control.postcopy import pageservice
from engine.control.postcopy.pageservice import PageService
from engine.memory.bitmaps import PageBitmaps
from engine.postcopy.statistics import PageStatistics
from tests.control.postcopy.played import PlayedPool, PlayedWorker, ram, silent

HERE, THERE = "tcp://127.0.0.1:5", "tcp://127.0.0.1:6"
DEADLINE_S = (
    10.0  #: shorter than what a worker may take to answer: a test that waits for that fails
)


@dataclass
class Made:
    service: PageService
    dirty: PageBitmaps
    failures: list[str] = field(default_factory=list)

    async def until_open(self) -> None:
        while not self.service.is_open:
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def made(*workers: PlayedWorker) -> AsyncIterator[Made]:
    with ram() as block, contextlib.ExitStack() as stack:
        statistics = PageStatistics.create()
        stack.callback(statistics.close)
        dirty = PageBitmaps.create("dirty", [block])
        stack.callback(dirty.close)
        pool, failures = cast("Pool[wire.PagesReport]", PlayedPool(*workers)), list[str]()
        service = PageService(pool, bytes(16), [block], statistics, failures.append)
        try:
            async with asyncio.timeout(DEADLINE_S):
                yield Made(service, dirty, failures)
        finally:
            await service.stop()


def opens(order: wire.Message) -> wire.Message:
    assert isinstance(order, wire.PreparePages | wire.OpenFaultChannel)
    return wire.FaultChannelOpened(order.incarnation)


@pytest.mark.parametrize("endpoint", [HERE, THERE])
def test_a_fault_service_that_moves_as_the_channel_opens_is_followed_at_once(
    endpoint: str,
) -> None:
    """Its successor may listen at the same port, and be reached before it says so."""

    async def scenario() -> None:
        worker = PlayedWorker(silent)
        async with made(worker) as one:
            starting = asyncio.ensure_future(one.service.start(HERE, one.dirty))
            while not worker.orders:
                await asyncio.sleep(0)
            worker.answers = opens
            worker.report(wire.FaultChannelOpened(1))
            one.service.move(endpoint)  # in the same turn of the loop
            await starting
            last = worker.orders[-1]
            assert (one.service.is_open, last.endpoint, last.incarnation) == (True, endpoint, 2)
            assert len(worker.orders) == 2
            assert one.failures == []

    asyncio.run(scenario())


def test_a_fault_service_that_moves_while_a_try_waits_is_followed_at_once() -> None:
    async def scenario() -> None:
        worker = PlayedWorker(opens)
        async with made(worker) as one:
            await one.service.start(HERE, one.dirty)
            worker.answers = silent
            worker.report(wire.FaultChannelBroken(1, "cut"))
            while len(worker.orders) < 2:
                await asyncio.sleep(0)
            worker.answers = opens
            one.service.move(THERE)
            await one.until_open()
            assert [order.endpoint for order in worker.orders] == [HERE, HERE, THERE]
            worker.report(wire.FaultChannelBroken(2, "late"))  # of the try that was given up
            assert one.service.is_open

    asyncio.run(scenario())


def test_a_move_when_the_start_is_done_but_has_not_been_told_so_is_no_failure() -> None:
    async def scenario() -> None:
        worker = PlayedWorker(opens)
        async with made(worker) as one:
            starting = asyncio.ensure_future(one.service.start(HERE, one.dirty))
            while not (one.service._mending and one.service._mending.done()):
                await asyncio.sleep(0)
            one.service.move(THERE)
            await starting
            assert (one.service.is_open, worker.orders[-1].endpoint) == (True, THERE)

    asyncio.run(scenario())


def test_a_page_service_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pageservice, "REPORT_WAIT_S", 0.1)

    async def scenario() -> None:
        hung, good = PlayedWorker(opens), PlayedWorker(opens)
        async with made(hung, good) as one:
            await one.service.start(HERE, one.dirty)
            hung.answers = silent
            hung.report(wire.FaultChannelBroken(1, "cut"))
            await one.until_open()
            assert (len(hung.orders), hung.is_alive, good.is_alive) == (2, False, True)
            assert [order.incarnation for order in good.orders] == [3]

    asyncio.run(scenario())
