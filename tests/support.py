"""What tests in every room share: waiting for facts, and what this process holds open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

WAIT_S = 60.0  #: whatever shall come does within this time, also beside others that take all CPUs


def eventually(fact: Callable[[], bool], wait_s: float = WAIT_S) -> bool:
    """Wait until it is so; for facts that nobody tells us of."""
    deadline = time.monotonic() + wait_s
    while not (is_so := fact()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_so


def open_descriptors() -> set[str]:
    """This process's descriptors, each with what it is."""
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return names
