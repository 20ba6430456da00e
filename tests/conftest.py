"""Every test leaves nothing: no process, descriptor, thread, nor file of the engine's."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

#: Processes inherit it, so a test's descendants are known even when their parents are gone.
MARKER = "RAMFERRY_TEST_MARKER"
LEFT_WAIT_S = 20.0  #: a worker learns of its parent's death, and ends, within this time

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def eventually(fact: Callable[[], bool], wait_s: float = LEFT_WAIT_S) -> bool:
    """Wait until it is so; for facts that nobody tells us of."""
    deadline = time.monotonic() + wait_s
    while not (is_so := fact()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_so


def _descriptors() -> set[str]:
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return names


def _descendants(marker: str) -> dict[int, str]:
    """Processes that were started with the marker, and what they run."""
    wanted = f"{MARKER}={marker}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:  # ended meanwhile, or another user's
            continue
    return {pid: command.decode(errors="replace").strip() for pid, command in found.items()}


@pytest.fixture(autouse=True)
def _nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Give the test a run directory of its own and check what it leaves."""
    tmp_path_factory.getbasetemp()  # pytest's own directory stays where it is
    marker = uuid.uuid4().hex
    directory = tempfile.mkdtemp(prefix="rf-")  # short: the path of a socket has 107 bytes
    with monkeypatch.context() as patch:
        patch.setenv(MARKER, marker)
        patch.setenv("XDG_RUNTIME_DIR", directory)
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        descriptors, threads = _descriptors(), set(threading.enumerate())
        try:
            yield
            processes = _end_what_is_left(marker)
            files = [str(path) for path in Path(directory).rglob("*") if not path.is_dir()]
        finally:
            _end_what_is_left(marker, wait_s=0.0)
            shutil.rmtree(directory)
    assert processes == {}
    assert files == []
    assert eventually(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
    if not _descriptors() <= descriptors:
        gc.collect()
    assert _descriptors() - descriptors == set()


def _end_what_is_left(marker: str, wait_s: float = LEFT_WAIT_S) -> dict[int, str]:
    """Wait for the end of every descendant; kill and tell those that do not."""
    if eventually(lambda: not _descendants(marker), wait_s):
        return {}
    left = _descendants(marker)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return left
