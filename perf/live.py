"""Measurements of running guests: downtime, bandwidth, empty memory, workers' own memory."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psutil

from engine.api import Control, Statistics, verify
from engine.control.status import Status
from engine.errors import MigrationError
from perf.warm import warm_memory

MIB: Final = 1024 * 1024
WINDOW_S: Final = 1.0
SAMPLE_S: Final = 0.01
WRITES_S: Final = 1.0  #: the guest's speed before the migration is taken over so long

Sample = tuple[float, float, int]  #: seconds when it was asked for and answered, and bytes sent


async def _writes_per_s(control: Control) -> float:
    began, writes = time.monotonic(), (await control.query_guest())["writes"]
    await asyncio.sleep(WRITES_S)
    later, now = (await control.query_guest())["writes"], time.monotonic()
    return float((later - writes) / (now - began))


async def downtime_once(
    size: str, rate: str, limit_ms: int, pattern: str = "hotspot"
) -> dict[str, float]:
    """One migration of a guest that writes; hotspot: to a hot tenth of its RAM.

    :raise MigrationError: it failed, or a page was wrong."""
    source = Control.start(
        f"workload:size={size},rate={rate},pattern={pattern}",
        settings=["max-bandwidth=0", f"downtime-limit={limit_ms}"],
    )
    destination = Control.start(f"workload:size={size}", "tcp:127.0.0.1:0")
    async with source, destination:
        before = await _writes_per_s(source)
        began, writes = time.monotonic(), (await source.query_guest())["writes"]
        result: Statistics = await (await source.migrate(destination)).result()
        elapsed = time.monotonic() - began
        during = ((await source.query_guest())["writes"] - writes) / elapsed
        verdict = await verify(source, destination)
    if not verdict.is_right:
        raise MigrationError(
            f"{verdict.wrong_pages} pages wrong, {verdict.lost_writes} writes lost"
        )
    downtime_ms = sum(result.phases_ns.values()) / 1e6
    expected_ms = result.raw["x-expected-downtime-ns"] / 1e6
    return {
        "downtime_ms": downtime_ms,
        "expected_downtime_ms": expected_ms,
        "downtime_off_expected_factor": max(downtime_ms / expected_ms, expected_ms / downtime_ms),
        "total_time_ms": float(result.total_time_ms),
        "guest_speed_during_to_before_ratio": during / before,
    }


async def bandwidth_once(limit_bytes_per_s: int, seconds: float) -> dict[str, float]:
    """Bytes sent in every window of a second under a limit; the largest deviation from the limit.

    The first half second, in which channels open, is left out."""
    size = int(limit_bytes_per_s * seconds * 1.2) // MIB + 1
    spec = f"workload:size={size}M,contents=random,rate=4096"
    source = Control.start(spec, settings=[f"max-bandwidth={limit_bytes_per_s}"])
    destination = Control.start(f"workload:size={size}M", "tcp:127.0.0.1:0")
    samples: list[Sample] = []
    with warm_memory(2 * size * MIB):
        async with source, destination:
            migration = await source.migrate(destination)
            began = time.monotonic()
            while (asked := time.monotonic()) - began < seconds:
                counted = await migration.statistics()
                answered = time.monotonic()
                if counted.status is Status.ACTIVE:
                    samples.append((asked, answered, counted.transferred_bytes))
                elif counted.status is not Status.SETUP:
                    raise MigrationError(
                        f"the migration was {counted.status.value} after {answered - began:.1f} s, "
                        f"before all was measured"
                    )
                await asyncio.sleep(SAMPLE_S)
            await migration.cancel()
    windows = list(_windows(samples))
    if not windows:
        raise MigrationError("not a whole second could be measured; ask for more")
    over = max(sent / longest for _, longest, sent in windows)
    under = min(sent / shortest for shortest, _, sent in windows)
    return {
        "over_max_percent": (over / limit_bytes_per_s - 1) * 100,
        "under_max_percent": (1 - under / limit_bytes_per_s) * 100,
    }


def _windows(samples: list[Sample]) -> Iterator[tuple[float, float, int]]:
    """Every window of a second: the least and the most that it may have lasted, and the bytes in
    it. When a count was taken is known no better than between question and answer, and on a busy
    machine that is long."""
    end = 0
    steady = [sample for sample in samples if sample[0] > samples[0][0] + 0.5]
    for asked, answered, bytes_before in steady:
        while end < len(steady) and steady[end][0] < answered + WINDOW_S:
            end += 1
        if end == len(steady):
            return
        asked_again, answered_again, bytes_after = steady[end]
        yield asked_again - answered, answered_again - asked, bytes_after - bytes_before


def _available_bytes() -> int:
    return int(psutil.virtual_memory().available)


async def empty_once(size: str, guest: str) -> dict[str, float]:
    """A guest that never touched its RAM; what both sides allocated for it."""
    spec = {
        "ram": f"ram:size={size}",
        "workload": f"workload:size={size},contents=zero,fill=off,rate=4096",
    }[guest]
    source = Control.start(spec, settings=["max-bandwidth=0"])
    destination = Control.start(spec, "tcp:127.0.0.1:0")
    async with source, destination:
        before = _available_bytes()
        result = await (await source.migrate(destination)).result()
        taken = before - _available_bytes()
        blocks = [(await side.query_guest())["blocks"][0] for side in (source, destination)]
    return {
        "total_time_ms": float(result.total_time_ms),
        "ram_allocated_mib": sum(block["allocated"] for block in blocks) / MIB,
        "memory_taken_mib": taken / MIB,
    }


def private_bytes(pid: int) -> int:
    """PSS without RAM and the tables that grow with it: all but shared memory descriptors."""
    total = 0
    counted = True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            counted = "/memfd:" not in line and "/dev/shm/" not in line
        elif counted and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


@asynccontextmanager
async def _pair(size: str, channels: int) -> AsyncIterator[tuple[Control, Control]]:
    settings = [f"multifd-channels={channels}", "max-bandwidth=0"]
    source = Control.start(f"workload:size={size},rate=50M", settings=settings)
    destination = Control.start(f"workload:size={size}", "tcp:127.0.0.1:0")
    async with source, destination:
        yield source, destination


async def footprint_once(size: str, channels: int) -> dict[str, float]:
    """The largest private memory of any worker, looked at all through a migration."""
    peaks = {"sender": 0, "receiver": 0}
    async with _pair(size, channels) as (source, destination):
        migration = await source.migrate(destination)
        async for _ in migration.progress(0.05):
            for control, role in ((source, "sender"), (destination, "receiver")):
                for child in psutil.Process(control.pid).children():
                    try:
                        if f"engine.multifd.{role}" in " ".join(child.cmdline()):
                            peaks[role] = max(peaks[role], private_bytes(child.pid))
                    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                        continue
    return {f"{role}_private_peak_mib": peak / MIB for role, peak in peaks.items()}
