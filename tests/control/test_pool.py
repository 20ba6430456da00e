"""Pools of workers: what dies while nobody needs it is replaced, and nobody is told."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from engine.control.pool import Pool, Worker, receiver_pool

pytestmark = pytest.mark.process


async def killed(worker: Worker[Any]) -> None:
    """kill -9, until control has noticed."""
    os.kill(worker.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while worker.is_alive:
            await asyncio.sleep(0.005)


def test_idle_workers_that_die_or_are_ended_make_no_noise_and_are_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> tuple[int, bool]:
        pool = receiver_pool()
        try:
            pool.warm(2)
            for worker in tuple(pool._idle):
                await killed(worker)
            taken = pool.take(0)
            pool.warm(2)
            alive = sum(worker.is_alive for worker in pool._idle)
            is_alive = taken.is_alive
            await taken.end()
            return alive, is_alive
        finally:
            await pool.close()

    with caplog.at_level("INFO"):
        assert asyncio.run(scenario()) == (2, True)
    assert caplog.messages == []


def test_a_worker_that_dies_in_use_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> int:
        pool: Pool[object] = Pool("receiver", object)
        taken = pool.take(3)
        await killed(taken)
        await taken.end()
        return taken.pid

    pid = asyncio.run(scenario())
    assert caplog.messages == [f"receiver 3 (pid {pid}): the process died"]
