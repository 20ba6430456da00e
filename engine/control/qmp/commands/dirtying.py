"""How fast the guest dirties its memory, and how fast each vCPU may."""

from __future__ import annotations

from engine.control.dirtyrate import Mode, RateStatus, TimeUnit
from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry
from engine.control.qmp.visitor import UInt64


class CalcDirtyRate(Arguments, frozen=True):
    """`calc-time` is 50 ms to 60 s, `sample-pages` per GiB."""

    calc_time: int
    calc_time_unit: TimeUnit = TimeUnit.SECOND
    sample_pages: int | None = None
    mode: Mode = Mode.PAGE_SAMPLING


class QueryDirtyRate(Arguments, frozen=True):
    """The unit in which `calc-time` is shown."""

    calc_time_unit: TimeUnit = TimeUnit.SECOND


class SetVcpuDirtyLimit(Arguments, frozen=True):
    """MiB/s; without `cpu-index` for all vCPUs, 0 for no limit."""

    dirty_rate: UInt64
    cpu_index: int | None = None


class CancelVcpuDirtyLimit(Arguments, frozen=True):
    """Without `cpu-index` for all vCPUs."""

    cpu_index: int | None = None


class DirtyRateVcpu(Arguments, frozen=True):
    """MiB/s of one vCPU."""

    id: int
    dirty_rate: int


class DirtyRateInfo(Arguments, frozen=True):
    """What `query-dirty-rate` answers; MiB/s, seconds since 1970."""

    status: RateStatus
    start_time: int
    calc_time: int
    calc_time_unit: TimeUnit
    sample_pages: int
    mode: Mode
    dirty_rate: int | None = None
    vcpu_dirty_rate: list[DirtyRateVcpu] | None = None


class DirtyLimitInfo(Arguments, frozen=True):
    """MiB/s of one vCPU."""

    cpu_index: int
    limit_rate: UInt64
    current_rate: UInt64


class Dirtying:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._rate, self._limit = process.dirty_rate, process.dirty_limit

    async def calc_dirty_rate(self, asked: CalcDirtyRate) -> None:
        self._rate.start(asked.calc_time, asked.calc_time_unit, asked.sample_pages, asked.mode)

    async def query_dirty_rate(self, asked: QueryDirtyRate) -> object:
        return self._rate.query(asked.calc_time_unit)

    async def set_vcpu_dirty_limit(self, asked: SetVcpuDirtyLimit) -> None:
        await self._limit.set(asked.cpu_index, asked.dirty_rate)

    async def cancel_vcpu_dirty_limit(self, asked: CancelVcpuDirtyLimit) -> None:
        await self._limit.cancel(asked.cpu_index)

    async def query_vcpu_dirty_limit(self, _: object) -> object:
        return self._limit.query()


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Dirtying(process)
    add = registry.add
    add("calc-dirty-rate", commands.calc_dirty_rate, CalcDirtyRate)
    add("query-dirty-rate", commands.query_dirty_rate, QueryDirtyRate, returns=DirtyRateInfo)
    add("set-vcpu-dirty-limit", commands.set_vcpu_dirty_limit, SetVcpuDirtyLimit)
    add("cancel-vcpu-dirty-limit", commands.cancel_vcpu_dirty_limit, CancelVcpuDirtyLimit)
    add("query-vcpu-dirty-limit", commands.query_vcpu_dirty_limit, returns=list[DirtyLimitInfo])
