"""`ramferry bench postcopy` in its smallest form, and the arithmetic of what a guest waited."""

from __future__ import annotations

import mmap
import shutil
import threading
from pathlib import Path

import pytest

from engine import _native
from perf.pair import QEMU
from perf.postcopy import FAULT_NS_MIN, Case, Waits
from perf.postcopyqemu import FLOPPY_BYTES, MASK_AT, write_boot_disk
from perf.postcopyreport import histogram
from tests.kernel import has_userfaultfd
from tests.perf.plotting import draw
from tests.perf.test_bench import bench

needs_userfaultfd = pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")


def test_quantiles_of_waits_leave_out_writes_that_found_their_page() -> None:
    waits = Waits()
    waits.add([(1024, 1000), (FAULT_NS_MIN, 90), (1 << 20, 10)], 1_200_000)

    assert waits.figures()["faults"] == 100
    assert 8 <= waits.quantile_us(0.5) < 9.3
    assert 1048 < waits.quantile_us(0.99) <= 1180
    assert waits.share_from_us(512) == 0.1
    assert Waits().quantile_us(0.5) == 0.0


def test_as_many_faults_are_wanted_as_there_can_be() -> None:
    assert Case(size="1G").units == 262_144
    assert Case(size="1G", is_huge=True).units == 512


def test_a_timed_workload_counts_each_write_once() -> None:
    pages = 64
    ram = mmap.mmap(-1, pages * 4096)
    _native.workload_fill(ram, 0, pages, "random", 7)
    guest = _native.workload_start(ram, pages, 1, "random", 4096 * 5000, 508, 7, None, True)
    _native.workload_resume(guest)
    threading.Event().wait(0.05)
    _native.workload_pause(guest, 10**9)

    buckets, longest = _native.workload_times(guest)

    assert sum(count for _, count in buckets) == sum(_native.workload_writes(guest)) > 0
    assert [ns for ns, _ in buckets] == sorted(ns for ns, _ in buckets)
    assert longest >= buckets[-1][0]
    _native.workload_stop(guest)


def test_a_workload_that_is_not_timed_counts_none() -> None:
    ram = mmap.mmap(-1, 4096)
    _native.workload_fill(ram, 0, 1, "random", 7)
    guest = _native.workload_start(ram, 1, 1, "sweep", 0, 8, 7, None)
    _native.workload_resume(guest)
    _native.workload_pause(guest, 10**9)

    assert _native.workload_times(guest) == ([], 0)
    _native.workload_stop(guest)


def test_a_boot_disk_boots_and_touches_what_was_asked_for(tmp_path: Path) -> None:
    write_boot_disk(tmp_path / "disk", 64 << 20)

    disk = (tmp_path / "disk").read_bytes()
    assert len(disk) == FLOPPY_BYTES
    assert disk[510:512] == b"\x55\xaa"
    assert int.from_bytes(disk[MASK_AT : MASK_AT + 4], "little") == (64 << 20) // 4096 - 1


def test_waits_are_drawn_beside_means(tmp_path: Path) -> None:
    waits = Waits()
    waits.add([(1 << power, 10) for power in range(14, 22)], 3_000_000)

    draw(histogram, tmp_path / "h.png", {"held": waits}, {"QEMU": [900.0]})

    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.process
@needs_userfaultfd
def test_faults_are_measured_as_the_guest_sees_them() -> None:
    held, pushed, *qemu = bench(
        "postcopy", "--show", "faults", "--size", "16M", "--faults", "200", "--runs", "1"
    )

    assert pushed["background_mib_per_s"]["median"] > 0
    assert held["faults"]["median"] > 0
    assert held["service_faults"]["median"] > 0
    for one in (held, pushed):
        assert one["fault_max_us"]["max"] >= one["fault_p99_us"]["max"] > 0
    assert len(qemu) == (2 if shutil.which(QEMU) else 0)
    for one in qemu:
        assert one["faults"]["median"] > 0


@pytest.mark.process
@needs_userfaultfd
def test_the_switch_and_the_speed_after_it_are_measured() -> None:
    lines = bench(
        "postcopy", "--show", "switch", "--show", "speed", "--switch-size", "64M", "--dirty", "16M",
        "--speed-size", "32M", "--pattern", "sweep", "--runs", "1",
    )  # fmt: skip

    switch, *speeds = lines
    assert switch["downtime_ms"]["median"] >= switch["pause_ms"]["median"]
    assert switch["missing_mib"]["median"] <= 64
    assert [one["kind"] for one in speeds] == ["sweep, prefetch 0", "sweep, prefetch 64"]
    for one in speeds:
        assert one["seconds_to_90_percent"]["median"] > 0
