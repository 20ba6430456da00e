"""A bench that is told to end, or killed, leaves no process; told, it leaves no file either."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from perf.image import SHARED_MEMORY
from tests.support import eventually

pytestmark = pytest.mark.process

LONG = ("compress", "--rates", "loopback", "--images", "random", "--codecs", "none",
        "--qemu-codecs", "", "--size", "64M", "--pairs", "1000")  # fmt: skip
HOLDER = """
import asyncio, sys
from pathlib import Path
from perf.pair import command, side

async def hold():
    where = Path(sys.argv[1])
    (where / "ram").write_bytes(bytes(2**20))
    line = command("ramferry", where / "ram", 2**20, where / "qmp", incoming=False)
    async with side(line, where / "qmp") as one:
        print(one.process.pid, flush=True)
        await asyncio.sleep(100)

asyncio.run(hold())
"""


def images_of(bench: psutil.Process) -> set[Path]:
    """Images that sides of a bench have (others may measure at the same time)."""
    lines = set()
    for child in bench.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.add(" ".join(child.cmdline()))
    images = SHARED_MEMORY.glob("ramferry-bench-*/image")
    return {image for image in images if any(str(image) in line for line in lines)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_told_to_end_leaves_no_process_and_no_image(number: signal.Signals) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-m", "engine.cli", "bench", *LONG], stderr=subprocess.PIPE, text=True
    )
    with bench:
        seen = psutil.Process(bench.pid)
        assert eventually(lambda: bool(images_of(seen)))
        started, made = seen.children(recursive=True), images_of(seen)
        bench.send_signal(number)
        _, errors = bench.communicate(timeout=60)

    assert bench.returncode == 130
    assert errors.splitlines()[-1] == "ramferry: interrupted"
    assert eventually(lambda: not any(child.is_running() for child in started))
    assert not [image for image in made if image.exists()]


def test_a_bench_in_the_background_of_a_script_can_be_told_to_end() -> None:
    """It ignores Ctrl-C."""
    line = f"{shlex.join([sys.executable, '-m', 'engine.cli', 'bench', *LONG])} & echo $!; wait"
    shell = subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, text=True)
    with shell:
        assert shell.stdout is not None
        bench = psutil.Process(int(shell.stdout.readline()))
        assert eventually(lambda: bool(images_of(bench)))
        started, made = bench.children(recursive=True), images_of(bench)
        bench.terminate()
        shell.wait(timeout=60)

    assert eventually(lambda: not any(child.is_running() for child in [bench, *started]))
    assert not [image for image in made if image.exists()]


def test_the_sides_of_a_bench_that_was_killed_end(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        side = psutil.Process(int(holder.stdout.readline()))
        assert side.is_running()
        holder.kill()

    assert eventually(lambda: not side.is_running())
