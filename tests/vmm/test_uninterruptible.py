"""A thread that waits where nothing can stop it does not keep ramferry from its process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import _native
from tests.support import eventually

pytestmark = pytest.mark.process
WAIT_NS = 5_000_000_000

#: Its first thread waits for the child's `execve`, which waits for a writer; others sleep.
TARGET = """
import os, sys, threading, time
for _ in range(int(sys.argv[2])):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
while len(os.listdir("/proc/self/task")) <= int(sys.argv[2]): time.sleep(0.01)
waits = [(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)]
os.posix_spawn("/bin/true", ["true"], {}, file_actions=waits)
print(flush=True)
time.sleep(1000)
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
def target(request: pytest.FixtureRequest, fifo: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose first thread cannot be stopped, beside so many others."""
    command = [sys.executable, "-c", TARGET, str(fifo), str(request.param)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert eventually(lambda: state(process.pid) == "D")
            yield process
        finally:
            open_end(fifo)
            process.kill()


def open_end(fifo: Path) -> None:
    """Who waits for a writer goes on; nobody waits twice."""
    if fifo.exists():
        os.close(os.open(fifo, os.O_RDWR))
        fifo.unlink()


def inject(pid: int) -> int:
    obstacle, uffd, left_open, *_ = _native.inject_userfaultfd(
        pid, _native.UFFD_USER_MODE_ONLY, WAIT_NS
    )
    if uffd >= 0:
        os.close(uffd)
    assert left_open == -1
    return obstacle


@pytest.mark.parametrize("target", [2], indirect=True)
def test_another_thread_does_it(target: subprocess.Popen[bytes]) -> None:
    assert inject(target.pid) == _native.INJECT_DONE


@pytest.mark.parametrize("target", [0], indirect=True)
def test_without_another_one_it_is_told_in_time(
    target: subprocess.Popen[bytes], fifo: Path
) -> None:
    assert inject(target.pid) == _native.INJECT_NO_SAFE_THREAD

    open_end(fifo)
    assert target.stdout is not None
    assert target.stdout.readline() == b"\n"  # it goes on, and nobody traces it
    assert inject(target.pid) == _native.INJECT_DONE
