"""`bench vmm`: the guest that it makes, and what it sees of it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import MigrationError, UsageError
from perf.codec import parse_codec
from perf.vmm import Plan, Run, figures_of, shape_of
from perf.vmmguest import CODE, ENDS_AT, MIB, Shape, watched
from tests.support import eventually
from tests.vmm.machines import needs_qemu

SHAPE = Shape(64 * MIB, 40 * MIB, 32 * MIB)


def test_a_boot_sector_ends_with_where_memory_ends_and_the_signature() -> None:
    sector = SHAPE.boot_sector()

    assert len(sector) == 512
    assert sector.startswith(CODE)
    assert len(CODE) <= ENDS_AT
    assert int.from_bytes(sector[502:506], "little") == 41 * MIB
    assert int.from_bytes(sector[506:510], "little") == 33 * MIB
    assert sector[510:] == b"\x55\xaa"


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("ld")), reason="needs binutils")
def test_the_code_is_that_of_its_source(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "perf/sweeper.S"
    made, found = tmp_path / "made.o", tmp_path / "found"
    linked = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
    if subprocess.run(["as", "--32", source, "-o", made], check=False).returncode:
        pytest.skip("this assembler is not for x86")
    subprocess.run([*linked, made, "-o", found], check=True)

    assert found.read_bytes()[:ENDS_AT] == CODE.ljust(ENDS_AT, b"\0")


@pytest.mark.parametrize(
    "sizes",
    [
        (64 * MIB, 63 * MIB, MIB),
        (64 * MIB, 8 * MIB, 16 * MIB),
        (64 * MIB, 8 * MIB, 0),
        (2**33, 2**32, MIB),
    ],
)
def test_a_guest_that_cannot_be_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        shape_of(*sizes)
    assert shape_of(64 * MIB, 62 * MIB, MIB) == Shape(64 * MIB, 62 * MIB, MIB)


def test_a_watcher_counts_rounds_and_says_when_a_page_was_wrong(tmp_path: Path) -> None:
    place = tmp_path / "guest"
    with watched(place, SHAPE) as watcher, socket.socket(socket.AF_UNIX) as guest:
        guest.connect(str(place / "marks"))
        guest.sendall(b"..R")
        assert eventually(lambda: watcher.rounds == 1)
        guest.sendall(b".R")
        assert eventually(lambda: watcher.rounds == 2)
        assert watcher.first <= watcher.last
        assert watcher.per_s(watcher.first - 1, watcher.last + 1) > 0
        assert watcher.per_s(watcher.last + 1, watcher.last + 2) == 0
        guest.sendall(b"W")
        with pytest.raises(MigrationError, match="not as it wrote it"):
            eventually(lambda: watcher.rounds < 0, 20)


def test_ratios_are_those_of_the_pairs() -> None:
    slow = Run(1000, 1010, 400, 390, 0.5, 3, 600)
    fast = Run(500, 505, 100, 95, 0.6, 3, 500)
    figures = figures_of([{"qemu": slow, "ramferry": fast}, {"qemu": fast, "ramferry": slow}])

    assert figures["total_time_ratio_qemu_to_ramferry"] == [2.0, 0.5]
    assert figures["downtime_seen_ratio_qemu_to_ramferry"] == [4.0, 0.25]
    assert figures["qemu_speed_ratio"] == [0.5, 0.6]


@pytest.mark.process
@pytest.mark.guest
@needs_qemu
@pytest.mark.parametrize("more", [[], ["--xbzrle", "--auto-converge"]])
def test_both_engines_move_a_guest_that_is_seen_all_the_time(more: list[str]) -> None:
    command = [sys.executable, "-m", "engine.cli", "bench", "vmm", "--pairs", "1", "--json"]
    command += ["--size", "32M", "--swept", "20M", "--limit", "20000", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for engine in ("qemu", "ramferry"):
        assert found[f"{engine}_downtime_seen_ms"]["median"] > 0
        assert 0 < found[f"{engine}_total_time_ms"]["median"] < 60_000
        assert found[f"{engine}_sent_mib"]["median"] > 15


@pytest.mark.parametrize(
    ("codec", "of_qemu"), [("none", "none"), ("zstd:3", "zstd"), ("lz4", "none"), ("auto", "none")]
)
def test_a_codec_that_qemu_lacks_is_ramferrys_alone(codec: str, of_qemu: str) -> None:
    plan = Plan(SHAPE, 300, codec=parse_codec(codec))

    assert plan.settings("qemu")[0]["multifd-compression"] == of_qemu
    assert plan.settings("ramferry")[0]["multifd-compression"] == codec.partition(":")[0]
