"""The figures of `ramferry bench compress` for people: tables and a heat map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from perf.compress import Cell, Judgement, Row, by_row, compress_rate_text, judge, seconds

MIB: Final = 1024 * 1024
SLOWDOWN_MAX: Final = 8.0  #: the heat map's darkest
SCALED: Final = "*"
CONSOLE_WIDTH_MIN: Final = 140


def _contenders(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(str(cell.contender) for cell in cells))


def _row_name(row: Row) -> str:
    return f"{row}{SCALED if row.scale != 1 else ''}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(title: str, cells: Sequence[Cell], text: Callable[[Cell], str]) -> Table:
    """A line a row of the bench, a column a contender, and an empty place where one is lacking."""
    columns = _contenders(cells)
    made = Table(title=title)
    made.add_column("link, image", no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    for row, of_row in by_row(cells).items():
        texts = {str(cell.contender): text(cell) for cell in of_row}
        made.add_row(_row_name(row), *(texts.get(column, "") for column in columns))
    return made


def judgements(cells: Sequence[Cell]) -> Table:
    """What the rows say."""
    made = Table(title="ratios of total times")
    for column in ("link, image", "best fixed", "auto / best fixed", "QEMU's best / ours"):
        made.add_column(column)
    for row, of_row in by_row(cells).items():
        one: Judgement = judge(of_row)
        best = str(one.best_fixed.codec) if one.best_fixed else ""
        made.add_row(_row_name(row), best, _ratio(one.auto_to_best_fixed), _ratio(one.qemu_to_ours))
    return made


def show(cells: Sequence[Cell]) -> None:
    """Print everything."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, CONSOLE_WIDTH_MIN)
    console.print(table("total time, s", cells, lambda cell: f"{seconds(cell):.2f}"))
    console.print(
        table("on the wire, MiB", cells, lambda cell: f"{cell.median('wire_bytes') / MIB:.0f}")
    )
    console.print(table("CPU of both sides, s", cells, lambda cell: f"{cell.median('cpu_s'):.2f}"))
    console.print(judgements(cells))
    for row in by_row(cells):
        if row.scale != 1:
            console.print(
                f"{SCALED} {row}: measured with {row.moved_size // MIB} MiB, "
                f"shown times {row.scale:g}"
            )


def slowdowns(cells: Sequence[Cell]) -> dict[str, float]:
    """Each contender's time over the fastest of its row."""
    best = min(map(seconds, cells))
    return {str(cell.contender): seconds(cell) / best for cell in cells}


def heat_map(path: Path, cells: Sequence[Cell]) -> None:
    """A panel an image: links by contenders, coloured by the time over the row's best."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    columns = _contenders(cells)
    images = list(dict.fromkeys(cell.row.image for cell in cells))
    rows = by_row(cells)
    height = 1.3 + 0.42 * len(rows) / len(images)
    figure, axes = pyplot.subplots(
        len(images), 1, figsize=(2.6 + 0.95 * len(columns), height * len(images) + 0.8),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    norm = LogNorm(1, SLOWDOWN_MAX)
    for axis, image in zip(axes[:, 0], images, strict=True):
        of_image = {row: of_row for row, of_row in rows.items() if row.image == image}
        values = []
        for number, of_row in enumerate(of_image.values()):
            slow = slowdowns(of_row)
            values.append([slow.get(column, float("nan")) for column in columns])
            for cell in of_row:
                where = columns.index(str(cell.contender))
                is_dark = slow[str(cell.contender)] > SLOWDOWN_MAX**0.5
                is_best = slow[str(cell.contender)] == 1
                axis.text(
                    where, number, f"{seconds(cell):.3g} s", ha="center", va="center", fontsize=8,
                    color="white" if is_dark else "black", weight="bold" if is_best else "normal",
                )  # fmt: skip
        shown = axis.imshow(values, norm=norm, cmap="YlOrRd", aspect="auto")
        axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=20)
        names = [
            f"{compress_rate_text(row.rate)}{SCALED if row.scale != 1 else ''}" for row in of_image
        ]
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{image} image", fontsize=10)
    bar = figure.colorbar(shown, ax=axes[:, 0], shrink=0.8, ticks=[1, 2, 4, 8])
    bar.ax.set_yticklabels(["1", "2", "4", "≥ 8"])
    bar.ax.minorticks_off()
    bar.set_label("total time / fastest of the row")
    if any(row.scale != 1 for row in rows):
        figure.supxlabel(f"{SCALED} measured with a smaller image and scaled", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
