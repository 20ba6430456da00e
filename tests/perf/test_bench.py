"""The benchmarks in their smallest form: they run, and their figures can be trusted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import MigrationError
from perf.image import KINDS, kinds_of_pages, write_image
from perf.live import _windows
from perf.pair import QEMU, Contender, Run, different_pages
from perf.peer import Pair, check_pair, check_run, figures_of
from perf.report import spread
from tests.kernel import has_userfaultfd

process = pytest.mark.process


def bench(*arguments: str) -> list[dict[str, Any]]:
    """JSON lines of `ramferry bench`."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "bench", *arguments, "--json"],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pages_have_their_shares(kind: str) -> None:
    pages = kinds_of_pages(kind, 100_000, seed=3)

    for name, share in KINDS[kind].items():
        assert pages.count(name) / len(pages) == pytest.approx(share, abs=0.03)


def test_an_image_is_the_same_every_time_and_its_zero_pages_are_no_holes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        write_image(path, 4 * 1024 * 1024, "mixed", seed=5)

    pages = np.fromfile(one, dtype=np.uint8).reshape(-1, 4096)
    zero = int((~pages.any(axis=1)).sum())
    assert one.read_bytes() == other.read_bytes()
    assert zero == kinds_of_pages("mixed", 1024, seed=5).count("zero")
    assert one.stat().st_blocks * 512 >= 4 * 1024 * 1024


def test_one_changed_byte_is_one_different_page(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    content = bytearray(np.random.default_rng(1).bytes(64 * 4096))
    one.write_bytes(content)
    content[17 * 4096 + 5] ^= 1
    other.write_bytes(content)

    assert different_pages(one, other) == 1


def test_windows_are_a_second_long_and_count_what_was_sent_in_them() -> None:
    """When a count was taken is not known better than that it was asked for and answered."""
    samples = [(i / 100, i / 100 + 0.004, i * 1000) for i in range(300)]

    windows = list(_windows(samples))

    assert windows
    for shortest, longest, sent in windows:
        assert shortest == pytest.approx(1.0, abs=0.011)
        assert longest == pytest.approx(shortest + 0.008)
        assert sent == pytest.approx((shortest + 0.004) * 100_000)


def test_spread_names_the_median() -> None:
    assert spread([3.0, 1.0, 2.0]) == {
        "median": 2.0, "mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0, "n": 3,
    }  # fmt: skip


def run(**changes: int) -> Run:
    return replace(Run(100, 110.0, 0.5, 0.2, 0.3, 1000, 500, 0, 4_000_000, 0), **changes)


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        ({"normal_pages": 1200}, {}, "the other moved 1200 normal pages, ramferry 1000"),
        ({}, {"zero_pages": 800}, "the other moved 500 zero pages, ramferry 800"),
    ],
)
def test_a_pair_that_did_not_do_the_same_work_is_no_figure(
    theirs: dict[str, int], ours: dict[str, int], says: str
) -> None:
    check_pair(Pair(run(normal_pages=1070), run(), "qemu"))
    with pytest.raises(MigrationError, match=says):
        check_pair(Pair(run(**theirs), run(**ours), "qemu"))


@pytest.mark.parametrize(
    ("engine", "allowed", "wrong", "says"),
    [
        ("ramferry", 0, 1, "1 pages are wrong"),
        ("qemu", 8, 9, "QEMU left 9 pages different"),
    ],
)
def test_a_run_that_left_wrong_pages_is_no_figure(
    engine: str, allowed: int, wrong: int, says: str
) -> None:
    check_run(Contender(engine), allowed)
    with pytest.raises(MigrationError, match=says):
        check_run(Contender(engine), wrong)


def test_ratios_are_above_one_where_ramferry_needs_less() -> None:
    pairs = [Pair(run(total_time_ms=300), run(wire_bytes=8_000_000), "none")] * 3

    figures = figures_of(pairs, "none")

    assert figures["total_time_ratio_none_to_ramferry"] == [3.0] * 3
    assert figures["wire_bytes_ratio_none_to_ramferry"] == [0.5] * 3
    assert figures["ramferry_wire_bytes"] == [8_000_000.0] * 3


@process
@pytest.mark.guest
def test_peer_moves_the_same_image_with_both_engines_and_plots(tmp_path: Path) -> None:
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed; CI installs it")
    plot = tmp_path / "peer.png"

    (line,) = bench(
        "peer", "--size", "64M", "--pairs", "2", "--image", "mixed", "--plot", str(plot)
    )

    assert line["total_time_ratio_qemu_to_ramferry"]["n"] == 2
    assert line["first_of_each_pair"] == "qemu,ramferry"
    for name in ("qemu", "ramferry"):
        assert line[f"{name}_wall_time_ms"]["min"] >= line[f"{name}_total_time_ms"]["min"]
        assert line[f"{name}_cpu_before_migrate_s"]["min"] > 0
    assert line["ramferry_different_pages"]["max"] == 0
    assert line["ramferry_cpu_s"]["min"] > 0
    assert line["qemu_cpu_s"]["min"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@process
def test_downtime_and_the_guests_speed_are_measured() -> None:
    (line,) = bench("downtime", "--size", "64M", "--rate", "20M", "--limit", "300", "--runs", "1")

    assert 0 < line["downtime_ms"]["max"] < line["total_time_ms"]["max"]
    assert line["guest_speed_during_to_before_ratio"]["min"] > 0


@process
def test_a_guest_that_touched_nothing_costs_nothing() -> None:
    lines = bench("empty", "--size", "4G", "--runs", "1")

    assert [line["guest"] for line in lines] == ["ram", "workload"]
    for line in lines:
        assert line["ram_allocated_mib"]["max"] < 1


@process
def test_no_second_goes_over_the_bandwidth_limit() -> None:
    """A busy machine may send less than the limit; nothing may make it send more."""
    (line,) = bench("bandwidth", "--limit", "20000000", "--seconds", "2.5")

    assert line["over_max_percent"]["max"] <= 5


@process
def test_workers_need_little_memory_of_their_own() -> None:
    (line,) = bench("footprint", "--size", "256M", "--channels", "2")

    for role in ("sender", "receiver"):
        assert 5 < line[f"{role}_private_peak_mib"]["max"] <= 80


@process
@pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")
def test_faults_are_measured_with_and_without_background() -> None:
    quiet, pushed = bench(
        "faults", "--size", "2M", "--background", "64M", "--touches", "100", "--runs", "1",
        "--prefetch", "16", "--pattern", "sweep",
    )  # fmt: skip
    assert quiet["background_bytes"] == 0
    assert pushed["background_mib_per_s"]["median"] > 0
    for result in (quiet, pushed):
        assert result["touch_max_us"]["max"] >= result["touch_p99_us"]["max"] > 0
        assert sum(result["touches_by_us"]) == 100
        assert 0 < result["faults_per_touch"]["median"] <= 1


@process
def test_transports_are_measured() -> None:
    (result,) = bench("transport", "--count", "200", "--runs", "1")
    for kind in ("tcp", "zeromq"):
        assert 1 < result[f"{kind}_p50_us"]["median"] <= result[f"{kind}_p99_us"]["median"]
