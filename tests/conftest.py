"""Every test leaves nothing: no process, descriptor, thread, nor file of the engine's."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.skips import pytest_make_collect_report, pytest_runtest_makereport
from tests.support import WAIT_S, eventually, open_descriptors

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

#: Processes inherit it, so a test's descendants are known even when their parents are gone.
MARKER = "RAMFERRY_TEST_MARKER"

#: How long an example takes says how busy the machine is, and nothing about the code.
UNTIMED: Any = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", **UNTIMED)
hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True, **UNTIMED)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

#: The background of a script ignores it, and what is tested with Ctrl-C would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


def _children() -> set[int]:
    """Own children, also those that have ended and were not waited for."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in text.split()}


def _sockets(directory: Path | None) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_socket()] if directory else []


@pytest.fixture(autouse=True)
def _nothing_is_left(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """Give the test a run directory of its own and check what it leaves."""
    tmp_path_factory.getbasetemp()  # pytest's own directory stays where it is
    made_by_pytest: Path | None = None  #: the test's own directory, if it has asked for one
    if "tmp_path" in request.fixturenames:
        made_by_pytest = request.getfixturevalue("tmp_path")
    marker = uuid.uuid4().hex
    directory = tempfile.mkdtemp(prefix="rf-")  # short: the path of a socket has 107 bytes
    with monkeypatch.context() as patch:
        patch.setenv(MARKER, marker)
        patch.setenv("XDG_RUNTIME_DIR", directory)
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        descriptors, threads = open_descriptors(), set(threading.enumerate())
        children = _children()
        try:
            yield
            processes = _end_what_is_left(marker)
            files = [str(path) for path in Path(directory).rglob("*") if not path.is_dir()]
        finally:
            _end_what_is_left(marker, wait_s=0.0)
            shutil.rmtree(directory)
    assert processes == {}
    assert files == []
    assert _sockets(made_by_pytest) == []
    assert _children() <= children
    assert eventually(lambda: set(threading.enumerate()) <= threads), threading.enumerate()
    if not open_descriptors() <= descriptors:
        gc.collect()
    assert open_descriptors() - descriptors == set()


def _end_what_is_left(marker: str, wait_s: float = WAIT_S) -> dict[int, str]:
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
