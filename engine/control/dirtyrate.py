"""`calc-dirty-rate`: how many MiB of its RAM a guest dirties in a second, measured beside all else
(QEMU: migration/dirtyrate.c, whose modes, checks and texts these are).

    page-sampling  random pages are hashed at the start and at the end and compared
    dirty-bitmap   a dirty tracker for that time; without one, all of RAM is compared
    dirty-ring     each vCPU's own count of what it dirties
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from engine.control.sampling import AllPages, Comparison, SampledPages, Work
from engine.errors import GuestError, MigrationError, UsageError
from engine.guest.base import DirtyMeter, Guest
from engine.memory.blocks import PAGE_SIZE

log = logging.getLogger("ramferry.control")

CALC_TIME_MS_MIN: Final = 50
CALC_TIME_MS_MAX: Final = 60_000
SAMPLE_PAGES_DEFAULT: Final = 512
SAMPLE_PAGES_MIN: Final = 128
SAMPLE_PAGES_MAX: Final = 16_384
MIB: Final = 2**20
UNKNOWN_RATE: Final = -1  #: QEMU's, of a measurement that came to nothing


class Mode(enum.Enum):
    """QAPI DirtyRateMeasureMode."""

    PAGE_SAMPLING = "page-sampling"
    DIRTY_RING = "dirty-ring"
    DIRTY_BITMAP = "dirty-bitmap"


class TimeUnit(enum.Enum):
    """QAPI TimeUnit."""

    SECOND = "second"
    MILLISECOND = "millisecond"

    @property
    def milliseconds(self) -> int:
        return 1000 if self is TimeUnit.SECOND else 1


class RateStatus(enum.Enum):
    """QAPI DirtyRateStatus."""

    UNSTARTED = "unstarted"
    MEASURING = "measuring"
    MEASURED = "measured"


@dataclass(slots=True)
class Measurement:
    """One measurement, what was asked for and what was found.

    :ivar calc_time_ms: what was asked for, and how long it really took once it is measured.
    :ivar started_s: seconds since 1970.
    :ivar rate: MiB/s, or UNKNOWN_RATE when it came to nothing.
    :ivar vcpu_rates: the same by vCPU, of mode `dirty-ring`."""

    calc_time_ms: int = 0
    mode: Mode = Mode.PAGE_SAMPLING
    sample_pages: int = 0
    started_s: int = 0
    status: RateStatus = RateStatus.UNSTARTED
    rate: int = UNKNOWN_RATE
    vcpu_rates: list[int] = field(default_factory=list)

    def as_dict(self, unit: TimeUnit) -> dict[str, Any]:
        """QAPI DirtyRateInfo."""
        is_sampling = self.mode is Mode.PAGE_SAMPLING or self.status is not RateStatus.MEASURED
        info: dict[str, Any] = {
            "status": self.status.value,
            "sample-pages": self.sample_pages if is_sampling else 0,
            "mode": self.mode.value,
            "calc-time-unit": unit.value,
            "start-time": self.started_s,
            "calc-time": self.calc_time_ms // unit.milliseconds,
        }
        if self.status is RateStatus.MEASURED:
            info["dirty-rate"] = self.rate
            if self.mode is Mode.DIRTY_RING:
                info["vcpu-dirty-rate"] = [
                    {"id": index, "dirty-rate": rate} for index, rate in enumerate(self.vcpu_rates)
                ]
        return info


def mib_per_s(dirty_bytes: float, took_ns: int) -> int:
    """To the nearest MiB/s."""
    return round(dirty_bytes * 1e9 / max(1, took_ns) / MIB)


class DirtyRate:
    """The newest measurement of a process; owns its task until `close`."""

    def __init__(self, guest: Callable[[], Guest], is_migrating: Callable[[], bool]) -> None:
        self._guest, self._is_migrating = guest, is_migrating
        self._newest = Measurement()
        self._task: asyncio.Task[None] | None = None

    def start(self, calc_time: int, unit: TimeUnit, sample_pages: int | None, mode: Mode) -> None:
        """Begin to measure; returns at once, the checks are QEMU's in its order.

        :raise UsageError: one is being measured, a value is out of range, the mode is not there."""
        if self._newest.status is RateStatus.MEASURING:
            raise UsageError("the dirty rate is already being measured.")
        calc_time_ms = calc_time * unit.milliseconds
        if not CALC_TIME_MS_MIN <= calc_time_ms <= CALC_TIME_MS_MAX:
            raise UsageError(
                f"Calculation time is out of range [{CALC_TIME_MS_MIN}ms, {CALC_TIME_MS_MAX}ms]."
            )
        if sample_pages is None:
            sample_pages = SAMPLE_PAGES_DEFAULT
        elif mode is not Mode.PAGE_SAMPLING:
            raise UsageError("sample-pages is used only in page-sampling mode")
        if not SAMPLE_PAGES_MIN <= sample_pages <= SAMPLE_PAGES_MAX:
            raise UsageError(
                f"sample-pages is out of range[{SAMPLE_PAGES_MIN}, {SAMPLE_PAGES_MAX}]."
            )
        self._check_mode(mode)
        self._newest = Measurement(
            calc_time_ms, mode, sample_pages, int(time.time()), RateStatus.MEASURING
        )
        self._task = asyncio.get_running_loop().create_task(self._measure(self._newest))

    def _check_mode(self, mode: Mode) -> None:
        guest = self._guest()
        if mode is Mode.DIRTY_RING and not isinstance(guest, DirtyMeter):
            raise UsageError(f"mode {mode.value} is not enabled, use other method instead.")
        is_tracked = self._is_migrating() and isinstance(guest, DirtyMeter)
        if mode is Mode.DIRTY_BITMAP and is_tracked:
            raise UsageError(
                f"mode {mode.value} is not enabled while a migration tracks the guest's writes, "
                "use other method instead."
            )

    def query(self, unit: TimeUnit) -> dict[str, Any]:
        """QAPI DirtyRateInfo of the newest measurement; `calc-time` is in `unit`."""
        return self._newest.as_dict(unit)

    async def close(self) -> None:
        """Give a measurement up. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # -- measuring -------------------------------------------------------------------------------

    async def _measure(self, measurement: Measurement) -> None:
        guest = self._guest()
        try:
            if measurement.mode is Mode.PAGE_SAMPLING:
                pages = SampledPages(guest.blocks, measurement.sample_pages)
                share = pages.sampled_bytes / max(1, pages.sample_count)
                measurement.rate = await self._compare(pages, share, measurement)
            elif not isinstance(guest, DirtyMeter):
                measurement.rate = await self._compare(
                    AllPages(guest.blocks), PAGE_SIZE, measurement
                )
            elif measurement.mode is Mode.DIRTY_BITMAP:
                measurement.rate = await self._track(guest, measurement)
            else:
                await self._ask_vcpus(guest, measurement)
        except (MigrationError, OSError) as exc:
            log.warning("the dirty rate could not be measured: %s", exc)
        finally:
            measurement.status = RateStatus.MEASURED

    async def _compare(
        self, comparison: Comparison, bytes_each: float, measurement: Measurement
    ) -> int:
        """Two looks at RAM, each in a thread; both take as long, so their beginnings are as far
        apart as the two looks at any page."""
        try:
            began_ns = time.monotonic_ns()
            await self._in_thread(comparison, comparison.begin)
            await _sleep_until(began_ns + measurement.calc_time_ms * 1_000_000)
            took_ns = time.monotonic_ns() - began_ns
            changed = await self._in_thread(comparison, comparison.count_changed)
            return _rate(measurement, (changed or 0) * bytes_each, took_ns)
        finally:
            comparison.close()

    @staticmethod
    async def _in_thread(comparison: Comparison, work: Work) -> int | None:
        """A thread ends by itself only: if we are given up, it is told and waited for."""
        future = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            comparison.stop()
            await asyncio.gather(future, return_exceptions=True)
            raise

    async def _track(self, meter: DirtyMeter, measurement: Measurement) -> int:
        began_ns = time.monotonic_ns()
        try:
            await meter.start_counting()
            began_ns = time.monotonic_ns()
            await _sleep_until(began_ns + measurement.calc_time_ms * 1_000_000)
        finally:
            took_ns = time.monotonic_ns() - began_ns
            pages = await meter.count_written()
        return _rate(measurement, pages * PAGE_SIZE, took_ns)

    async def _ask_vcpus(self, meter: DirtyMeter, measurement: Measurement) -> None:
        await meter.count_dirty(True)
        try:
            before, began_ns = await meter.dirtied(), time.monotonic_ns()
            await _sleep_until(began_ns + measurement.calc_time_ms * 1_000_000)
            after, took_ns = await meter.dirtied(), time.monotonic_ns() - began_ns
        finally:
            await meter.count_dirty(False)
        if len(before) != len(after):
            raise GuestError("another guest has arrived meanwhile")
        pages = [new.pages - old.pages for old, new in zip(before, after, strict=True)]
        measurement.vcpu_rates = [mib_per_s(count * PAGE_SIZE, took_ns) for count in pages]
        measurement.rate = _rate(measurement, sum(pages) * PAGE_SIZE, took_ns)


def _rate(measurement: Measurement, dirty_bytes: float, took_ns: int) -> int:
    """MiB/s of what was found; the measurement then tells how long it really took."""
    measurement.calc_time_ms = took_ns // 1_000_000
    return mib_per_s(dirty_bytes, took_ns)


async def _sleep_until(deadline_ns: int) -> None:
    await asyncio.sleep(max(0, deadline_ns - time.monotonic_ns()) / 1e9)
