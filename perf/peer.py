"""The same image moved by QEMU and by ramferry in turn: `ramferry bench peer`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.errors import MigrationError
from perf.image import SHARED_MEMORY, write_image
from perf.pair import Run, migrate_once
from perf.report import publish
from perf.warm import huge_pages, warm_memory

ENGINES: Final = ("qemu", "ramferry")
#: Device RAM and ROM that QEMU moves beside the guest's own memory are about 70 pages.
QEMU_OWN_PAGES_MAX: Final = 128
QEMU_DIFFERENT_PAGES_MAX: Final = 8  #: the reset of a guest that was never started writes a few


@dataclass(frozen=True, slots=True)
class Pair:
    """The same image moved by both engines, one after the other."""

    qemu: Run
    ours: Run
    first: str


def measure(image_kind: str, size: int, pairs: int, channels: int, *, hugetlb: bool) -> list[Pair]:
    """Pairs of runs, with RAM in shared memory or on 2 MiB huge pages.

    :raise UsageError: huge pages cannot be had.
    :raise MigrationError: an engine failed, or the two did not move the same pages."""
    with ExitStack() as stack:
        if hugetlb:
            directory = stack.enter_context(huge_pages(2 * size))
        else:
            temporary = tempfile.TemporaryDirectory(prefix="ramferry-bench-", dir=SHARED_MEMORY)
            directory = Path(stack.enter_context(temporary))
        image = directory / "image"
        write_image(image, size, image_kind)
        if not hugetlb:  # the image first: it takes what is warm, too
            stack.enter_context(warm_memory(size + size // 2))
        return asyncio.run(_pairs(image, size, pairs, channels))


async def _pairs(image: Path, size: int, pairs: int, channels: int) -> list[Pair]:
    """Who goes first alternates: what the first leaves to the second favours neither."""
    done = []
    for number in range(pairs):
        runs = {}
        order = ENGINES if number % 2 == 0 else ENGINES[::-1]
        for engine in order:
            runs[engine] = await migrate_once(engine, image, size, channels)
        done.append(Pair(runs["qemu"], runs["ramferry"], order[0]))
        check_pair(done[-1])
    return done


def check_pair(pair: Pair) -> None:
    """:raise MigrationError: the two did not do the same work, or not rightly."""
    qemu, ours = pair.qemu, pair.ours
    if ours.different_pages:
        raise MigrationError(f"{ours.different_pages} pages are wrong at the destination")
    if qemu.different_pages > QEMU_DIFFERENT_PAGES_MAX:
        raise MigrationError(f"QEMU left {qemu.different_pages} pages different")
    for kind in ("normal_pages", "zero_pages"):
        theirs, own = getattr(qemu, kind), getattr(ours, kind)
        if abs(theirs - own) > QEMU_OWN_PAGES_MAX:
            raise MigrationError(f"QEMU moved {theirs} {kind.replace('_', ' ')}, ramferry {own}")


def report(pairs: Sequence[Pair], *, as_json: bool, **context: object) -> None:
    """Medians of the pairs' ratios; above 1 ramferry needs less."""
    figures: dict[str, list[float]] = {}
    for name in ("total_time_ms", "wall_time_ms", "cpu_s", "cpu_to_exit_s", "cpu_before_migrate_s"):
        qemu = [float(getattr(pair.qemu, name)) for pair in pairs]
        ours = [float(getattr(pair.ours, name)) for pair in pairs]
        figures |= {f"qemu_{name}": qemu, f"ramferry_{name}": ours}
        if name != "cpu_before_migrate_s":
            title = name.removesuffix("_ms").removesuffix("_s")
            figures[f"{title}_ratio_qemu_to_ramferry"] = [
                theirs / own for theirs, own in zip(qemu, ours, strict=True)
            ]
    for name in ("normal_pages", "zero_pages", "different_pages"):
        figures[f"qemu_{name}"] = [float(getattr(pair.qemu, name)) for pair in pairs]
        figures[f"ramferry_{name}"] = [float(getattr(pair.ours, name)) for pair in pairs]
    first = ",".join(pair.first for pair in pairs)
    publish("peer", figures, as_json=as_json, first_of_each_pair=first, **context)


def plot(path: Path, results: dict[str, Sequence[Pair]]) -> None:
    """Each pair's times as points, QEMU beside ramferry."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.5 * len(results), 4), squeeze=False)
    for axis, (kind, pairs) in zip(axes[0], results.items(), strict=True):
        for pair in pairs:
            times = (pair.qemu.total_time_ms, pair.ours.total_time_ms)
            axis.plot((0, 1), times, "o-", color="tab:blue", alpha=0.6)
        axis.set_xticks((0, 1), ("QEMU", "ramferry"))
        axis.set_xlim(-0.4, 1.4)
        axis.set_ylim(0)
        axis.set_ylabel("total time, ms")
        axis.set_title(f"{kind} image, one line a pair")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
