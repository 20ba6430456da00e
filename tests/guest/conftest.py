"""Every test here leaves no descriptor, thread, process, file in its run directory, nor child."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def _open_fds() -> set[str]:
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return names


def _children() -> set[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in text.split()}


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    fds, threads, children = _open_fds(), set(threading.enumerate()), _children()
    yield
    gc.collect()
    assert _open_fds() <= fds
    assert set(threading.enumerate()) <= threads
    assert _children() <= children
    assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


@pytest.fixture
def rundir(tmp_path: Path) -> Path:
    """A run directory whose path is short enough for sockets."""
    return tmp_path
