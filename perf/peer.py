"""The same image moved by QEMU and by ramferry in turn: `ramferry bench peer`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.errors import MigrationError, UsageError
from perf import codecspeed
from perf.codec import Codec
from perf.codecspeed import Alone
from perf.image import SHARED_MEMORY, write_image
from perf.pair import Contender, Run, Way, migrate_once, refusals
from perf.report import publish
from perf.warm import huge_pages, warm_memory

#: Device RAM and ROM that QEMU moves beside the guest's own memory are about 70 pages.
QEMU_OWN_PAGES_MAX: Final = 128
QEMU_DIFFERENT_PAGES_MAX: Final = 8  #: the reset of a guest that was never started writes a few
ALONE: Final = ("lz4", "zstd", "zlib")  #: codecs that can be measured without an engine
COMPARED: Final = (
    "total_time_ms",
    "wall_time_ms",
    "cpu_s",
    "cpu_to_exit_s",
    "wire_bytes",
    "cpu_before_migrate_s",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same image moved by both, one after the other.

    :ivar theirs: QEMU's with the same codec, or ramferry's without where QEMU lacks the codec."""

    theirs: Run
    ours: Run
    first: str


def rivals(codec: Codec) -> tuple[Contender, Contender]:
    """Who is compared: QEMU and ramferry, or ramferry without and with the codec."""
    theirs = Contender("qemu", codec) if codec.is_qemus else Contender("ramferry")
    return theirs, Contender("ramferry", codec)


@dataclass(frozen=True, slots=True)
class Measured:
    """:ivar alone: the codec without a migration, where there is one."""

    pairs: tuple[Pair, ...]
    alone: Alone | None


def measure(
    image_kind: str, size: int, pairs: int, channels: int, codec: Codec, *, hugetlb: bool
) -> Measured:
    """Pairs of runs, with RAM in shared memory or on 2 MiB huge pages; then the codec alone, in as
    many processes as there are channels.

    :raise UsageError: huge pages cannot be had, or an engine lacks the codec.
    :raise MigrationError: an engine failed, or the two did not move the same pages."""
    for one in rivals(codec):
        for reason in asyncio.run(refusals(one.engine, [one.codec])).values():
            raise UsageError(f"{one}: {reason}")
    if codec.name in ALONE:
        codecspeed.coders(codec)
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
        done = asyncio.run(_pairs(image, size, pairs, channels, codec))
        if codec.name not in ALONE:
            return Measured(tuple(done), None)
        return Measured(tuple(done), asyncio.run(codecspeed.measure(image, codec, channels)))


async def _pairs(image: Path, size: int, pairs: int, channels: int, codec: Codec) -> list[Pair]:
    """Who goes first alternates: what the first leaves to the second favours neither."""
    done = []
    both = rivals(codec)
    for number in range(pairs):
        runs = {}
        order = both if number % 2 == 0 else both[::-1]
        for one in order:
            runs[one] = await migrate_once(one, image, size, Way(channels))
            check_run(one, runs[one].different_pages)
        done.append(Pair(runs[both[0]], runs[both[1]], name_of(order[0], codec)))
        check_pair(done[-1])
    return done


def name_of(contender: Contender, codec: Codec) -> str:
    """How figures are named: `qemu`, `ramferry`, or `none` for ramferry without the codec."""
    if contender == rivals(codec)[1]:
        return "ramferry"
    return "qemu" if contender.engine == "qemu" else "none"


def check_run(contender: Contender, different_pages: int) -> None:
    """:raise MigrationError: a run left pages wrong."""
    if contender.engine == "ramferry" and different_pages:
        raise MigrationError(f"{different_pages} pages are wrong at the destination")
    if different_pages > QEMU_DIFFERENT_PAGES_MAX:
        raise MigrationError(f"QEMU left {different_pages} pages different")


def check_pair(pair: Pair) -> None:
    """:raise MigrationError: the two did not do the same work."""
    for kind in ("normal_pages", "zero_pages"):
        theirs, own = getattr(pair.theirs, kind), getattr(pair.ours, kind)
        if abs(theirs - own) > QEMU_OWN_PAGES_MAX:
            raise MigrationError(
                f"the other moved {theirs} {kind.replace('_', ' ')}, ramferry {own}"
            )


def figures_of(pairs: Sequence[Pair], name: str) -> dict[str, list[float]]:
    """Both sides' figures and the pairs' ratios; above 1 ramferry needs less.

    :param name: of the other side."""
    figures: dict[str, list[float]] = {}
    for field in COMPARED:
        theirs = [float(getattr(pair.theirs, field)) for pair in pairs]
        ours = [float(getattr(pair.ours, field)) for pair in pairs]
        figures |= {f"{name}_{field}": theirs, f"ramferry_{field}": ours}
        if field != "cpu_before_migrate_s":
            title = field.removesuffix("_ms").removesuffix("_s")
            figures[f"{title}_ratio_{name}_to_ramferry"] = [
                their / own for their, own in zip(theirs, ours, strict=True)
            ]
    for field in ("normal_pages", "zero_pages", "different_pages"):
        figures[f"{name}_{field}"] = [float(getattr(pair.theirs, field)) for pair in pairs]
        figures[f"ramferry_{field}"] = [float(getattr(pair.ours, field)) for pair in pairs]
    return figures


def report(measured: Measured, codec: Codec, *, as_json: bool, **context: object) -> None:
    """Print the figures."""
    pairs = measured.pairs
    figures = figures_of(pairs, name_of(rivals(codec)[0], codec))
    if measured.alone is not None:
        figures |= measured.alone.figures([float(pair.ours.total_time_ms) for pair in pairs])
    first = ",".join(pair.first for pair in pairs)
    publish("peer", figures, as_json=as_json, codec=str(codec), first_of_each_pair=first, **context)


def plot(path: Path, results: dict[str, Measured], codec: Codec) -> None:
    """Each pair's times as points, the other beside ramferry."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4.5 * len(results), 4), squeeze=False)
    for axis, (kind, measured) in zip(axes[0], results.items(), strict=True):
        for pair in measured.pairs:
            times = (pair.theirs.total_time_ms, pair.ours.total_time_ms)
            axis.plot((0, 1), times, "o-", color="tab:blue", alpha=0.6)
        axis.set_xticks((0, 1), [str(one) for one in rivals(codec)])
        axis.set_xlim(-0.4, 1.4)
        axis.set_ylim(0)
        axis.set_ylabel("total time, ms")
        axis.set_title(f"{kind} image, one line a pair")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
