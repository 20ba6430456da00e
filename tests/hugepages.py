"""Huge pages for the tests that need them, reserved for as long as a test takes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import eventually

COUNT: Final = 72  #: two guests of 64 MiB, and some to spare
POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
RESERVED: Final = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """So many of 2 MiB that nobody uses, given back. One test at a time has them, in whatever
    process: what is reserved is one number for the whole machine."""
    with RESERVED.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(RESERVED.read_text())
        missing = max(0, COUNT - _free())
        if missing and os.geteuid() != 0:
            pytest.skip("reserving huge pages needs root; CI runs this as root")
        try:
            if missing:
                RESERVED.write_text(str(before + missing))
            # The processes of a test in another pytest worker may still be giving theirs back.
            if not eventually(lambda: _free() >= COUNT, wait_s=10.0):
                pytest.skip("this machine has no free memory for huge pages")
            yield
        finally:
            if missing:
                RESERVED.write_text(str(before))


def _free() -> int:
    return int((POOL / "free_hugepages").read_text())
