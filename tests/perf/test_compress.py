"""`bench compress`: what is asked for, and the arithmetic of its tables."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.errors import UsageError
from perf.codec import parse_codec
from perf.compress import (
    LOOPBACK_RATE,
    Cell,
    Row,
    as_data,
    by_row,
    cells_of,
    compress_rate,
    judge,
    lacking,
    merged,
    rows_of,
    seconds,
    took_s,
)
from perf.compresstable import heat_map, slowdowns, table
from perf.links import UNSHAPED
from perf.pair import QEMU, Contender, Run
from tests.perf.plotting import draw

MIB = 1024 * 1024
GIB = 1024 * MIB
GIGABIT = 10**9


def contender(text: str) -> Contender:
    engine, codec = text.split()
    return Contender(engine, parse_codec(codec))


def cell(row: Row, who: str, *times_ms: int) -> Cell:
    runs = [Run(ms, ms + 10.0, 0.5, ms / 500, 0.0, 1000, 500, 0, ms * 1000, 0) for ms in times_ms]
    return Cell(row, contender(who), tuple(runs))


@pytest.mark.parametrize(
    ("rate", "size", "moved"),
    [
        (10**8, 2 * GIB, 128 * MIB),
        (10**8, 64 * MIB, 64 * MIB),
        (10**6, GIB, 64 * MIB),
        (GIGABIT, 2 * GIB, 2 * GIB),
        (GIGABIT, 4 * GIB, 2 * GIB),
        (UNSHAPED, 64 * GIB, 64 * GIB),
        (LOOPBACK_RATE, 64 * GIB, 64 * GIB),
    ],
)
def test_a_slow_link_moves_a_smaller_image(rate: int, size: int, moved: int) -> None:
    row = Row(rate, "mixed", size)

    assert row.moved_size == moved
    assert row.scale == size / moved


def test_figures_of_a_smaller_image_are_scaled_medians() -> None:
    row = Row(10**8, "text", 2 * GIB)

    one = cell(row, "ramferry none", 1000, 9000, 2000)

    assert seconds(one) == 2.0 * 16
    assert one.median("wire_bytes") == 2_000_000 * 16


def test_rates_are_of_links_or_the_loopback() -> None:
    assert compress_rate("loopback") == LOOPBACK_RATE
    assert compress_rate("2.5G") == 2_500_000_000
    assert str(Row(LOOPBACK_RATE, "heap", GIB)) == "loopback, heap"
    assert str(Row(UNSHAPED, "heap", GIB)) == "unshaped, heap"


def test_rows_are_all_rates_of_each_image() -> None:
    rows = rows_of([10**8, GIGABIT], ["text", "heap"], GIB)

    assert [(row.image, row.rate) for row in rows] == [
        ("text", 10**8), ("text", GIGABIT), ("heap", 10**8), ("heap", GIGABIT),
    ]  # fmt: skip


def test_a_row_compares_auto_with_the_best_fixed_codec_and_qemus_best_with_auto() -> None:
    row = Row(GIGABIT, "mixed", GIB)
    cells = [
        cell(row, "ramferry none", 4000),
        cell(row, "ramferry zstd:1", 2000),
        cell(row, "ramferry auto", 2100),
        cell(row, "qemu none", 4200),
        cell(row, "qemu zstd:1", 3150),
    ]

    judgement = judge(cells)

    assert judgement.best_fixed == contender("ramferry zstd:1")
    assert judgement.auto_to_best_fixed == pytest.approx(1.05)
    assert judgement.qemu_to_ours == pytest.approx(1.5)
    assert slowdowns(cells)["qemu none"] == pytest.approx(2.1)


def test_a_row_without_auto_compares_the_best_fixed_codec_with_qemus_best() -> None:
    row = Row(GIGABIT, "mixed", GIB)
    cells = [cell(row, "ramferry none", 4000), cell(row, "ramferry lz4", 3000)]

    alone = judge(cells)
    beside = judge([*cells, cell(row, "qemu none", 4500)])

    assert (alone.auto_to_best_fixed, alone.qemu_to_ours) == (None, None)
    assert beside.qemu_to_ours == pytest.approx(1.5)
    assert judge([cell(row, "qemu none", 4500)]).best_fixed is None


def test_the_table_leaves_a_place_empty_where_an_engine_lacks_the_codec() -> None:
    row, slow = Row(GIGABIT, "mixed", GIB), Row(10**8, "mixed", 2 * GIB)
    cells = [
        cell(slow, "ramferry none", 1000),
        cell(row, "ramferry none", 4000),
        cell(row, "qemu none", 4500),
    ]
    output = io.StringIO()

    made = table("total time, s", cells, lambda one: f"{seconds(one):.2f}")
    Console(width=100, file=output).print(made)

    lines = [line for line in output.getvalue().splitlines() if "bit/s" in line]
    fields = [[field.strip() for field in line.strip("│").split("│")] for line in lines]
    assert fields == [["100 Mbit/s, mixed*", "16.00", ""], ["1 Gbit/s, mixed", "4.00", "4.50"]]


def test_a_matrix_may_be_measured_in_pieces() -> None:
    slow, fast = Row(10**8, "text", 2 * GIB), Row(LOOPBACK_RATE, "text", GIB)
    whole = [cell(slow, "ramferry none", 1000, 3000), cell(slow, "qemu zstd:1", 2000)]
    whole = [replace(one, took_s=7.0) for one in whole]
    again = [replace(cell(slow, "qemu zstd:1", 5), took_s=1.0)]
    more = [replace(cell(fast, "ramferry auto", 9), took_s=2.0)]

    first = cells_of(json.loads(json.dumps(as_data(whole, {}))))
    both = merged(merged(first, more), again)

    assert first == whole
    assert both == [whole[0], again[0], more[0]]
    assert took_s(both) == 10
    assert merged(more, whole) == [*whole, *more]


@pytest.mark.parametrize("wrong", [{}, {"rows": [1]}, {"rows": [{"image": "text"}]}, []])
def test_what_is_no_result_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="no results of `bench compress`"):
        cells_of(wrong)


def test_data_for_a_file_is_as_measured_with_its_scale_and_what_lacks() -> None:
    row = Row(10**8, "text", 2 * GIB)
    cells = [cell(row, "ramferry none", 1000, 3000), cell(row, "qemu none", 2000)]

    data = json.loads(json.dumps(as_data(cells, {contender("qemu lz4"): "unknown"})))

    (found,) = data["rows"]
    assert found["scale"] == 16
    assert found["moved_size_bytes"] == 128 * MIB
    assert found["contenders"][0]["total_time_ms"]["median"] == 2000
    assert found["contenders"][0]["total_time_ms"]["n"] == 2
    assert found["qemu_best_to_ramferry_ratio"] == 1
    assert data["lacking"] == {"qemu lz4:1": "unknown"}


def test_a_heat_map_has_a_panel_an_image_and_stands_a_gap(tmp_path: Path) -> None:
    rows = rows_of([10**8, UNSHAPED], ["text", "mixed"], GIB)
    cells = [cell(row, who, 1000) for row in rows for who in ("ramferry none", "qemu none")]

    draw(heat_map, tmp_path / "map.png", cells[:-1])

    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert list(by_row(cells)) == rows
    assert math.isclose(max(slowdowns(cells[:2]).values()), 1.0)


@pytest.mark.process
def test_an_engine_says_itself_what_it_lacks() -> None:
    lacks = contender("ramferry zstd:99999999")

    refused = lacking([contender("ramferry none"), lacks])

    assert list(refused) == [lacks]
    assert refused[lacks]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine.cli", "bench", "compress", *arguments],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rates", "fast"), "bits a second, or unshaped"),
        (("--images", "text,blue"), "image 'blue': one of"),
        (("--codecs", "gzip"), "codec 'gzip': one of"),
        (("--codecs", "", "--qemu-codecs", "", "--rates", "loopback"), "nothing is left"),
    ],
)
def test_a_wrong_choice_is_refused_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = bench(*arguments)

    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.process
@pytest.mark.guest
def test_compress_moves_an_image_with_both_engines_over_the_loopback(tmp_path: Path) -> None:
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed; CI installs it")
    out, plot = tmp_path / "out.json", tmp_path / "map.png"
    choice = ["--rates", "loopback", "--images", "heap", "--codecs", "none", "--size", "32M"]
    rest = ["--qemu-codecs", "none,lz4", "--pairs", "2", "--json", str(out), "--plot", str(plot)]

    done = bench(*choice, *rest)

    assert done.returncode == 0, done.stderr
    assert "skipped: qemu lz4:1: " in done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert [one["engine"] for one in row["contenders"]] == ["ramferry", "qemu"]
    for one in row["contenders"]:
        assert one["total_time_ms"]["n"] == 2
        assert one["wire_bytes"]["min"] > 32 * MIB
        assert one["cpu_s"]["min"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
