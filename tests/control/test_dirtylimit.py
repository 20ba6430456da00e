"""The dirty limit: it holds its vCPU and no other, and is refused as QEMU refuses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import engine
from engine.control.dirtylimit import DirtyLimit
from engine.errors import UsageError
from engine.guest.base import VcpuDirtied

pytestmark = pytest.mark.process

GUEST = "workload:size=256M,pattern=sweep,rate=0,vcpus=2"
LIMIT_MIB = 8


async def until(fact: Callable[[], Any]) -> Any:
    """What `fact` says when that is true."""
    async with asyncio.timeout(60):
        while not (said := await fact()):
            await asyncio.sleep(0.05)
        return said


async def refusal(control: engine.Control, command: str, **arguments: Any) -> str:
    with pytest.raises(engine.UsageError) as refused:
        await control.execute(command, **arguments)
    return str(refused.value)


async def vcpu_rates(control: engine.Control) -> list[int]:
    """MiB/s of each vCPU, measured over three seconds: a vCPU makes up for 0.1 s in which it got no
    CPU, and what the measurement is late by adds to that."""
    await control.execute("calc-dirty-rate", **{"mode": "dirty-ring", "calc-time": 3})

    async def answer() -> Any:
        info = await control.execute("query-dirty-rate")
        return info if info["status"] == "measured" else None

    info = await until(answer)
    return [vcpu["dirty-rate"] for vcpu in info["vcpu-dirty-rate"]]


def test_a_limit_holds_its_vcpu_and_no_other_until_it_is_cancelled() -> None:
    async def scenario() -> None:
        async with engine.Control.start(GUEST) as guest:
            limit = {"cpu-index": 1, "dirty-rate": LIMIT_MIB}
            assert await guest.execute("set-vcpu-dirty-limit", **limit) == {}
            free, limited = await vcpu_rates(guest)
            assert 0 < limited <= 1.25 * LIMIT_MIB
            assert free > 4 * LIMIT_MIB

            async def current() -> Any:
                (info,) = await guest.execute("query-vcpu-dirty-limit")
                return info if 0 < info["current-rate"] <= 1.25 * LIMIT_MIB else None

            info = await until(current)
            assert info["cpu-index"] == 1
            assert info["limit-rate"] == LIMIT_MIB
            assert await guest.execute("set-vcpu-dirty-limit", **{"dirty-rate": LIMIT_MIB}) == {}
            assert all(rate <= 1.25 * LIMIT_MIB for rate in await vcpu_rates(guest))
            assert len(await guest.execute("query-vcpu-dirty-limit")) == 2
            await guest.execute("set-vcpu-dirty-limit", **{"cpu-index": 0, "dirty-rate": 0})
            (info,) = await guest.execute("query-vcpu-dirty-limit")
            assert info["cpu-index"] == 1
            assert await guest.execute("cancel-vcpu-dirty-limit") == {}
            assert await guest.execute("query-vcpu-dirty-limit") == []
            assert all(rate > 2 * LIMIT_MIB for rate in await vcpu_rates(guest))
            judgement = await guest.execute("x-judge")
            assert judgement["wrong-pages"] == 0
            assert judgement["page-writes"] == judgement["vcpu-writes"]

    asyncio.run(scenario())


def test_a_vcpu_that_is_not_there_is_refused() -> None:
    async def scenario() -> None:
        async with engine.Control.start("workload:size=16M,vcpus=2") as guest:
            for index in (-1, 2):
                arguments = {"cpu-index": index, "dirty-rate": 1}
                said = await refusal(guest, "set-vcpu-dirty-limit", **arguments)
                assert said == "incorrect cpu index specified"
                said = await refusal(guest, "cancel-vcpu-dirty-limit", **{"cpu-index": index})
                assert said == "incorrect cpu index specified"
            assert await guest.execute("query-vcpu-dirty-limit") == []

    asyncio.run(scenario())


class Vcpus:
    """A guest of two vCPUs that remembers its limits."""

    def __init__(self) -> None:
        self.limits = [0, 0]

    async def start_counting(self) -> None:
        raise AssertionError

    async def count_written(self) -> int:
        raise AssertionError

    async def count_dirty(self, is_counting: bool) -> None:
        raise AssertionError

    async def limit_dirty(self, vcpu: int | None, bytes_per_s: int) -> None:
        for index in range(2) if vcpu is None else (vcpu,):
            self.limits[index] = bytes_per_s

    async def dirtied(self) -> list[VcpuDirtied]:
        return [VcpuDirtied(0, 0)] * 2


def test_a_migration_that_uses_the_limit_keeps_others_away() -> None:
    async def scenario() -> list[int]:
        vcpus, is_used = Vcpus(), [False]
        limit = DirtyLimit(lambda: vcpus, lambda: is_used[0])  # type: ignore[arg-type,return-value]
        await limit.set(0, 3)
        is_used[0] = True
        with pytest.raises(UsageError, match=r"^can't set dirty page rate limit while migration"):
            await limit.set(None, 5)
        with pytest.raises(UsageError, match=r"^can't cancel dirty page rate limit while migr"):
            await limit.cancel(None)
        await limit.apply(1, 2**64 - 1)  # the migration itself may, and more than fits is a lot
        assert [one["cpu-index"] for one in limit.query()] == [0, 1]
        await limit.close()
        return vcpus.limits

    limits = asyncio.run(scenario())
    assert limits[0] == 3 * 2**20
    assert 2**62 < limits[1] < 2**64
