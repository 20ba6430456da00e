"""`ramferry bench`: the suite as a command."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

import click

from engine.errors import UsageError
from engine.sizes import parse_size
from perf import adapt, compress, compresstable, delta, live, peer, postcopyreport, transport, vmm
from perf import clients as crowd
from perf.codec import parse_codec
from perf.image import KINDS
from perf.links import check_possible, make_link, parse_rate, rate_text
from perf.pair import QEMU, Contender
from perf.report import machine, publish

as_json = click.option("--json", "as_json", is_flag=True, help="JSON lines instead of tables")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure, and print medians with their spread; figures of other machines differ."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    """End as by Ctrl-C, also where that is ignored, as in the background of a script."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


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
@click.option("--codec", default="none", show_default=True, help="of both, like zstd:1")
@click.option("--hugetlb", is_flag=True, help="RAM on 2 MiB huge pages (needs root)")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="write a PNG")
@as_json
def bench_peer(
    size: str,
    pairs: int,
    image: str,
    channels: int,
    codec: str,
    hugetlb: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The same image moved by a real QEMU and by ramferry, in turn, guests stopped.

    With a codec that QEMU lacks (lz4, auto) ramferry is compared with itself without one."""
    chosen = parse_codec(codec)
    if shutil.which(QEMU) is None:
        raise UsageError(f"{QEMU} is not installed; on Debian: apt install qemu-system-x86")
    results: dict[str, peer.Measured] = {}
    for kind in ("mixed", "random") if image == "both" else (image,):
        results[kind] = peer.measure(
            kind, parse_size(size), pairs, channels, chosen, hugetlb=hugetlb
        )
        context = {"image": kind, "size": size, "channels": channels, "hugetlb": hugetlb}
        peer.report(results[kind], chosen, as_json=as_json, **context)
    if plot is not None:
        peer.plot(plot, results, chosen)


def _listed(text: str) -> list[str]:
    """A list with commas, each once, in its order."""
    return list(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))


def _progress(line: str) -> None:
    click.echo(line, err=True)


@bench.command("compress")
@click.option("--rates", default="100M,1G,2.5G,10G,unshaped", show_default=True, help="or loopback")
@click.option("--images", default="text,heap,random,mixed", show_default=True)
@click.option("--codecs", default="none,lz4,zstd:1,zstd:3,zlib:1,auto", show_default=True)
@click.option("--qemu-codecs", default="none,zstd:1", show_default=True, help="'': without QEMU")
@click.option("--size", default="2G", show_default=True)
@click.option("--pairs", default=3, show_default=True, type=click.IntRange(1), help="repeats")
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 255))
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--add", is_flag=True, help="to what the --json file has already, and show all")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="write a PNG")
def bench_compress(
    rates: str,
    images: str,
    codecs: str,
    qemu_codecs: str,
    size: str,
    pairs: int,
    channels: int,
    json_path: Path | None,
    add: bool,
    plot: Path | None,
) -> None:
    """Total times, wire bytes and CPU of codecs on shaped links (needs root), QEMU's beside.

    Guests stand still. Where 2 GiB would take a slow link too long a smaller image is moved and
    the figures are scaled; the table says so. What an engine lacks is skipped with a line.

    The whole matrix takes some 20 minutes a repeat. It can be measured in pieces: one of --rates
    or --images at a time, each with the same --json FILE and --add."""
    before = _measured_before(json_path) if add else []
    if unknown := [image for image in _listed(images) if image not in KINDS]:
        raise UsageError(f"image '{unknown[0][:100]}': one of {', '.join(KINDS)}")
    contenders = [Contender("ramferry", parse_codec(one)) for one in _listed(codecs)]
    if shutil.which(QEMU) is None:
        _progress(f"without QEMU's columns: {QEMU} is not installed")
    else:
        contenders += [Contender("qemu", parse_codec(one)) for one in _listed(qemu_codecs)]
    speeds = [compress.compress_rate(one) for one in _listed(rates)]
    rows = compress.rows_of(speeds, _listed(images), parse_size(size))
    if any(rate != compress.LOOPBACK_RATE for rate in speeds):
        check_possible()
    refused = compress.lacking(contenders)
    for contender, reason in refused.items():
        _progress(f"skipped: {contender}: {reason}")
    contenders = [one for one in contenders if one not in refused]
    if not (rows and contenders):
        raise UsageError("nothing is left to measure")
    measured = compress.measure(rows, contenders, pairs, channels, _progress)
    cells = compress.merged(before, measured)
    compresstable.show(cells)
    _progress(
        f"measured in {compress.took_s(measured):.0f} s, all that is shown in "
        f"{compress.took_s(cells):.0f} s"
    )
    if json_path is not None:
        data = {"bench": "compress", **machine(), **compress.as_data(cells, refused)}
        json_path.write_text(json.dumps(data, indent=1) + "\n")
    if plot is not None:
        compresstable.heat_map(plot, cells)


def _measured_before(path: Path | None) -> list[compress.Cell]:
    """:raise UsageError: there is no such file to add to, or it holds something else."""
    if path is None:
        raise UsageError("--add needs --json FILE")
    if not path.exists():
        return []
    try:
        return compress.cells_of(json.loads(path.read_text()))
    except ValueError as exc:
        raise UsageError(f"{path}: {exc}") from exc


@bench.command("adapt")
@click.option("--size", default="4G", show_default=True)
@click.option("--image", default="mixed", show_default=True, type=click.Choice([*KINDS]))
@click.option("--codec", default="auto", show_default=True)
@click.option("--rates", default="10G,1G", show_default=True, help="before and after the change")
@click.option("--change", "change_s", default=1.0, show_default=True, help="seconds after begin")
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 255))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="write a PNG")
@as_json
def bench_adapt(
    size: str,
    image: str,
    codec: str,
    rates: str,
    change_s: float,
    channels: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """A link that changes its rate in mid-run (needs root), and when the codec followed."""
    speeds = [parse_rate(one) for one in rates.split(",")]
    if len(speeds) != 2:
        raise UsageError(f"--rates {rates[:100]}: two rates, like 10G,1G")
    before, after = speeds
    chosen = parse_codec(codec)
    check_possible()
    for reason in compress.lacking([Contender("ramferry", chosen)]).values():
        _progress(f"skipped: ramferry {chosen}: {reason}")
        return
    trace = adapt.measure(parse_size(size), image, chosen, (before, after), change_s, channels)
    context = {"codec": str(chosen), "image": image, "size": size, "rates": rates}
    publish("adapt", adapt.figures(trace), as_json=as_json, **context)
    if plot is not None:
        title = f"{chosen}, {image} image: {rate_text(before)}, then {rate_text(after)}"
        adapt.plot(plot, trace, title)


@bench.command("delta")
@click.option("--size", default="256M", show_default=True)
@click.option("--words", default=4, show_default=True, type=click.IntRange(0, 508), help="a write")
@click.option("--contents", default="heap", show_default=True, help="of the guest's pages")
@click.option("--rate", "link_rate", default="1G", show_default=True, help="of the link")
@click.option("--limit", default=300, show_default=True, help="downtime-limit, ms")
@click.option("--patience", default=30.0, show_default=True, help="s; then it does not converge")
@as_json
def bench_delta(
    size: str,
    words: int,
    contents: str,
    link_rate: str,
    limit: int,
    patience: float,
    as_json: bool,
) -> None:
    """The highest write rate that converges, without and with xbzrle (needs root)."""
    guest = delta.Guest(parse_size(size), words, contents, limit)
    modes = {"none": False, "xbzrle": True}
    with make_link(parse_rate(link_rate)) as link:
        if (reason := delta.refusal()) is not None:
            _progress(f"skipped: ramferry xbzrle: {reason}")
            modes.pop("xbzrle")
        for name, xbzrle in modes.items():
            try:
                trials, best = delta.highest(
                    lambda rate, xbzrle=xbzrle: delta.trial(  # type: ignore[misc]
                        link, guest, rate, patience, xbzrle=xbzrle
                    ),
                    delta.rates(),
                )
            except delta.NoDeltas as exc:
                _progress(f"skipped: ramferry xbzrle: {exc}")
                continue
            context = {"mode": name, "size": size, "words": words, "link": link_rate}
            publish("delta", delta.figures(trials, best), as_json=as_json, **context)


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


@bench.command("postcopy")
@click.option(
    "--show", "parts", multiple=True, type=click.Choice(["faults", "switch", "speed"]),
    default=("faults", "switch", "speed"), show_default=True, help="what a missing page costs; how "
    "long the guest stands; how soon it is as fast as before",
)  # fmt: skip
@click.option("--size", default="1G", show_default=True, help="where faults are shown")
@click.option("--switch-size", default="4G", show_default=True)
@click.option("--dirty", default="1G", show_default=True, help="left at the switch")
@click.option("--speed-size", default="2G", show_default=True)
@click.option("--pattern", "patterns", multiple=True, default=postcopyreport.PATTERNS,
              show_default=True, type=click.Choice(postcopyreport.PATTERNS))  # fmt: skip
@click.option("--faults", default=10_000, show_default=True, help="where nothing is pushed")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 16))
@click.option("--hugetlb", is_flag=True, help="RAM on 2 MiB huge pages (needs root)")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="write a PNG")
@as_json
def bench_postcopy(
    parts: tuple[str, ...],
    size: str,
    switch_size: str,
    dirty: str,
    speed_size: str,
    patterns: tuple[str, ...],
    faults: int,
    runs: int,
    channels: int,
    hugetlb: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Postcopy as the guest sees it, and QEMU's beside."""
    plan = postcopyreport.Plan(runs, channels, hugetlb, as_json, faults)
    if "faults" in parts:
        postcopyreport.measure_faults(plan, size, plot)
    if "switch" in parts:
        postcopyreport.measure_switch(plan, switch_size, dirty)
    if "speed" in parts:
        postcopyreport.measure_recovery(plan, speed_size, patterns)


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


@bench.command("vmm")
@click.option(
    "--show", "parts", multiple=True, type=click.Choice(["live", "empty"]), default=("live",),
    show_default=True, help="a guest that sweeps its memory; one that never touched most of it",
)  # fmt: skip
@click.option("--size", default="1G", show_default=True, help="live: of RAM")
@click.option("--swept", default="510M", show_default=True, help="live: of it, at full speed")
@click.option("--empty-size", default="16G", show_default=True)
@click.option("--touched", default="1G", show_default=True, help="empty: once; 8M are swept")
@click.option("--limit", default=300, show_default=True, help="downtime-limit of both, ms")
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 255))
@click.option(
    "--codec", default="none", show_default=True,
    help="of both; lz4 and auto of ramferry alone, for QEMU's multifd has none of these",
)  # fmt: skip
@click.option("--auto-converge", is_flag=True, help="of both")
@click.option("--xbzrle", is_flag=True, help="of ramferry; QEMU's multifd cannot have it")
@click.option("--pairs", default=5, show_default=True, type=click.IntRange(1))
@as_json
def bench_vmm(
    parts: tuple[str, ...],
    size: str,
    swept: str,
    empty_size: str,
    touched: str,
    limit: int,
    channels: int,
    codec: str,
    auto_converge: bool,
    xbzrle: bool,
    pairs: int,
    as_json: bool,
) -> None:
    """A running QEMU and its guest migrated by QEMU's own multifd and by ramferry, in turn.

    Both over the loopback. Downtime is seen from outside, at the guest's serial port, and as each
    engine tells it. --show empty wants as much free memory as the guest has RAM, for QEMU."""
    if shutil.which(QEMU) is None:
        raise UsageError(f"{QEMU} is not installed; on Debian: apt install qemu-system-x86")
    shapes = {
        "live": vmm.shape_of(parse_size(size), parse_size(swept), parse_size(swept)),
        "empty": vmm.shape_of(
            parse_size(empty_size), parse_size(touched), min(parse_size(touched), 8 << 20)
        ),
    }
    for part in parts:
        plan = vmm.Plan(shapes[part], limit, channels, parse_codec(codec), auto_converge, xbzrle)
        figures, firsts = vmm.measure(plan, pairs)
        context = {
            "show": part, "size_mib": plan.shape.size >> 20, "swept_mib": plan.shape.swept >> 20,
            "limit_ms": limit, "channels": channels, "codec": codec, "xbzrle": xbzrle,
            "auto_converge": auto_converge, "first_of_each_pair": ",".join(firsts),
        }  # fmt: skip
        publish("vmm", figures, as_json=as_json, **context)
