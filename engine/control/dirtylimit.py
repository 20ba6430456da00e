"""The dirty limit: how much each vCPU may dirty in a second (QEMU: softmmu/dirtylimit.c).

QEMU lengthens or shortens a vCPU's sleep once in a period, until what it dirties is within 25 MB/s
of its limit. A guest here is told the limit and keeps it itself, exactly and at once; the period
only says how often the current rates are read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engine.control.dirtyrate import MIB, mib_per_s
from engine.errors import MigrationError, UsageError
from engine.guest.base import DirtyMeter, Guest, VcpuDirtied
from engine.memory.blocks import PAGE_SIZE

log = logging.getLogger("ramferry.control")

PERIOD_S: Final = 1.0
NO_RING: Final = (
    "dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set'"
)
#: More is no limit for any memory there is, and would not fit in 64 bits as bytes.
LIMIT_MIB_MAX: Final = 2**63 // MIB


@dataclass(slots=True)
class VcpuLimit:
    """One vCPU's limit and what it dirtied in the last period, in MiB/s."""

    limit_rate: int
    current_rate: int = 0


class DirtyLimit:
    """All limits of a process; owns the task that reads the rates while there is a limit."""

    def __init__(self, guest: Callable[[], Guest], is_used: Callable[[], bool]) -> None:
        """:param is_used: a migration with the capability `dirty-limit` runs."""
        self._guest, self._is_used = guest, is_used
        self._limits: dict[int, VcpuLimit] = {}
        self._reader: asyncio.Task[None] | None = None

    async def set(self, vcpu: int | None, rate_mib_per_s: int) -> None:
        """Limit one vCPU, or all; 0 takes the limit back.

        :raise UsageError: the guest cannot be limited, has no such vCPU, or a migration uses this.
        :raise GuestError: the guest does not answer; what it does is not known."""
        meter = self._meter()
        if meter is None:
            raise UsageError(NO_RING)
        await self._check(meter, vcpu, "set")
        await self.apply(vcpu, rate_mib_per_s)

    async def cancel(self, vcpu: int | None) -> None:
        """Take back the limit of one vCPU, or all; no-op for a guest that cannot be limited.

        :raise UsageError: there is no such vCPU, or a migration uses the limits.
        :raise GuestError: the guest does not answer; what it does is not known."""
        meter = self._meter()
        if meter is None:
            return
        await self._check(meter, vcpu, "cancel")
        await self.apply(vcpu, 0)

    async def apply(self, vcpu: int | None, rate_mib_per_s: int) -> None:
        """What `set` does, without its checks: for a migration that limits by its own policy.

        :raise UsageError: the guest cannot be limited.
        :raise GuestError: the guest refuses or does not answer."""
        meter = self._meter()
        if meter is None:
            raise UsageError(NO_RING)
        rate = min(rate_mib_per_s, LIMIT_MIB_MAX)
        await meter.limit_dirty(vcpu, rate * MIB)
        count = len(await meter.dirtied())
        for index in range(count) if vcpu is None else (vcpu,):
            if rate:
                current = self._limits.get(index, VcpuLimit(0)).current_rate
                self._limits[index] = VcpuLimit(rate, current)
            else:
                self._limits.pop(index, None)
        await self._follow()

    def query(self) -> list[dict[str, int]]:
        """QAPI DirtyLimitInfo of each vCPU that has a limit."""
        return [
            {
                "cpu-index": index,
                "limit-rate": limit.limit_rate,
                "current-rate": limit.current_rate,
            }
            for index, limit in sorted(self._limits.items())
        ]

    async def close(self) -> None:
        """Stop reading; the limits stay with the guest. Idempotent."""
        self._limits.clear()
        await self._follow()

    def _meter(self) -> DirtyMeter | None:
        guest = self._guest()
        return guest if isinstance(guest, DirtyMeter) else None

    async def _check(self, meter: DirtyMeter, vcpu: int | None, doing: str) -> None:
        if vcpu is not None and not 0 <= vcpu < len(await meter.dirtied()):
            raise UsageError("incorrect cpu index specified")
        if self._is_used():
            raise UsageError(f"can't {doing} dirty page rate limit while migration is running")

    # -- current rates ---------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Read the rates while there is a limit, and not longer."""
        if self._limits and self._reader is None:
            self._reader = asyncio.get_running_loop().create_task(self._read())
        elif not self._limits and self._reader is not None:
            reader, self._reader = self._reader, None
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self) -> None:
        """A guest that dies ends this; so do its limits."""
        meter = self._meter()
        assert meter is not None, "only such a guest gets a limit"
        try:
            before, before_ns = await meter.dirtied(), time.monotonic_ns()
            while True:
                await asyncio.sleep(PERIOD_S)
                now, now_ns = await meter.dirtied(), time.monotonic_ns()
                self._take(before, now, now_ns - before_ns)
                before, before_ns = now, now_ns
        except MigrationError as exc:
            log.warning("the vCPUs' dirty rates are not read any more: %s", exc)
            self._limits.clear()
            self._reader = None

    def _take(self, before: list[VcpuDirtied], now: list[VcpuDirtied], took_ns: int) -> None:
        for index, (old, new) in enumerate(zip(before, now, strict=False)):
            if index in self._limits:
                dirtied = (new.pages - old.pages) * PAGE_SIZE
                self._limits[index].current_rate = mib_per_s(dirtied, took_ns)
