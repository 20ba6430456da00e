"""The same image moved by QEMU and by ramferry in turn: `ramferry bench peer`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from engine.errors import MigrationError
from perf.image import SHARED_MEMORY, write_image
from perf.pair import Run, migrate_once
from perf.report import publish
from perf.warm import huge_pages, warm_memory


def measure(
    image_kind: str, size: int, pairs: int, channels: int, *, hugetlb: bool
) -> list[tuple[Run, Run]]:
    """Pairs of (QEMU, ramferry), with RAM in shared memory or on 2 MiB huge pages.

    :raise UsageError: huge pages cannot be had.
    :raise MigrationError: an engine failed, or ramferry moved a page wrongly."""
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


async def _pairs(image: Path, size: int, pairs: int, channels: int) -> list[tuple[Run, Run]]:
    done = []
    for _ in range(pairs):
        qemu = await migrate_once("qemu", image, size, channels)
        ours = await migrate_once("ramferry", image, size, channels)
        if ours.different_pages:
            raise MigrationError(f"{ours.different_pages} pages are wrong at the destination")
        done.append((qemu, ours))
    return done


def report(pairs: Sequence[tuple[Run, Run]], *, as_json: bool, **context: object) -> None:
    """Medians of the pairs' ratios; above 1 ramferry needs less."""
    figures = {
        "qemu_total_time_ms": [float(qemu.total_time_ms) for qemu, _ in pairs],
        "ramferry_total_time_ms": [float(ours.total_time_ms) for _, ours in pairs],
        "total_time_ratio_qemu_to_ramferry": [
            qemu.total_time_ms / ours.total_time_ms for qemu, ours in pairs
        ],
        "qemu_cpu_s": [qemu.cpu_s for qemu, _ in pairs],
        "ramferry_cpu_s": [ours.cpu_s for _, ours in pairs],
        "cpu_ratio_qemu_to_ramferry": [qemu.cpu_s / ours.cpu_s for qemu, ours in pairs],
    }
    publish("peer", figures, as_json=as_json, **context)


def plot(path: Path, results: dict[str, Sequence[tuple[Run, Run]]]) -> None:
    """Each pair's times as points, QEMU beside ramferry."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.5 * len(results), 4), squeeze=False)
    for axis, (kind, pairs) in zip(axes[0], results.items(), strict=True):
        for qemu, ours in pairs:
            times = (qemu.total_time_ms, ours.total_time_ms)
            axis.plot((0, 1), times, "o-", color="tab:blue", alpha=0.6)
        axis.set_xticks((0, 1), ("QEMU", "ramferry"))
        axis.set_xlim(-0.4, 1.4)
        axis.set_ylim(0)
        axis.set_ylabel("total time, ms")
        axis.set_title(f"{kind} image, one line a pair")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
