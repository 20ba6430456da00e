"""A link that becomes slower in mid-run: `ramferry bench adapt`. What is sent, and which codec."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import MigrationError
from perf.codec import Codec
from perf.image import SHARED_MEMORY, write_image
from perf.links import Link, make_link, sent_bytes_around
from perf.pair import (
    RUN_WAIT_S,
    Contender,
    Side,
    Way,
    command,
    different_pages,
    prepare,
    side,
)
from perf.peer import check_run
from perf.warm import warm_memory

SAMPLE_S: Final = 0.05
#: A choice is what most batches of so many samples had: a policy tries others now and then.
WINDOW_SAMPLES: Final = 5
EDGE_S: Final = 0.3  #: of the migration's begin and the change, left out of throughputs
ENDS: Final = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Sample:
    """What `query-migrate` said.

    :ivar at_s: since `migrate`.
    :ivar moved_bytes: of RAM, done with: sent, or waiting in a socket to be sent.
    :ivar wire_bytes: what the link has carried, headers included.
    :ivar batches: so far, of all channels, by codec; empty while the engine does not tell."""

    at_s: float
    moved_bytes: int
    wire_bytes: int
    batches: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Trace:
    """One run; the link had its second rate from `changed_s` on."""

    samples: tuple[Sample, ...]
    changed_s: float
    total_time_s: float


def batches_by_codec(info: Mapping[str, Any]) -> dict[str, int]:
    """The sum over channels in `x-compression`: every object that is called `batches`."""
    total: Counter[str] = Counter()
    waiting = [info.get("x-compression")]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            for name, value in one.items():
                if name == "batches" and isinstance(value, Mapping):
                    total.update({codec: n for codec, n in value.items() if isinstance(n, int)})
                else:
                    waiting.append(value)
        elif isinstance(one, list):
            waiting += one
    return dict(total)


def sample_of(info: Mapping[str, Any], at_s: float, wire_bytes: int) -> Sample | None:
    """From an answer that has figures of RAM."""
    ram = info.get("ram")
    if ram is None:
        return None
    moved = ram["total"] - ram["remaining"]
    return Sample(at_s, moved, wire_bytes, batches_by_codec(info))


def measure(
    size: int, image: str, codec: Codec, rates: tuple[int, int], change_s: float, channels: int
) -> Trace:
    """Move an image and change the link's rate `change_s` after `migrate`.

    :raise UsageError: no link can be made here, or there is not so much memory.
    :raise MigrationError: it failed, or ended before the change."""
    with (
        make_link(rates[0]) as link,
        tempfile.TemporaryDirectory(prefix="ramferry-bench-", dir=SHARED_MEMORY) as directory,
    ):
        path = Path(directory) / "image"
        write_image(path, size, image)
        with warm_memory(size + size // 4):
            return asyncio.run(_run(path, size, codec, Way(channels, link), rates[1], change_s))


async def _run(
    image: Path, size: int, codec: Codec, way: Way, new_rate: int, change_s: float
) -> Trace:
    assert way.link is not None
    ram = image.parent / "ram"
    with tempfile.TemporaryDirectory(prefix="ramferry-bench-") as directory:
        source_qmp, destination_qmp = Path(directory) / "s", Path(directory) / "d"
        source_line = command("ramferry", image, size, source_qmp, incoming=False)
        destination_line = command("ramferry", ram, size, destination_qmp, incoming=True)
        async with (
            side(way.link.source.inside(source_line), source_qmp) as source,
            side(way.link.destination.inside(destination_line), destination_qmp) as destination,
        ):
            await source.client.execute("stop")
            uri = await prepare(source, destination, way, codec.parameters())
            began = time.monotonic()
            await source.client.execute("migrate", {"uri": uri})
            change = asyncio.create_task(_change(way.link, new_rate, began, change_s))
            try:
                samples, total_time_s = await _watch(source, began)
            finally:
                change.cancel()
                await asyncio.gather(change, return_exceptions=True)
            if change.cancelled():
                raise MigrationError(
                    f"the migration took {total_time_s:.1f} s and ended before the link changed; "
                    "use a larger --size"
                )
            wrong = different_pages(image, ram)
    check_run(Contender("ramferry", codec), wrong)
    return Trace(tuple(samples), change.result(), total_time_s)


async def _change(link: Link, rate: int, began: float, change_s: float) -> float:
    """Wait, change the rate, return when that was done."""
    await asyncio.sleep(began + change_s - time.monotonic())
    await asyncio.to_thread(link.set_rate, rate)
    return time.monotonic() - began


async def _watch(source: Side, began: float) -> tuple[list[Sample], float]:
    """Samples until the end, and the total time in seconds."""
    samples = []
    deadline = began + RUN_WAIT_S
    while time.monotonic() < deadline:
        asked = time.monotonic()
        info: Any = await source.client.execute("query-migrate")
        at_s = (asked + time.monotonic()) / 2 - began
        sample = sample_of(info, at_s, sent_bytes_around(source.process.pid))
        if sample is not None:
            samples.append(sample)
        if info["status"] == "completed":
            return samples, info["total-time"] / 1000
        if info["status"] in ENDS:
            raise MigrationError(f"a benchmark's migration ended as {info['status']}")
        await asyncio.sleep(max(0.0, asked + SAMPLE_S - time.monotonic()))
    raise MigrationError(f"a benchmark's migration took more than {RUN_WAIT_S:.0f} s")


# -- what a trace says ---------------------------------------------------------------------------


def shares(samples: Sequence[Sample]) -> Iterator[tuple[float, dict[str, float]]]:
    """For each window in which batches were sent its end, and each codec's share of them."""
    for first, last in zip(samples, samples[WINDOW_SAMPLES:], strict=False):
        sent = {name: last.batches[name] - first.batches.get(name, 0) for name in last.batches}
        total = sum(sent.values())
        if total > 0:
            yield last.at_s, {name: count / total for name, count in sent.items()}


def settle_s(trace: Trace) -> float | None:
    """From the change of the link until the codec chosen most was the one that the rest of the run
    was sent with; None where the engine does not tell, or no batch followed."""
    chosen = [(at, max(share, key=share.__getitem__)) for at, share in shares(trace.samples)]
    after = [(at, name) for at, name in chosen if at > trace.changed_s]
    if not after:
        return None
    late = [name for _, name in after[len(after) // 2 :]]
    final = Counter(late).most_common(1)[0][0]
    others = [at for at, name in after[: len(after) // 2] if name != final]
    return max(others, default=trace.changed_s) - trace.changed_s


def throughputs(samples: Sequence[Sample]) -> Iterator[tuple[float, float, float]]:
    """The middle of each window, RAM and wire in bytes per second."""
    for first, last in zip(samples, samples[WINDOW_SAMPLES:], strict=False):
        took = last.at_s - first.at_s
        moved, wire = last.moved_bytes - first.moved_bytes, last.wire_bytes - first.wire_bytes
        yield (first.at_s + last.at_s) / 2, moved / took, wire / took


def _mean(trace: Trace, begin_s: float, end_s: float) -> tuple[float, float]:
    """RAM and wire, bytes per second, between two times; 0 where there are not two samples."""
    inside = [sample for sample in trace.samples if begin_s <= sample.at_s <= end_s]
    if len(inside) < 2:
        return 0.0, 0.0
    first, last = inside[0], inside[-1]
    took = last.at_s - first.at_s
    return (last.moved_bytes - first.moved_bytes) / took, (
        last.wire_bytes - first.wire_bytes
    ) / took


def figures(trace: Trace) -> dict[str, list[float]]:
    """For a report."""
    before = _mean(trace, EDGE_S, trace.changed_s)
    after = _mean(trace, trace.changed_s + EDGE_S, trace.total_time_s)
    settled = settle_s(trace)
    return {
        "total_time_s": [trace.total_time_s],
        "changed_s": [trace.changed_s],
        "settled_after_change_s": [] if settled is None else [settled],
        "before_ram_mb_per_s": [before[0] / 1e6],
        "before_wire_mbit_per_s": [before[1] * 8 / 1e6],
        "after_ram_mb_per_s": [after[0] / 1e6],
        "after_wire_mbit_per_s": [after[1] * 8 / 1e6],
    }


def plot(path: Path, trace: Trace, title: str) -> None:
    """Throughput over time, and each codec's share of the batches below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (speed, choice) = pyplot.subplots(
        2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    times, ram, wire = zip(*throughputs(trace.samples), strict=True)
    speed.plot(times, [value * 8 / 1e9 for value in ram], label="RAM")
    speed.plot(times, [value * 8 / 1e9 for value in wire], label="wire")
    speed.set_ylabel("Gbit/s")
    speed.set_yscale("log")
    fastest = max(*ram, *wire) * 8 / 1e9
    speed.set_ylim(fastest / 200, fastest * 1.5)  # the end of a round sends next to nothing
    speed.set_title(title, fontsize=10)
    over_time = list(shares(trace.samples))
    if over_time:
        names = sorted({name for _, share in over_time for name in share})
        stacks = [[share.get(name, 0.0) for _, share in over_time] for name in names]
        choice.stackplot([at for at, _ in over_time], stacks, labels=names, alpha=0.8)
        choice.legend(loc="lower right", fontsize=8)
    else:
        choice.text(0.5, 0.5, "the engine does not tell", transform=choice.transAxes, ha="center")
    choice.set_ylim(0, 1)
    choice.set_ylabel("share of batches")
    choice.set_xlabel("s")
    for axis in (speed, choice):
        axis.axvline(trace.changed_s, color="black", linestyle="--", linewidth=1)
    speed.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
