"""Postcopy as a guest sees it, in whole migrations: `ramferry bench postcopy`.

Nothing is sent before the switch, so that the guest misses everything, unless it says otherwise.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from engine.api import Control, Migration, Statistics, verify
from engine.control.status import Status
from engine.errors import MigrationError
from engine.guest.backing import HUGE_2M, check_available
from engine.memory.blocks import PAGE_SIZE
from engine.sizes import parse_size

#: Bytes per second of a first round that shall send next to nothing, and of a background that is
#: held while the guest faults.
HELD: Final = 4096
#: A write that finds its page takes about 1 us, one that waits for it 25 us at least.
FAULT_NS_MIN: Final = 8192
DEADLINE_S: Final = 200.0
POLL_S: Final = 0.05
SAMPLE_S: Final = 0.25  #: windows in which the guest's speed is taken
BEFORE_S: Final = 1.0
#: A guest whose rate has not come back so long after its last page has another reason for it.
AFTER_S: Final = 10.0
RECOVERED: Final = 0.9
SWITCH_BANDWIDTH: Final = 800_000_000
SWITCH_RATE: Final = 100_000_000  #: that the guest dirties


@dataclass(frozen=True, slots=True)
class Case:
    """What is migrated, and how.

    :ivar prefetch: pages; None: as it is by default."""

    size: str = "1G"
    pattern: str = "random"
    channels: int = 2
    prefetch: int | None = None
    rate: int = 0
    is_timed: bool = False
    is_huge: bool = False
    bandwidth: int = HELD
    postcopy_bandwidth: int = 0

    @property
    def units(self) -> int:
        """Pages as they are faulted in."""
        return parse_size(self.size) // (HUGE_2M if self.is_huge else PAGE_SIZE)

    @property
    def memory(self) -> str:
        return f"workload:size={self.size}{',hugetlb=2M' if self.is_huge else ''}"

    def source(self) -> Control:
        timed = "on" if self.is_timed else "off"
        guest = f"{self.memory},pattern={self.pattern},rate={self.rate},contents=random"
        settings = [
            *self._both(), f"max-bandwidth={self.bandwidth}", "downtime-limit=1",
            f"max-postcopy-bandwidth={self.postcopy_bandwidth}",
        ]  # fmt: skip
        return Control.start(f"{guest},timed={timed}", settings=settings)

    def destination(self) -> Control:
        settings = self._both()
        if self.prefetch is not None:
            settings.append(f"x-postcopy-prefetch={self.prefetch}")
        return Control.start(self.memory, "tcp:127.0.0.1:0", settings)

    def _both(self) -> list[str]:
        return ["postcopy-ram=on", f"multifd-channels={self.channels}"]


@dataclass(slots=True)
class Waits:
    """How long writes took that found no page: ns from, and how many."""

    counts: Counter[int] = field(default_factory=Counter)
    longest_ns: int = 0

    def add(self, buckets: Iterable[tuple[int, int]], longest_ns: int) -> None:
        self.counts.update({ns: count for ns, count in buckets if ns >= FAULT_NS_MIN})
        self.longest_ns = max(self.longest_ns, longest_ns)

    def quantile_us(self, share: float) -> float:
        """Interpolated within its bucket, which is an eighth of a power of two; 0 of nothing."""
        wanted = self.counts.total() * share
        for ns, count in sorted(self.counts.items()):
            if wanted <= count:
                width = (1 << (ns.bit_length() - 1)) / 8
                return (ns + width * wanted / count) / 1000
            wanted -= count
        return self.longest_ns / 1000

    def share_from_us(self, us: int) -> float:
        late = sum(count for ns, count in self.counts.items() if ns >= us * 1000)
        return late / max(1, self.counts.total())

    def figures(self) -> dict[str, float]:
        return {
            "fault_p50_us": self.quantile_us(0.5),
            "fault_p99_us": self.quantile_us(0.99),
            "fault_max_us": self.longest_ns / 1000,
            "faults": float(self.counts.total()),
            "over_512us_share": self.share_from_us(512),
        }


@asynccontextmanager
async def _couple(case: Case) -> AsyncIterator[tuple[Control, Control]]:
    """:raise UsageError: there is not so much memory."""
    if not case.is_huge:
        check_available(2 * parse_size(case.size), "a guest with its copy")
    source, destination = case.source(), case.destination()
    async with source, destination, asyncio.timeout(DEADLINE_S):
        yield source, destination


async def _switch(source: Control, destination: Control) -> Migration:
    """Begin, and switch at once; the guest runs at the destination."""
    migration = await source.migrate(destination)
    await migration.start_postcopy()
    await _runs_there(migration, destination)
    return migration


async def _runs_there(migration: Migration, destination: Control) -> dict[str, Any]:
    """Wait for the switch; return what the destination then says.

    :raise MigrationError: it did not come to that."""
    while True:
        info: dict[str, Any] = await destination.execute("query-migrate")
        if info.get("status") in (Status.POSTCOPY_ACTIVE.value, Status.COMPLETED.value):
            return info
        if (told := await migration.statistics()).status is Status.FAILED:
            raise MigrationError(f"no switch to postcopy: {told.error}")
        await asyncio.sleep(0.002)


async def _check(source: Control, destination: Control) -> None:
    """:raise MigrationError: a page is wrong, or a write lost."""
    verdict = await verify(source, destination)
    if not verdict.is_right:
        wrong, lost = verdict.wrong_pages, verdict.lost_writes
        raise MigrationError(f"{wrong} pages wrong, {lost} writes lost")


# -- what a missing page costs -------------------------------------------------------------------


async def faults_once(case: Case, faults: int) -> tuple[dict[str, float], Waits]:
    """A guest that touches its RAM at random until all of it is there; where the background is
    held, until so many faults, or half of all pages."""
    faults = min(faults, case.units // 2)
    waits, is_held = Waits(), case.postcopy_bandwidth == HELD
    async with _couple(case) as (source, destination):
        migration = await _switch(source, destination)
        began_ns = time.monotonic_ns()
        while True:
            info = await destination.execute("query-migrate")
            if info["status"] == Status.COMPLETED.value:
                break
            times = (await destination.query_guest())["write-times"]
            counts, took_ns = info["x-postcopy"], time.monotonic_ns() - began_ns
            if is_held and counts["faults"] >= faults:
                break
            await asyncio.sleep(POLL_S)
        waits.add(((ns, count) for ns, count in times["buckets"]), times["longest"])
        await source.execute("migrate-set-parameters", **{"max_postcopy_bandwidth": 0})
        result = await migration.result()
        await _check(source, destination)
    return {**waits.figures(), **_services(counts, result, took_ns, is_held=is_held)}, waits


def _services(
    counts: dict[str, Any], result: Statistics, took_ns: int, *, is_held: bool
) -> dict[str, float]:
    """What the services say of the same faults."""
    figures = {
        "service_mean_us": counts["latency"] / 1000,
        "service_faults": float(counts["faults"]),
        "prefetch_pages": float(counts["prefetch-pages"]),
        "faults_per_s": counts["faults"] * 1e9 / took_ns,
    }
    if not is_held:
        pushed = result.postcopy["background-pages"] * PAGE_SIZE / 2**20
        figures["background_mib_per_s"] = pushed * 1e3 / max(1, result.postcopy["time"])
    return figures


# -- the switch ----------------------------------------------------------------------------------


async def switch_once(case: Case, dirty_bytes: int) -> dict[str, float]:
    """Switch in the first round, when so much is left to be sent."""
    async with _couple(case) as (source, destination):
        migration = await source.migrate(destination)
        async for told in migration.progress(0.01):
            if told.total_bytes and told.remaining_bytes <= dirty_bytes:
                break
        await migration.start_postcopy()
        info = await _runs_there(migration, destination)
        result = await migration.result()
        await _check(source, destination)
    return {
        "downtime_ms": sum(result.phases_ns.values()) / 1e6,
        **{f"{name}_ms": ns / 1e6 for name, ns in result.phases_ns.items() if ns},
        "missing_mib": info["x-postcopy"]["missing-pages"] * PAGE_SIZE / 2**20,
    }


# -- the guest's speed after it ------------------------------------------------------------------


async def recovery_once(case: Case) -> dict[str, float]:
    """From the switch until the guest writes as fast as before, or nearly."""
    async with _couple(case) as (source, destination):
        before = await _writes_per_s(source, BEFORE_S)
        migration = await _switch(source, destination)
        began = time.monotonic()
        recovered_s, during = await _recover(destination, began, before * RECOVERED)
        result = await migration.result()
        await _check(source, destination)
    return {
        "seconds_to_90_percent": recovered_s,
        "writes_while_missing_share": during / before,
        "missing_s": result.postcopy["time"] / 1000,
        "writes_per_s_before": before,
    }


async def _writes_per_s(control: Control, over_s: float) -> float:
    began, writes = time.monotonic(), (await control.query_guest())["writes"]
    await asyncio.sleep(over_s)
    now = (await control.query_guest())["writes"]
    return float((now - writes) / (time.monotonic() - began))


async def _recover(destination: Control, began: float, wanted: float) -> tuple[float, float]:
    """Seconds until the guest wrote at that rate in two windows, one after the other; its rate as
    long as pages were missing.

    :raise MigrationError: it never did."""
    first = (await destination.query_guest())["writes"]
    in_a_row, completed, during = 0, None, 0.0
    while completed is None or time.monotonic() - completed < AFTER_S:
        rate = await _writes_per_s(destination, SAMPLE_S)
        now, info = time.monotonic(), await destination.execute("query-migrate")
        if completed is None:
            during = ((await destination.query_guest())["writes"] - first) / (now - began)
            completed = now if info["status"] == Status.COMPLETED.value else None
        in_a_row = in_a_row + 1 if rate >= wanted else 0
        if in_a_row == 2:
            return now - SAMPLE_S - began, during
    raise MigrationError(f"{AFTER_S:g} s after its last page the guest has not its speed again")
