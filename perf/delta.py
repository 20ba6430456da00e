"""A guest that changes a few words a page, on a slow link: `ramferry bench delta`.

How fast it may write for the migration still to converge, without and with the capability `xbzrle`,
and what a page that was sent again cost. The cache is as large as the guest: one that sweeps more
than its cache holds finds next to nothing there.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ExecuteError

from engine.errors import MigrationError
from engine.guest.judgement import verdict
from perf.links import Link
from perf.pair import PROBE_SIZE, Side, Way, command, prepare, side

SAMPLE_S: Final = 0.05
CANCEL_WAIT_S: Final = 30.0
RATE_MIN: Final = 40_000_000
RATE_MAX: Final = 4_000_000_000
RATE_STEP: Final = 1.1
CAPABILITY: Final = "xbzrle"


class NoDeltas(MigrationError):
    """The engine took the capability and did nothing with it."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What the guest does; `words` of each page move with each write, beside its counter."""

    size: int
    words: int
    contents: str
    downtime_limit_ms: int

    def spec(self, rate: int) -> str:
        """For `--guest`."""
        written = f"rate={rate},pattern=sweep,words={self.words},contents={self.contents}"
        return f"workload:size={self.size},{written}"


@dataclass(frozen=True, slots=True)
class Counted:
    """Figures of `query-migrate`. Pages: plain, zero and as differences."""

    syncs: int = 0
    wire_bytes: int = 0
    pages: int = 0
    delta_pages: int = 0

    @classmethod
    def of(cls, info: dict[str, Any]) -> Counted:
        """From an answer; `xbzrle-cache` is only there with the capability."""
        ram = info.get("ram", {})
        deltas = info.get("xbzrle-cache", {}).get("pages", 0)
        pages = ram.get("normal", 0) + ram.get("duplicate", 0) + deltas
        return cls(ram.get("dirty-sync-count", 0), ram.get("transferred", 0), pages, deltas)


@dataclass(frozen=True, slots=True)
class Trial:
    """One migration at one write rate.

    :ivar first_pass: counted at its end; `end`: at the end, or when patience was lost."""

    rate: int
    has_converged: bool
    took_s: float
    first_pass: Counted
    end: Counted

    @property
    def bytes_per_dirty_page(self) -> float:
        """What a page cost after the first pass; 0 where none was sent again."""
        pages = self.end.pages - self.first_pass.pages
        return (self.end.wire_bytes - self.first_pass.wire_bytes) / pages if pages > 0 else 0.0


def rates() -> list[int]:
    """Write rates that are tried, each a tenth above the last."""
    tried = [float(RATE_MIN)]
    while tried[-1] * RATE_STEP <= RATE_MAX:
        tried.append(tried[-1] * RATE_STEP)
    return [round(rate) for rate in tried]


def highest(trial_of: Callable[[int], Trial], tried: Sequence[int]) -> tuple[list[Trial], int]:
    """All trials of a bisection, and the highest rate that converged; 0 if none did."""
    trials = []
    low, high = -1, len(tried)  # low converges, high does not
    while high - low > 1:
        middle = (low + high) // 2
        trials.append(trial_of(tried[middle]))
        low, high = (middle, high) if trials[-1].has_converged else (low, middle)
    return trials, tried[low] if low >= 0 else 0


def trial(link: Link, guest: Guest, rate: int, patience_s: float, *, xbzrle: bool) -> Trial:
    """Migrate a guest that writes; cancel when it has not converged in `patience_s`.

    :raise NoDeltas: xbzrle was wanted, and no page that was sent again was a difference.
    :raise MigrationError: it failed, or a page was wrong."""
    done = asyncio.run(_trial(link, guest, rate, patience_s, xbzrle=xbzrle))
    if xbzrle and done.end.pages > done.first_pass.pages and not done.end.delta_pages:
        raise NoDeltas("the capability was taken, but no page was sent as a difference")
    return done


async def _trial(link: Link, guest: Guest, rate: int, patience_s: float, *, xbzrle: bool) -> Trial:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramferry-")))
        serve = [sys.executable, "-m", "engine.cli", "serve"]
        sides = []
        for name, end, spec, more in (
            ("s", link.source, guest.spec(rate), []),
            ("d", link.destination, f"workload:size={guest.size}", ["--incoming", "defer"]),
        ):
            line = [*serve, "--guest", spec, "--qmp", f"unix:{directory / name}", *more]
            sides.append(await stack.enter_async_context(side(end.inside(line), directory / name)))
        source, destination = sides
        settings = {"downtime-limit": guest.downtime_limit_ms, "xbzrle-cache-size": guest.size}
        capabilities = ("events", CAPABILITY) if xbzrle else ("events",)
        uri = await prepare(source, destination, Way(2, link), settings, capabilities)
        began = time.monotonic()
        await source.client.execute("migrate", {"uri": uri})
        has_converged, first_pass, last = await _watch(source, began + patience_s)
        took_s = time.monotonic() - began
        if has_converged:
            await _check(source, destination)
        return Trial(rate, has_converged, took_s, first_pass, last)


async def _watch(source: Side, deadline: float) -> tuple[bool, Counted, Counted]:
    """Until it has completed, or was cancelled after the deadline."""
    first_pass = Counted()
    while True:
        info: Any = await source.client.execute("query-migrate")
        counted = Counted.of(info)
        if counted.syncs <= 1:
            first_pass = counted
        if info["status"] == "completed":
            return True, first_pass, counted
        if info["status"] in ("failed", "cancelled"):
            raise MigrationError(f"a benchmark's migration ended as {info['status']}")
        if time.monotonic() > deadline:
            await _cancel(source)
            return False, first_pass, counted
        await asyncio.sleep(SAMPLE_S)


async def _cancel(source: Side) -> None:
    await source.client.execute("migrate_cancel")
    async with asyncio.timeout(CANCEL_WAIT_S):
        while True:
            info: Any = await source.client.execute("query-migrate")
            if info["status"] in ("cancelled", "completed", "failed"):
                return
            await asyncio.sleep(SAMPLE_S)


async def _check(source: Side, destination: Side) -> None:
    before: Any = await source.client.execute("x-judge")
    after: Any = await destination.client.execute("x-judge")
    found = verdict(
        Path(before["counters-path"]),
        Path(after["counters-path"]),
        after["page-writes"],
        after["vcpu-writes"],
    )
    if not found.is_right:
        raise MigrationError("a page is wrong at the destination")


def refusal() -> str | None:
    """Why ramferry cannot do xbzrle, in its own words; None if it takes the capability."""
    return asyncio.run(_refusal())


async def _refusal() -> str | None:
    with tempfile.TemporaryDirectory(prefix="ramferry-") as directory:
        ram, qmp = Path(directory) / "ram", Path(directory) / "qmp"
        ram.touch()
        os.truncate(ram, PROBE_SIZE)
        async with side(command("ramferry", ram, PROBE_SIZE, qmp, incoming=False), qmp) as one:
            wanted = [{"capability": CAPABILITY, "state": True}]
            try:
                await one.client.execute("migrate-set-capabilities", {"capabilities": wanted})
            except ExecuteError as exc:
                return str(exc)
    return None


def figures(trials: Sequence[Trial], best: int) -> dict[str, list[float]]:
    """For a report: of the fastest trial that converged, and all trials' number."""
    figures = {"highest_write_rate_mb_per_s": [best / 1e6], "trials": [float(len(trials))]}
    for one in trials:
        if one.rate == best and one.has_converged:
            figures |= {
                "total_time_s": [one.took_s],
                "rounds": [float(one.end.syncs)],
                "bytes_per_dirty_page": [one.bytes_per_dirty_page],
                "delta_pages": [float(one.end.delta_pages)],
            }
    return figures
