"""The fault service as control sees it, with workers that a test plays."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from engine import wire
from engine.control.pool import Pool
from engine.control.postcopy import faultservice
from engine.control.postcopy.faultservice import FaultService
from engine.errors import WorkerLost
from engine.guest.base import Missing
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import RamBlock
from engine.postcopy.statistics import FaultStatistics
from tests.control.postcopy.played import PlayedPool, PlayedWorker, ram, silent

HERE, THERE = "tcp://127.0.0.1:5", "tcp://127.0.0.1:6"
DEADLINE_S = 60.0


def made(pool: PlayedPool, block: RamBlock, told: list[str] | None = None) -> FaultService:
    missing, moved = Missing((0,), (0,), 1), ([] if told is None else told).append
    played = cast("Pool[wire.FaultsReport]", pool)
    return FaultService(played, bytes(16), [block], missing, moved, prefetch_pages_max=0)


def listens(order: wire.Message) -> wire.Message | None:
    """It listens where it shall."""
    if isinstance(order, wire.PrepareFaults | wire.ListenFaults):
        return wire.Ready(order.bind)
    return None


def only_at_first(order: wire.Message) -> wire.Message | None:
    return listens(order) if isinstance(order, wire.PrepareFaults) else None


@pytest.mark.parametrize("step", ["received", "stale", "statistics", "filling"])
def test_one_that_cannot_be_made_leaves_no_descriptors(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    create = PageBitmaps.create

    def full(*args: Any) -> Any:
        if args[:1] == (step,) or step in ("statistics", "filling"):
            raise OSError(errno.EMFILE, "Too many open files")
        return create(*args)

    match step:
        case "statistics":
            monkeypatch.setattr(FaultStatistics, "create", full)
        case "filling":
            monkeypatch.setattr(PageBitmaps, "fill", full)
        case _:
            monkeypatch.setattr(PageBitmaps, "create", full)
    with ram() as block:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="Too many"):
            made(PlayedPool(), block)
        assert sorted(os.listdir("/proc/self/fd")) == before


@contextlib.asynccontextmanager
async def started(
    monkeypatch: pytest.MonkeyPatch, pool: PlayedPool, told: list[str]
) -> AsyncIterator[FaultService]:
    """One that listens HERE, and waits for nobody long."""
    monkeypatch.setattr(faultservice, "REPORT_WAIT_S", 0.2)
    monkeypatch.setattr(faultservice, "RESTART_PAUSE_S", 0.01)
    with ram() as block:
        service = made(pool, block, told)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await service.start(HERE)
                yield service
        finally:
            await service.end()


async def until_told(told: list[str]) -> None:
    while not told:
        await asyncio.sleep(0.005)


def test_a_successor_that_hangs_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        told: list[str] = []
        first, hung, good = PlayedWorker(listens), PlayedWorker(silent), PlayedWorker(listens)
        async with started(monkeypatch, PlayedPool(first, hung, good), told) as service:
            first.give_up("killed")
            assert service.endpoint == ""
            await until_told(told)
            assert (told, hung.is_alive, good.is_alive) == ([HERE], False, True)
            assert await service.where() == HERE

    asyncio.run(scenario())


def test_a_successor_that_dies_as_it_begins_is_replaced_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        told: list[str] = []

        def listens_and_dies() -> None:
            short.report(wire.Ready(HERE))
            short.give_up("killed")

        def dies(_: wire.Message) -> None:
            asyncio.get_running_loop().call_soon(listens_and_dies)

        first, short, good = PlayedWorker(listens), PlayedWorker(dies), PlayedWorker(listens)
        async with started(monkeypatch, PlayedPool(first, short, good), told) as service:
            first.give_up("killed")
            await until_told(told)
            assert (told, good.orders != []) == ([HERE], True)
            assert await service.where() == HERE

    asyncio.run(scenario())


def test_one_that_does_not_listen_elsewhere_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        told: list[str] = []
        hung, good = PlayedWorker(only_at_first), PlayedWorker(listens)
        async with started(monkeypatch, PlayedPool(hung, good), told) as service:
            with pytest.raises(TimeoutError):
                await service.listen(THERE)
            assert await service.listen(THERE) == THERE
            assert (told, hung.is_alive, good.is_alive) == ([THERE], False, True)

    asyncio.run(scenario())


async def left_alone(service: FaultService, hung: PlayedWorker) -> None:
    """It is told to listen THERE, and nobody waits for its answer."""
    listening = asyncio.ensure_future(service.listen(THERE))
    while wire.ListenFaults(THERE) not in hung.orders:
        await asyncio.sleep(0)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    assert listening.cancelled()
    assert not hung.is_alive


def test_an_answer_that_nobody_waits_for_is_not_taken_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        told: list[str] = []
        hung, good = PlayedWorker(only_at_first), PlayedWorker(listens)
        async with started(monkeypatch, PlayedPool(hung, good), told) as service:
            await left_alone(service, hung)
            await until_told(told)
            assert told == [THERE]
            assert await service.listen(HERE) == HERE
            assert good.orders[-1] == wire.ListenFaults(HERE)

    asyncio.run(scenario())


def test_one_that_ends_as_nobody_waits_any_more_begins_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        hung, good = PlayedWorker(only_at_first), PlayedWorker(listens)
        pool = PlayedPool(hung, good)
        async with started(monkeypatch, pool, []) as service:
            await left_alone(service, hung)
            await service.end()
            for _ in range(10):
                await asyncio.sleep(0)
            assert (pool.tries, good.orders) == (1, [])

    asyncio.run(scenario())


def test_one_that_cannot_be_restarted_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        told: list[str] = []
        first, good = PlayedWorker(listens), PlayedWorker(listens)
        pool = PlayedPool(first)
        async with started(monkeypatch, pool, told) as service:
            first.give_up("killed")
            with pytest.raises(WorkerLost):
                await service.listen(THERE)
            with pytest.raises(WorkerLost):
                await service.where()
            assert 2 < pool.tries < 200  # and it pauses between them
            pool.workers.append(good)
            assert await service.listen(THERE) == THERE
            assert told == [THERE]

    asyncio.run(scenario())
