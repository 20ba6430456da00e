"""How the demo looks: a live picture on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.api import Statistics
from engine.control.compression import auto_line
from engine.control.status import Status
from engine.memory.blocks import PAGE_SIZE

if TYPE_CHECKING:
    from engine.demo.faults import Faults
    from engine.demo.run import Outcome

CHANNELS_SHOWN_MAX: Final = 8
PLAIN_PERIOD_NS: Final = 1_000_000_000
PLAIN_WIDTH: Final = 120
WIDE: Final = 60  #: columns; narrower terminals get one fact a line and no bars a channel
PHASES: Final = ("pause", "harvest", "wait", "discard", "send", "acknowledge", "resume")


def bytes_text(count: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def rate_text(bytes_per_s: float) -> str:
    """Bytes per second for people."""
    return f"{bytes_text(bytes_per_s)}/s"


class Display:
    """Writes to stdout, or nothing at all when `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet, highlight=False)
        if not self._console.is_terminal and "COLUMNS" not in os.environ:
            self._console.width = PLAIN_WIDTH
        self._live: Live | None = None
        self._plain_ns = 0

    def starting(self, size: str, pattern: str, rate: str) -> None:
        limit = "at full speed" if rate == "0" else f"at {rate}B/s"
        self._console.print(
            f"[bold]ramferry demo[/]: a guest of {size} writes ({pattern}) {limit}; "
            "two control processes on this machine"
        )

    def measured(self, writes_per_s: float) -> None:
        self._console.print(f"guest before the migration: {self._writes(writes_per_s)}")

    def checking(self) -> None:
        self._console.print("checking every page on both sides ...")

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """The picture is kept up to date inside, and stays as it was at the end."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, refresh_per_second=10) as self._live:
            yield
        self._live = None

    def show(self, statistics: Statistics, faults: Faults | None = None) -> None:
        """Draw what is known now; `faults`: the guest runs at the destination."""
        if self._live is not None:
            self._live.update(picture(statistics, self._console.width, faults))
        elif statistics.total_bytes and time.monotonic_ns() - self._plain_ns > PLAIN_PERIOD_NS:
            self._plain_ns = time.monotonic_ns()
            self._console.print(_plain(statistics, faults))

    def ended(self, outcome: Outcome) -> None:
        """The table at the end, and the verdict."""
        self._console.print(_summary(outcome))
        self._console.print(_verdict(outcome))

    @staticmethod
    def _writes(writes_per_s: float) -> str:
        return f"{writes_per_s:,.0f} page writes/s ({rate_text(writes_per_s * PAGE_SIZE)})"


def _plain(statistics: Statistics, faults: Faults | None) -> str:
    if faults is not None:
        return (
            f"{statistics.status.value}: {bytes_text(faults.missing_bytes)} missing, "
            f"{faults.faults:,} faults of {faults.latency_mean_ns / 1000:.0f} us, "
            f"{rate_text(statistics.throughput_bytes_per_s)}"
        )
    return (
        f"{statistics.status.value}: round {statistics.rounds}, "
        f"{bytes_text(statistics.remaining_bytes)} remaining, "
        f"{rate_text(statistics.throughput_bytes_per_s)}{_auto(statistics, ', auto: ')}"
    )


def _auto(statistics: Statistics, before: str) -> str:
    """What `auto` does and why, behind `before`; nothing where it does nothing."""
    line = auto_line(statistics.compression)
    return f"{before}{line}" if line else ""


def picture(statistics: Statistics, width: int, faults: Faults | None = None) -> RenderableType:
    """Everything about a running migration, made for 24 lines of `width` columns."""
    left = statistics.remaining_bytes if faults is None else faults.missing_bytes
    facts = _precopy_facts(statistics) if faults is None else _postcopy_facts(statistics, faults)
    if statistics.throttle_percent:
        facts.append(("guest throttled", f"{statistics.throttle_percent} %"))
    ways = f"tracker {statistics.tracker}, placement {statistics.placement}"
    return Group(
        _facts(facts, in_a_row=2 if width >= WIDE else 1),
        _whole_line(
            ProgressBar(
                total=max(1, statistics.total_bytes), completed=statistics.total_bytes - left
            )
        ),
        _channels(statistics, width),
        *([Text(auto, style="dim")] if (auto := _auto(statistics, "auto: ")) else []),
        Text(ways if statistics.tracker else "", style="dim"),
    )


def _postcopy_facts(statistics: Statistics, faults: Faults) -> list[tuple[str, str]]:
    """The guest runs at the destination, and waits where it touches what is missing."""
    return [
        ("status", f"[bold]{statistics.status.value}[/]"),
        ("missing", bytes_text(faults.missing_bytes)),
        ("faults/s", f"{faults.faults_per_s:,.0f}"),
        ("requests/s", f"{faults.requests_per_s:,.0f}"),
        ("faults", f"{faults.faults:,}"),
        ("mean latency", f"{faults.latency_mean_ns / 1000:.0f} us"),
        ("on demand", f"{faults.demand_pages:,} pages"),
        ("prefetched", f"{faults.prefetch_pages:,} pages"),
        ("background", f"{faults.background_pages:,} pages"),
        ("throughput", rate_text(statistics.throughput_bytes_per_s)),
        ("downtime", f"{statistics.downtime_ms or 0} ms"),
        ("elapsed", f"{statistics.total_time_ms / 1000:.1f} s"),
    ]


def _precopy_facts(statistics: Statistics) -> list[tuple[str, str]]:
    return [
        ("status", f"[bold]{statistics.status.value}[/]"),
        ("round", str(statistics.rounds)),
        ("remaining", bytes_text(statistics.remaining_bytes)),
        ("dirty rate", rate_text(statistics.dirty_pages_per_s * PAGE_SIZE)),
        ("throughput", rate_text(statistics.throughput_bytes_per_s)),
        ("expected downtime", f"{statistics.expected_downtime_ms} ms"),
        ("elapsed", f"{statistics.total_time_ms / 1000:.1f} s"),
    ]


def _facts(facts: list[tuple[str, str]], in_a_row: int) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for first in range(0, len(facts), in_a_row):
        table.add_row(*itertools.chain.from_iterable(facts[first : first + in_a_row]))
    return table


def _whole_line(bar: ProgressBar) -> RenderableType:
    """A bar by itself does not end its line."""
    line = Table.grid(expand=True)
    line.add_row(bar)
    return line


def _channels(statistics: Statistics, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    shown_max = CHANNELS_SHOWN_MAX if width >= WIDE else CHANNELS_SHOWN_MAX // 2
    shown = statistics.channels[:shown_max]
    codecs = _codecs(statistics)
    fastest = max((channel["throughput-bytes-per-second"] for channel in shown), default=0)
    for channel in shown:
        rate = channel["throughput-bytes-per-second"]
        again = channel["incarnation"] - 1
        bar = ProgressBar(total=max(1, fastest), completed=rate, width=max(1, min(24, width - 40)))
        table.add_row(
            f"channel {channel['index']}",
            *([bar] if width >= WIDE else []),
            rate_text(rate),
            *([codecs.get(channel["index"], "")] if width >= WIDE else []),
            f"made anew {again}x" if again else "",
        )
    hidden = len(statistics.channels) - len(shown)
    return Group(table, Text(f"and {hidden} more")) if hidden > 0 else table


def _codecs(statistics: Statistics) -> dict[int, str]:
    """What each channel's newest batch was encoded with; nothing where nothing ever was."""
    channels = statistics.compression.get("channels", ())
    if not statistics.compression.get("tried-bytes"):
        return {}
    return {one["index"]: f"{one['codec']} {one['level'] or ''}" for one in channels}


def _compressed(compression: Mapping[str, Any]) -> str:
    """How much became how little, and by what."""
    batches: Counter[str] = Counter()
    for channel in compression["channels"]:
        batches.update(channel["batches"])
    counts = ", ".join(f"{name} {count}" for name, count in batches.items())
    plain, encoded = compression["plain-bytes"], compression["encoded-bytes"]
    return f"{bytes_text(plain)} became {bytes_text(encoded)} (batches: {counts})"


def _summary(outcome: Outcome) -> RenderableType:
    statistics = outcome.statistics
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("status", statistics.status.value)
    if statistics.error:
        table.add_row("error", statistics.error)
    if statistics.status is Status.COMPLETED:
        phases = ", ".join(
            f"{name} {statistics.phases_ns[name] / 1e6:.1f}"
            for name in PHASES
            if statistics.phases_ns.get(name)
        )
        table.add_row("total time", f"{statistics.total_time_ms} ms")
        table.add_row("downtime", f"{statistics.downtime_ms} ms ({phases})")
        table.add_row("expected downtime", f"{statistics.expected_downtime_ms} ms")
        table.add_row("rounds", str(statistics.rounds))
        table.add_row(
            "RAM",
            f"{bytes_text(statistics.total_bytes)}, {bytes_text(outcome.touched_bytes)} of it "
            "touched",
        )
        table.add_row("on the wire", bytes_text(statistics.transferred_bytes))
        if statistics.compression.get("tried-bytes"):
            table.add_row("compressed", _compressed(statistics.compression))
        table.add_row(
            "pages", f"{statistics.normal_pages:,} normal, {statistics.zero_pages:,} zero"
        )
        table.add_row("throughput", rate_text(statistics.throughput_bytes_per_s))
        table.add_row("tracker", f"{statistics.tracker} ({statistics.tracker_reason})")
        table.add_row("placement", statistics.placement)
    if outcome.faults is not None:
        _add_postcopy(table, outcome.faults)
    missing = ""
    if outcome.faults is not None:
        missing = f"{outcome.writes_missing:,.0f} while pages were missing, "
    table.add_row(
        "guest writes/s",
        f"{outcome.writes_before:,.0f} before, {outcome.writes_during:,.0f} during, "
        f"{missing}{outcome.writes_after:,.0f} after",
    )
    return table


def _add_postcopy(table: Table, faults: Faults) -> None:
    table.add_row("in postcopy", f"{faults.time_ms} ms")
    table.add_row("faults", f"{faults.faults:,}, with {faults.requests:,} requests")
    table.add_row(
        "fault latency",
        f"mean {faults.latency_mean_ns / 1000:.0f} us, p50 about {faults.latency_p50_us:.0f} us, "
        f"p99 about {faults.latency_p99_us:.0f} us",
    )
    table.add_row(
        "pages by cause",
        f"{faults.demand_pages:,} on demand, {faults.prefetch_pages:,} prefetched, "
        f"{faults.background_pages:,} in the background",
    )


def _verdict(outcome: Outcome) -> Text:
    verdict = outcome.verdict
    if outcome.statistics.is_outcome_unknown:
        return Text(
            "outcome unknown: the guest may run at the destination; at the source it stays stopped",
            style="bold red",
        )
    if verdict is None:
        return Text("not migrated: the guest runs at the source as before", style="bold red")
    if outcome.is_right:
        return Text(
            f"every page is right: {verdict.verified_pages:,} checked on both sides, 0 wrong",
            style="bold green",
        )
    return Text(
        f"{verdict.wrong_pages:,} of {verdict.verified_pages:,} pages are WRONG, "
        f"{verdict.lost_writes:,} writes lost",
        style="bold red",
    )
