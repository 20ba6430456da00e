"""Codecs on links: rates x images x codecs of both engines, each cell's runs in turn."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import UsageError
from perf.codec import parse_codec
from perf.image import SHARED_MEMORY, write_image
from perf.links import Link, make_link, parse_rate, rate_text
from perf.pair import Contender, Run, Way, migrate_once, refusals
from perf.peer import check_run
from perf.report import spread
from perf.warm import warm_memory

LOOPBACK_RATE: Final = -1  #: no link at all, as `bench peer` has it
#: A raw image may take so long; on slower links a smaller one stands for it.
RAW_SECONDS_MAX: Final = 18
SIZE_MIN: Final = 64 * 1024 * 1024
FIGURES: Final = (
    "total_time_ms",
    "wall_time_ms",
    "cpu_s",
    "cpu_to_exit_s",
    "wire_bytes",
    "link_bytes",
)


@dataclass(frozen=True, slots=True)
class Row:
    """What all contenders of a row do.

    :ivar rate: bits per second, UNSHAPED or LOOPBACK_RATE.
    :ivar size: of the image that the figures are for.
    """

    rate: int
    image: str
    size: int

    @property
    def moved_size(self) -> int:
        """Of the image that is really moved: whole, or the largest part of 1/2^n of it that the
        link can carry raw in RAW_SECONDS_MAX."""
        moved = self.size
        while self.rate > 0 and moved > SIZE_MIN and moved * 8 > self.rate * RAW_SECONDS_MAX:
            moved = moved // 2 // 4096 * 4096
        return moved

    @property
    def scale(self) -> float:
        """Figures of the moved image times this are those of the whole one."""
        return self.size / self.moved_size

    def __str__(self) -> str:
        return f"{compress_rate_text(self.rate)}, {self.image}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A contender's runs in a row.

    :ivar took_s: all of that, with what is around the runs."""

    row: Row
    contender: Contender
    runs: tuple[Run, ...]
    took_s: float = 0.0

    def median(self, figure: str) -> float:
        """Of a figure of `Run`, for the whole image."""
        values = [float(getattr(run, figure)) for run in self.runs]
        return statistics.median(values) * self.row.scale


def compress_rate(text: str) -> int:
    """A rate of a link, or `loopback`.

    :raise UsageError: neither."""
    return LOOPBACK_RATE if text == "loopback" else parse_rate(text)


def compress_rate_text(rate: int) -> str:
    """A rate for people."""
    return "loopback" if rate == LOOPBACK_RATE else rate_text(rate)


def lacking(contenders: Iterable[Contender]) -> dict[Contender, str]:
    """Contenders that cannot be had here, and why: the engines are asked."""
    wanted: dict[str, list[Contender]] = {}
    for contender in contenders:
        wanted.setdefault(contender.engine, []).append(contender)
    refused: dict[Contender, str] = {}
    for engine, of_engine in wanted.items():
        reasons = asyncio.run(refusals(engine, [one.codec for one in of_engine]))
        refused |= {one: reasons[one.codec] for one in of_engine if one.codec in reasons}
    return refused


def measure(
    rows: Sequence[Row],
    contenders: Sequence[Contender],
    repeats: int,
    channels: int,
    say: Callable[[str], None],
) -> list[Cell]:
    """Every contender in every row; contenders take turns, and who begins alternates.

    :param say: gets a line a row.
    :raise UsageError: no link can be made, or there is not so much memory.
    :raise MigrationError: an engine failed, or left pages wrong."""
    cells: list[Cell] = []
    for image, size in dict.fromkeys((row.image, row.moved_size) for row in rows):
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="ramferry-bench-", dir=SHARED_MEMORY)
            path = Path(stack.enter_context(temporary)) / "image"
            write_image(path, size, image)
            stack.enter_context(warm_memory(size + size // 2))
            for row in rows:
                if (row.image, row.moved_size) == (image, size):
                    done = _measure_row(row, path, contenders, repeats, channels)
                    cells += done
                    times = (f"{one.contender} {seconds(one):.2f} s" for one in done)
                    say(f"{row}: {', '.join(times)} (measured in {took_s(done):.0f} s)")
    return in_order(cells)


def _measure_row(
    row: Row, image: Path, contenders: Sequence[Contender], repeats: int, channels: int
) -> list[Cell]:
    runs: dict[Contender, list[Run]] = {one: [] for one in contenders}
    took = dict.fromkeys(contenders, 0.0)
    with ExitStack() as stack:
        link: Link | None = None
        if row.rate != LOOPBACK_RATE:
            link = stack.enter_context(make_link(row.rate))
        for number in range(repeats):
            for one in contenders if number % 2 == 0 else contenders[::-1]:
                way, began_s = Way(channels, link), time.monotonic()
                run = asyncio.run(migrate_once(one, image, row.moved_size, way))
                check_run(one, run.different_pages)
                runs[one].append(run)
                took[one] += time.monotonic() - began_s
    return [Cell(row, one, tuple(of_one), took[one]) for one, of_one in runs.items()]


# -- a matrix in pieces --------------------------------------------------------------------------


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Image by image, slow links first."""
    images = list(dict.fromkeys(cell.row.image for cell in cells))

    def place(cell: Cell) -> tuple[int, bool, int]:
        rate = cell.row.rate
        return images.index(cell.row.image), rate <= 0, abs(rate)

    return sorted(cells, key=place)


def merged(old: Sequence[Cell], new: Sequence[Cell]) -> list[Cell]:
    """All cells; where both have a row's contender, the new one."""
    cells = {(cell.row, cell.contender): cell for cell in (*old, *new)}
    return in_order(list(cells.values()))


def took_s(cells: Iterable[Cell]) -> float:
    """How long it took to measure them."""
    return sum(cell.took_s for cell in cells)


def cells_of(data: Mapping[str, Any]) -> list[Cell]:
    """What `as_data` made a file of.

    :raise UsageError: it is none of these."""
    try:
        return [
            Cell(
                Row(_rate_of(row["rate_bits_per_s"]), row["image"], row["size_bytes"]),
                Contender(one["engine"], parse_codec(one["codec"])),
                tuple(Run(**run) for run in one["runs"]),
                one["took_s"],
            )
            for row in data["rows"]
            for one in row["contenders"]
        ]
    except (KeyError, TypeError, AttributeError) as exc:
        raise UsageError(f"these are no results of `bench compress`: {exc!r}") from exc


def _rate_of(value: int | str) -> int:
    return value if isinstance(value, int) else compress_rate(value)


# -- what the figures say ------------------------------------------------------------------------


def seconds(cell: Cell) -> float:
    """Median total time for the whole image."""
    return cell.median("total_time_ms") / 1000


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a row says; None where a side of the comparison was not measured.

    :ivar best_fixed: ramferry's fastest codec but `auto`.
    :ivar auto_to_best_fixed: its time over that one's: 1.05 is 5 % slower.
    :ivar qemu_to_ours: QEMU's fastest over ours: `auto`, or the best fixed codec without it."""

    best_fixed: Contender | None
    auto_to_best_fixed: float | None
    qemu_to_ours: float | None


def judge(cells: Sequence[Cell]) -> Judgement:
    """Compare the cells of one row."""
    times = {cell.contender: seconds(cell) for cell in cells}
    fixed = [one for one in times if one.engine == "ramferry" and one.codec.name != "auto"]
    autos = [one for one in times if one.engine == "ramferry" and one.codec.name == "auto"]
    qemus = [one for one in times if one.engine == "qemu"]
    best = min(fixed, key=times.__getitem__, default=None)
    ours = autos[0] if autos else best
    return Judgement(
        best,
        times[autos[0]] / times[best] if autos and best else None,
        min(times[one] for one in qemus) / times[ours] if qemus and ours else None,
    )


def by_row(cells: Iterable[Cell]) -> dict[Row, list[Cell]]:
    """Cells in the order they have, row by row."""
    rows: dict[Row, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row, []).append(cell)
    return rows


def as_data(cells: Sequence[Cell], refused: Mapping[Contender, str]) -> dict[str, Any]:
    """All figures for a file; those of a smaller image are as measured, with their `scale`."""
    rows = []
    for row, of_row in by_row(cells).items():
        judgement = judge(of_row)
        rows.append(
            {
                "rate_bits_per_s": row.rate if row.rate > 0 else compress_rate_text(row.rate),
                "image": row.image,
                "size_bytes": row.size,
                "moved_size_bytes": row.moved_size,
                "scale": row.scale,
                "best_fixed": str(judgement.best_fixed) if judgement.best_fixed else None,
                "auto_to_best_fixed_ratio": judgement.auto_to_best_fixed,
                "qemu_best_to_ramferry_ratio": judgement.qemu_to_ours,
                "contenders": [_contender_data(cell) for cell in of_row],
            }
        )
    return {
        "rows": rows,
        "lacking": {str(contender): reason for contender, reason in refused.items()},
    }


def _contender_data(cell: Cell) -> dict[str, Any]:
    figures = {name: spread([float(getattr(run, name)) for run in cell.runs]) for name in FIGURES}
    return {
        "engine": cell.contender.engine,
        "codec": str(cell.contender.codec),
        **figures,
        "took_s": cell.took_s,
        "runs": [asdict(run) for run in cell.runs],
    }


def rows_of(rates: Sequence[int], images: Sequence[str], size: int) -> list[Row]:
    """All rates for the first image, then for the next."""
    return [Row(rate, image, size) for image in images for rate in rates]
