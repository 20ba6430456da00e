"""The memory of any process goes to a waiting twin while it is written."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine
from engine.errors import MigrationError
from engine.guest.foreignguest import ForeignGuest, attach_process
from tests.guest.support import run
from tests.support import eventually
from tests.vmm.postcopy_rig import until

pytestmark = pytest.mark.process

#: All that it knows is in its memory: a number of steps, and in each page the last step that was
#: there. So a twin, which waits for a line first, goes on from wherever its memory is.
STEPPER = """
import mmap, struct, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    pages = len(memory) // 4096 - 1
    memory.madvise(mmap.MADV_DONTFORK)
    print(flush=True)
    input()
    while True:
        step = struct.unpack_from("<Q", memory)[0] + 1
        struct.pack_into("<Q", memory, (step * 7 % pages + 1) * 4096 + step % 500 * 8, step)
        struct.pack_into("<Q", memory, 0, step)
"""
SIZE = 16 * 1024 * 1024
LIMIT_MS = 60_000  #: however slow the machine is, the rounds end


class Stepper:
    """One such process."""

    def __init__(self, path: Path, program: str = STEPPER, *before: str) -> None:
        """:param before: a program that runs the interpreter."""
        self.path = path
        path.write_bytes(b"")
        os.truncate(path, SIZE)
        command, pipe = [*before, sys.executable, "-c", program, str(path)], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    @property
    def spec(self) -> str:
        return f"process:pid={self.process.pid},path={self.path}"

    def steps(self) -> int:
        with self.path.open("rb") as file:
            return int(struct.unpack("<Q", file.read(8))[0])

    def goes_on(self) -> bool:
        before = self.steps()
        return eventually(lambda: self.steps() > before + 1000)

    def stands(self) -> bool:
        state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    def close(self) -> None:
        with self.process:
            self.process.kill()


@contextlib.contextmanager
def steppers(
    directory: Path, program: str = STEPPER, *before: str
) -> Iterator[tuple[Stepper, Stepper]]:
    """One that steps, and a twin: as `Stepper`."""
    source = Stepper(directory / "source")
    destination = Stepper(directory / "destination", program, *before)
    try:
        source.begin()
        assert source.goes_on()
        yield source, destination
    finally:
        source.close()
        destination.close()


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In a tmpfs: only memory can be tracked."""
    path = Path("/dev/shm") / f"rf-{os.getpid()}"
    path.mkdir()
    yield path
    for each in path.iterdir():
        each.unlink()
    path.rmdir()


async def migrate(source: Stepper, destination: Stepper, *, stands: bool) -> engine.Statistics:
    here = engine.Control.start(source.spec)
    there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
    async with here, there:
        assert destination.stands()
        if stands:
            await there.execute("stop")
        migration = await here.migrate(
            there, multifd_channels=2, max_bandwidth=0, downtime_limit=LIMIT_MS
        )
        return await migration.result()


def test_the_memory_arrives_byte_by_byte_and_the_twin_goes_on(directory: Path) -> None:
    with steppers(directory) as (source, destination):
        result = asyncio.run(migrate(source, destination, stands=True))

        assert source.path.read_bytes() == destination.path.read_bytes()
        assert source.stands()
        assert destination.stands()
        assert result.tracker == "uffd-wp"
        before = source.steps()
        destination.begin()
        os.kill(destination.process.pid, signal.SIGCONT)
        assert destination.goes_on()
        assert destination.steps() > before


def test_a_running_twin_goes_on_where_the_source_was(directory: Path) -> None:
    with steppers(directory) as (source, destination):
        asyncio.run(migrate(source, destination, stands=False))

        assert source.stands()
        assert eventually(lambda: not destination.stands())
        destination.begin()
        assert destination.goes_on()
        assert destination.steps() > source.steps()


def test_a_source_runs_when_ramferry_is_killed_while_it_stands(directory: Path) -> None:
    async def scenario(source: Stepper, destination: Stepper) -> None:
        here = engine.Control.start(source.spec, settings=["pause-before-switchover=on"])
        there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
        async with here, there:
            await here.migrate(there, max_bandwidth=0, downtime_limit=LIMIT_MS)
            await until(here, engine.Status.PRE_SWITCHOVER)
            assert source.stands()
            os.kill(here.pid, signal.SIGKILL)
            assert await asyncio.to_thread(source.goes_on)

    with steppers(directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.stands()


@pytest.mark.parametrize(
    ("pid", "path", "says"),
    [
        pytest.param(0, "absent", "No such file", id="no-file"),
        pytest.param(0, "other", "does not map .* shared and writable", id="not-mapped"),
        pytest.param(2**22, "source", "there is no process 4194304", id="no-process"),
    ],
)
def test_what_cannot_be_migrated_is_refused_in_one_line(
    directory: Path, pid: int, path: str, says: str
) -> None:
    async def attach(process: int) -> ForeignGuest:
        return await attach_process(process, str(directory / path), incoming=False)

    with steppers(directory) as (source, _):
        (directory / "other").write_bytes(bytes(4096))
        with pytest.raises(MigrationError, match=says) as caught:
            run(attach(pid or source.process.pid))

        assert "\n" not in str(caught.value)
        assert source.goes_on()
