"""Dirty bits, collected from all lanes: at the end of each round, and every second within a long
one, so that the dirty rate is known and auto-converge acts before a round of minutes has ended
(QEMU: migration_bitmap_sync, and cpu_throttle_dirty_sync_timer every 5 s).

Within a round it also saves work: a page that was written before its turn came is sent once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from engine.control import policy
from engine.control.host import Host
from engine.control.senders import SenderGroup
from engine.control.statistics import MigrationNumbers
from engine.errors import MemoryRefused
from engine.guest.base import TrackerName
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.progress import Count

PERIOD_S: Final = 1.0
MIB: Final = 1024 * 1024
#: Content hashes read all of RAM, soft-dirty bits stop the guest: only between rounds.
CHEAP: Final = frozenset({TrackerName.UFFD, TrackerName.BITMAP})


def wanted_tracker(name: str) -> TrackerName | None:
    """What `x-tracker` asks for."""
    return None if name == "auto" else TrackerName(name)


class DirtySync:
    """One migration's collecting; one at a time, whoever asks."""

    def __init__(
        self, host: Host, senders: SenderGroup, numbers: MigrationNumbers, tracker: TrackerName
    ) -> None:
        self._host, self._senders, self._numbers, self._tracker = host, senders, numbers, tracker
        self._throttle = policy.Throttle()
        self._limit_trigger = policy.Trigger()
        self._limit_mib_per_s = 0  #: what every vCPU may dirty now; 0: no limit
        self.throttles_always = False  #: also without the capability `auto-converge`
        self._one_at_a_time = asyncio.Lock()
        self._number = self._found_pages = 0  #: found since the throttle was last looked at
        self._sent_bytes = 0  #: of RAM at the last collection
        self._collected_ns = time.monotonic_ns()

    async def collect(self, *, throttles: bool = True) -> int:
        """Collect on all lanes; return the bytes that are dirty now.

        `throttles`: auto-converge may change the throttle by what was found.

        :raise MigrationError: a worker or the guest did not answer."""
        async with self._one_at_a_time:
            self._number += 1
            if self._tracker is TrackerName.SOFT_DIRTY and self._host.guest.is_running:
                dirty_pages, found_pages = await self._harvest_standing()
            else:
                dirty_pages, found_pages = await self._harvest()
            self._numbers.dirtied(found_pages)
            self._found_pages += found_pages
            self._collected_ns = time.monotonic_ns()
            if throttles:
                found_bytes, self._found_pages = self._found_pages * PAGE_SIZE, 0
                await self._converge(found_bytes)
            return dirty_pages * PAGE_SIZE

    async def peek(self) -> int:
        """The bytes that are dirty now. Where an armed page costs the guest a fault, none is armed:
        the next collection finds them again, and counts them. (A lane whose sender dies meanwhile
        is collected from for good.)

        :raise MigrationError: a worker did not answer."""
        if self._tracker is not TrackerName.UFFD:
            return await self.collect(throttles=False)
        async with self._one_at_a_time:
            self._number += 1
            dirty_pages, _ = await self._harvest(is_peek=True)
            return dirty_pages * PAGE_SIZE

    async def watch(self, is_gone: Callable[[], bool]) -> None:
        """Until it is known that what is written is not seen any more.

        :param is_gone: nobody writes here any more.
        :raise MemoryRefused: somebody does."""
        reason = await self._host.guest.untracked()
        if not is_gone():
            raise MemoryRefused(reason)

    @property
    def is_cheap(self) -> bool:
        """It may be done within a round."""
        return self._tracker in CHEAP

    async def now_and_then(self, is_sending: Callable[[], bool]) -> None:
        """Collect whenever a round has gone on for a period without; until cancelled."""
        while self.is_cheap:
            due_s = PERIOD_S - (time.monotonic_ns() - self._collected_ns) / 1e9
            if due_s > 0:
                await asyncio.sleep(due_s)
            elif is_sending() and self._host.guest.is_running:
                await self.collect()
            else:
                await asyncio.sleep(PERIOD_S)

    async def _harvest(self, *, is_peek: bool = False) -> tuple[int, int]:
        totals = await self._senders.harvest(self._number, is_peek=is_peek)
        return totals.dirty_pages, totals.found_pages

    async def _harvest_standing(self) -> tuple[int, int]:
        """Soft-dirty bits are read and cleared in two steps, so the guest stands meanwhile."""
        guest = self._host.guest
        try:
            await guest.pause(for_migration=True)
            pages = await self._harvest()
            await guest.clear_soft_dirty()
        finally:
            await guest.resume(for_migration=True)
        return pages

    async def _converge(self, dirty_bytes: int) -> None:
        settings = self._host.parameters
        # QEMU goes by the wire alone, which is the same without compression; with it, a guest whose
        # pages arrive faster than it dirties them would be throttled.
        wire_bytes = self._senders.total(Count.WIRE_BYTES)
        total_bytes = max(wire_bytes, self._senders.sent_ram_bytes)
        sent_bytes, self._sent_bytes = total_bytes - self._sent_bytes, total_bytes
        percent = self._throttle.after_round(
            dirty_bytes,
            sent_bytes,
            policy.ThrottleSettings(
                self.throttles_always or self._host.capability("auto-converge"),
                settings.throttle_trigger_threshold,
                settings.cpu_throttle_initial,
                settings.cpu_throttle_increment,
                settings.max_cpu_throttle,
                settings.cpu_throttle_tailslow,
            ),
        )
        if self._host.capability("dirty-limit") and self._limit_trigger.after_round(
            dirty_bytes, sent_bytes, settings.throttle_trigger_threshold
        ):
            await self._limit(settings.vcpu_dirty_limit)
        if percent != self._numbers.throttle_percent:
            self._numbers.throttle_percent = percent
            self._numbers.throttle_way = await self._host.guest.throttle(percent)

    async def _limit(self, mib_per_s: int) -> None:
        """Limit every vCPU (QEMU: migration_dirty_limit_guest); what they dirtied until now says
        how long each must sleep in a second."""
        if mib_per_s == self._limit_mib_per_s:
            return
        self._limit_mib_per_s = mib_per_s  # first: if we are cancelled it may hold already
        await self._host.dirty_limit.apply(None, mib_per_s)
        vcpus = max(1, len(self._host.dirty_limit.query()))
        free_mib_per_s = self._numbers.dirty_pages_per_s * PAGE_SIZE / vcpus / MIB
        share = 1 - mib_per_s / max(free_mib_per_s, mib_per_s)
        self._numbers.limit_throttle_us = int(share * 1_000_000)

    async def give_back(self) -> None:
        """Let every vCPU run freely again, if this migration has slowed it down.

        :raise MigrationError: the guest did not answer."""
        self._numbers.limit_throttle_us = 0
        if self._numbers.throttle_percent:
            await self._host.guest.throttle(0)
        if self._limit_mib_per_s:
            self._limit_mib_per_s = 0
            await self._host.dirty_limit.apply(None, 0)
