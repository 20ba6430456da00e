"""What the demo does; how it looks is in display.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

from engine.api import Control, Statistics, verify
from engine.control.status import Status
from engine.demo.display import Display
from engine.demo.faults import Faults
from engine.errors import MigrationError, UsageError
from engine.guest.backing import check_available
from engine.guest.judgement import Verdict
from engine.guest.spec import WorkloadSpec, parse_guest_spec
from engine.sizes import parse_size

#: So that rounds do not end the migration before its guest is moved without all its pages.
POSTCOPY_DOWNTIME_LIMIT_MS: Final = 1
POSTCOPY_SAMPLE_S: Final = 0.05
SAMPLE_S: Final = 1.0  #: the guest's speed before and after is measured over so long


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The options of the command, sizes and rates as the user wrote them."""

    size: str = "1G"
    channels: int = 2
    codec: str = "none"
    max_bandwidth: str = "0"
    downtime_limit: int = 300
    rate: str = "200M"
    pattern: str = "hotspot"
    tracker: str = "auto"
    auto_converge: bool = False
    postcopy: bool = False

    def source_settings(self) -> list[str]:
        bandwidth = parse_size(self.max_bandwidth)
        limit_ms = POSTCOPY_DOWNTIME_LIMIT_MS if self.postcopy else self.downtime_limit
        return [
            *self._both(),
            f"multifd-compression={self.codec}",
            f"max-bandwidth={bandwidth}",
            f"max-postcopy-bandwidth={bandwidth}",
            f"downtime-limit={limit_ms}",
            f"x-tracker={self.tracker}",
            f"auto-converge={'on' if self.auto_converge else 'off'}",
        ]

    def destination_settings(self) -> list[str]:
        return self._both()

    def _both(self) -> list[str]:
        switch = "on" if self.postcopy else "off"
        return [f"multifd-channels={self.channels}", f"postcopy-ram={switch}"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found out; writes per second are page writes of 4096 bytes.

    :ivar touched_bytes: the guest's RAM that is no hole.
    :ivar writes_during: at the source.
    :ivar writes_missing: at the destination, as long as pages were missing.
    :ivar faults: None without postcopy.
    """

    statistics: Statistics
    verdict: Verdict | None
    touched_bytes: int
    writes_before: float
    writes_during: float
    writes_after: float
    writes_missing: float = 0.0
    faults: Faults | None = None

    @property
    def is_right(self) -> bool:
        completed = self.statistics.status is Status.COMPLETED
        return completed and self.verdict is not None and self.verdict.is_right

    def as_json(self) -> dict[str, Any]:
        verdict = self.verdict or Verdict(0, 0, 0)
        more: dict[str, Any] = {}
        if self.faults is not None:
            more["postcopy"] = self.faults.as_json()
            more["guest-writes-per-second-missing"] = round(self.writes_missing)
        return {
            "status": self.statistics.status.value,
            "error-desc": self.statistics.error,
            "query-migrate": dict(self.statistics.raw),
            "touched-bytes": self.touched_bytes,
            "verified-pages": verdict.verified_pages,
            "wrong-pages": verdict.wrong_pages,
            "lost-writes": verdict.lost_writes,
            "guest-writes-per-second-before": round(self.writes_before),
            "guest-writes-per-second-during": round(self.writes_during),
            "guest-writes-per-second-after": round(self.writes_after),
            "tracker": self.statistics.tracker,
            "placement": self.statistics.placement,
            **more,
        }


async def run_demo(options: DemoOptions, *, as_json: bool) -> int:
    """Run the demo; return the exit code: 0 only if completed and every page was right.

    :raise MigrationError: something could not be started; nothing is left behind."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    display = Display(quiet=as_json)
    try:
        outcome = await _demonstrate(options, display)
    except UsageError:
        raise
    except MigrationError as exc:
        if as_json:
            _write_json({"status": Status.FAILED.value, "error-desc": str(exc)})
        raise
    if as_json:
        _write_json(outcome.as_json())
    return 0 if outcome.is_right else 1


def _write_json(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")


async def _demonstrate(options: DemoOptions, display: Display) -> Outcome:
    guest = f"workload:size={options.size}"
    writing = f"{guest},rate={options.rate},pattern={options.pattern}"
    spec = parse_guest_spec(writing)  # a wrong option is told before anything is started
    assert isinstance(spec, WorkloadSpec)
    settings = options.source_settings()
    check_available(2 * spec.size, "a guest with its copy")
    display.starting(options.size, options.pattern, options.rate)
    source = Control.start(writing, settings=settings)
    destination = Control.start(guest, "tcp:127.0.0.1:0", options.destination_settings())
    async with source, destination:
        watch = Watch(source, destination, display)
        watch.before = await _writes_per_s(source)
        display.measured(watch.before)
        await (watch.postcopy() if options.postcopy else watch.precopy())
        outcome = await _judge(watch)
        display.ended(outcome)
        return outcome


async def _judge(watch: Watch) -> Outcome:
    """What became of it: the guest's speed now, and every page of both sides."""
    touched_bytes, verdict, after = await _touched_bytes(watch.source), None, 0.0
    if watch.statistics.status is Status.COMPLETED:
        after = await _writes_per_s(watch.destination)
        watch.display.checking()
        verdict = await verify(watch.source, watch.destination)
    return Outcome(
        watch.statistics, verdict, touched_bytes, watch.before, watch.during, after,
        watch.missing, watch.faults,
    )  # fmt: skip


async def _touched_bytes(control: Control) -> int:
    return sum(block["allocated"] for block in (await control.query_guest())["blocks"])


class Watch:
    """One migration that is shown, and the guest's page writes per second in its parts."""

    def __init__(self, source: Control, destination: Control, display: Display) -> None:
        self.source, self.destination, self.display = source, destination, display
        self.statistics = Statistics(Status.NONE)
        self.faults: Faults | None = None
        self.before = self.during = self.missing = 0.0

    async def precopy(self) -> None:
        began, writes = time.monotonic(), await _writes(self.source)
        migration = await self.source.migrate(self.destination)
        with self.display.live():
            async for self.statistics in migration.progress():
                self.display.show(self.statistics)
        self.during = _rate(began, await _writes(self.source) - writes)

    async def postcopy(self) -> None:
        """A whole round first, unless what it leaves is next to nothing."""
        began, writes, switched = time.monotonic(), await _writes(self.source), 0.0
        migration, is_asked = await self.source.migrate(self.destination), False
        with self.display.live():
            async for self.statistics in migration.progress(POSTCOPY_SAMPLE_S):
                if self.statistics.rounds > 1 and not is_asked and not self.statistics.postcopy:
                    is_asked = True
                    with contextlib.suppress(UsageError):  # it has ended this moment
                        await migration.start_postcopy()
                if self.statistics.postcopy:
                    switched = switched or time.monotonic()
                    await self._read_faults()
                self.display.show(self.statistics, self.faults)
        ended, there = time.monotonic(), await _writes(self.destination)
        here = await _writes(self.source)  # where it stands
        self.during = (here - writes) / max(1e-3, (switched or ended) - began)
        if switched:
            self.missing = (there - here) / max(1e-3, ended - switched)

    async def _read_faults(self) -> None:
        told = await self.destination.execute("query-migrate")
        self.faults = Faults.of(
            self.statistics.postcopy, told.get("x-postcopy", {}), time.monotonic_ns(),
            self.faults or Faults(),
        )  # fmt: skip


def _rate(began: float, count: int) -> float:
    return count / max(1e-3, time.monotonic() - began)


async def _writes(control: Control) -> int:
    return int((await control.query_guest())["writes"])


async def _writes_per_s(control: Control) -> float:
    began, writes = time.monotonic(), await _writes(control)
    await asyncio.sleep(SAMPLE_S)
    later, now = await _writes(control), time.monotonic()
    return (later - writes) / (now - began)
