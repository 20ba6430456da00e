"""`ramferry bench`: the suite as a command."""

from __future__ import annotations

import asyncio
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from engine.errors import UsageError
from engine.sizes import parse_size
from perf import clients as crowd
from perf import faults, live, peer, transport
from perf.image import KINDS
from perf.pair import QEMU
from perf.report import publish

as_json = click.option("--json", "as_json", is_flag=True, help="JSON lines instead of tables")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure, and print medians with their spread; figures of other machines differ."""


def _repeat(once: Callable[[], Awaitable[dict[str, float]]], runs: int) -> dict[str, list[float]]:
    async def all_runs() -> dict[str, list[float]]:
        figures: dict[str, list[float]] = defaultdict(list)
        for _ in range(runs):
            for name, value in (await once()).items():
                figures[name].append(value)
        return dict(figures)

    return asyncio.run(all_runs())


@bench.command("peer")
@click.option("--size", default="2G", show_default=True)
@click.option("--pairs", default=7, show_default=True, type=click.IntRange(1))
@click.option("--image", default="both", show_default=True, type=click.Choice([*KINDS, "both"]))
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 255))
@click.option("--hugetlb", is_flag=True, help="RAM on 2 MiB huge pages (needs root)")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="write a PNG")
@as_json
def bench_peer(
    size: str,
    pairs: int,
    image: str,
    channels: int,
    hugetlb: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The same image moved by a real QEMU and by ramferry, in turn, guests stopped."""
    if shutil.which(QEMU) is None:
        raise UsageError(f"{QEMU} is not installed; on Debian: apt install qemu-system-x86")
    results: dict[str, Any] = {}
    for kind in KINDS if image == "both" else [image]:
        results[kind] = peer.measure(kind, parse_size(size), pairs, channels, hugetlb=hugetlb)
        context = {"image": kind, "size": size, "channels": channels, "hugetlb": hugetlb}
        peer.report(results[kind], as_json=as_json, **context)
    if plot is not None:
        peer.plot(plot, results)


@bench.command("clients")
@click.option("--size", default="2G", show_default=True)
@click.option("--max-bandwidth", "bandwidth", default="0", show_default=True, help="0: all")
@click.option("--clients", default=50, show_default=True, type=click.IntRange(1, 60))
@click.option("--rate", default=100.0, show_default=True, help="queries a second of each")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@as_json
def bench_clients(
    size: str, bandwidth: str, clients: int, rate: float, runs: int, as_json: bool
) -> None:
    """What monitors that poll query-migrate cost a migration, and how long they wait."""
    figures = _repeat(lambda: crowd.clients_once(size, bandwidth, clients, rate), runs)
    context = {"size": size, "max_bandwidth": bandwidth, "clients": clients, "rate_hz": rate}
    publish("clients", figures, as_json=as_json, **context)


#: Pattern, rate and downtime-limit (ms) of guests that are as different as the workload can be.
MIXED_WORKLOADS = [
    ("sweep", "50M", 300), ("hotspot", "200M", 100), ("random", "100M", 300),
    ("append", "100M", 100), ("hotspot", "400M", 300), ("random", "30M", 50),
    ("sweep", "150M", 500),
]  # fmt: skip


@bench.command("expected")
@click.option("--size", default="1G", show_default=True)
@click.option("--runs", default=20, show_default=True, type=click.IntRange(1))
@as_json
def bench_expected(size: str, runs: int, as_json: bool) -> None:
    """How far real downtimes are from the last expected-downtime, over mixed workloads."""
    workloads = iter(MIXED_WORKLOADS * runs)

    async def once() -> dict[str, float]:
        pattern, rate, limit_ms = next(workloads)
        return await live.downtime_once(size, rate, limit_ms, pattern)

    publish("expected", _repeat(once, runs), as_json=as_json, size=size)


@bench.command("downtime")
@click.option("--size", default="2G", show_default=True)
@click.option("--rate", default="200M", show_default=True)
@click.option("--limit", "limits", multiple=True, type=int, default=(30, 100, 300), help="ms")
@click.option("--runs", default=10, show_default=True, type=click.IntRange(1))
@as_json
def bench_downtime(size: str, rate: str, limits: tuple[int, ...], runs: int, as_json: bool) -> None:
    """Real downtime of a guest that writes to a hot spot, against downtime-limit."""
    for limit in limits:
        figures = _repeat(lambda limit=limit: live.downtime_once(size, rate, limit), runs)  # type: ignore[misc]
        publish("downtime", figures, as_json=as_json, limit_ms=limit, size=size, rate=rate)


@bench.command("bandwidth")
@click.option("--limit", "limits", multiple=True, default=("10000000", "100000000", "1000000000"))
@click.option("--seconds", default=4.0, show_default=True)
@as_json
def bench_bandwidth(limits: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """How far any second is from max-bandwidth."""
    for limit in limits:
        rate = parse_size(limit)
        figures = _repeat(
            lambda rate=rate: live.bandwidth_once(rate, seconds),  # type: ignore[misc]
            1,
        )
        publish("bandwidth", figures, as_json=as_json, limit_bytes_per_s=rate)


@bench.command("empty")
@click.option("--size", default="16G", show_default=True)
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@as_json
def bench_empty(size: str, runs: int, as_json: bool) -> None:
    """A guest that never touched its RAM."""
    for guest in ("ram", "workload"):
        figures = _repeat(lambda guest=guest: live.empty_once(size, guest), runs)  # type: ignore[misc]
        publish("empty", figures, as_json=as_json, guest=guest, size=size)


@bench.command("footprint")
@click.option("--size", "sizes", multiple=True, default=("1G", "8G"))
@click.option("--channels", multiple=True, type=int, default=(2, 8))
@as_json
def bench_footprint(sizes: tuple[str, ...], channels: tuple[int, ...], as_json: bool) -> None:
    """Each worker's own memory: PSS without RAM and bitmaps."""
    for size in sizes:
        for count in channels:
            figures = _repeat(
                lambda size=size, count=count: live.footprint_once(size, count),  # type: ignore[misc]
                1,
            )
            publish("footprint", figures, as_json=as_json, size=size, channels=count)


@bench.command("faults")
@click.option("--size", default="256M", show_default=True, help="touched, and pushed by nobody")
@click.option("--background", default="1536M", show_default=True, help="pushed meanwhile")
@click.option("--touches", default=5000, show_default=True, type=click.IntRange(1))
@click.option(
    "--pattern", default="random", show_default=True, type=click.Choice([*faults.STRIDES])
)
@click.option("--prefetch", default=0, show_default=True, help="pages asked for at once in advance")
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 16))
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@as_json
def bench_faults(
    size: str,
    background: str,
    touches: int,
    pattern: str,
    prefetch: int,
    channels: int,
    runs: int,
    as_json: bool,
) -> None:
    """Postcopy: a page that is missing, with and without background, in turn."""
    backgrounds = sorted({0, parse_size(background)})
    results = faults.measure(
        parse_size(size), touches, runs, backgrounds,
        channels=channels, prefetch=prefetch, pattern=pattern,
    )  # fmt: skip
    for pushed, (figures, buckets) in results.items():
        context = {"size": size, "background_bytes": pushed, "channels": channels,
                   "pattern": pattern, "prefetch_pages": prefetch}  # fmt: skip
        publish("faults", figures, as_json=as_json, touches_by_us=buckets, **context)
        if not as_json:
            click.echo(faults.histogram(buckets))


@bench.command("transport")
@click.option("--count", default=5000, show_default=True, type=click.IntRange(100))
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1))
@as_json
def bench_transport(count: int, runs: int, as_json: bool) -> None:
    """A request and a page between two processes, over ZeroMQ and over plain TCP, in turn."""
    figures: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        for kind in transport.KINDS:
            took = sorted(transport.round_trips(kind, count))
            figures[f"{kind}_p50_us"].append(took[count // 2] / 1e3)
            figures[f"{kind}_p99_us"].append(took[count * 99 // 100] / 1e3)
    publish("transport", figures, as_json=as_json, count=count)
