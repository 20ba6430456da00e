"""What the demo does; how it looks is in display.py."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

from engine.api import Control, Migration, Statistics, verify
from engine.control.status import Status
from engine.demo.display import Display
from engine.errors import MigrationError, UsageError
from engine.guest.backing import check_available
from engine.guest.judgement import Verdict
from engine.guest.spec import WorkloadSpec, parse_guest_spec
from engine.sizes import parse_size

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

    def source_settings(self) -> list[str]:
        return [
            f"multifd-channels={self.channels}",
            f"multifd-compression={self.codec}",
            f"max-bandwidth={parse_size(self.max_bandwidth)}",
            f"downtime-limit={self.downtime_limit}",
            f"x-tracker={self.tracker}",
            f"auto-converge={'on' if self.auto_converge else 'off'}",
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found out; writes per second are page writes of 4096 bytes.

    :ivar touched_bytes: the guest's RAM that is no hole.
    """

    statistics: Statistics
    verdict: Verdict | None
    touched_bytes: int
    writes_before: float
    writes_during: float
    writes_after: float

    @property
    def is_right(self) -> bool:
        completed = self.statistics.status is Status.COMPLETED
        return completed and self.verdict is not None and self.verdict.is_right

    def as_json(self) -> dict[str, Any]:
        verdict = self.verdict or Verdict(0, 0, 0)
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
    destination = Control.start(guest, "tcp:127.0.0.1:0", [f"multifd-channels={options.channels}"])
    async with source, destination:
        before = await _writes_per_s(source)
        display.measured(before)
        statistics, during = await _watch(source, destination, display)
        touched_bytes = await _touched_bytes(source)
        if statistics.status is not Status.COMPLETED:
            outcome = Outcome(statistics, None, touched_bytes, before, during, 0.0)
        else:
            after = await _writes_per_s(destination)
            display.checking()
            verdict = await verify(source, destination)
            outcome = Outcome(statistics, verdict, touched_bytes, before, during, after)
        display.ended(outcome)
        return outcome


async def _touched_bytes(control: Control) -> int:
    return sum(block["allocated"] for block in (await control.query_guest())["blocks"])


async def _watch(
    source: Control, destination: Control, display: Display
) -> tuple[Statistics, float]:
    """Migrate and show it; return the end and the guest's page writes per second meanwhile."""
    began, writes = time.monotonic(), (await source.query_guest())["writes"]
    migration: Migration = await source.migrate(destination)
    statistics = await migration.statistics()
    with display.live():
        async for statistics in migration.progress():
            display.show(statistics)
    elapsed = time.monotonic() - began
    writes = (await source.query_guest())["writes"] - writes
    return statistics, writes / max(1e-3, elapsed)


async def _writes_per_s(control: Control) -> float:
    began, writes = time.monotonic(), (await control.query_guest())["writes"]
    await asyncio.sleep(SAMPLE_S)
    later, now = (await control.query_guest())["writes"], time.monotonic()
    return float((later - writes) / (now - began))
