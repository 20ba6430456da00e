"""Memory on which two engines can be compared: warm, or on huge pages.

A virtual machine's host gives memory when it is first touched, and takes free blocks of a pageblock
(order 9) back within seconds where free page reporting is on (Linux, mm/page_reporting.c). Whoever
runs first on such memory pays for it: up to five times the time of a first touch.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from engine.errors import UsageError

PAGE: Final = mmap.PAGESIZE
#: 1.6 % of the memory is kept, and no free block can be larger than an eighth of a pageblock.
KEPT_EACH_PAGES: Final = 64
HUGE_PAGE: Final = 2 * 1024 * 1024
HUGE_PAGE_COUNT: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@contextmanager
def warm_memory(size: int) -> Iterator[None]:
    """At least `size` bytes of free memory that the host has given, and does not take back inside.

    All of it is written once and freed but for one page in every `KEPT_EACH_PAGES`: its free blocks
    stay too small to be reported, and are the first that the kernel hands out.

    :raise UsageError: there is not so much memory."""
    available = psutil.virtual_memory().available
    if size > available:
        raise UsageError(f"this needs {size >> 20} MiB of free memory; {available >> 20} are there")
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        kept.madvise(mmap.MADV_NOHUGEPAGE)
        np.frombuffer(kept, dtype=np.uint8)[::PAGE] = 1
        step = KEPT_EACH_PAGES * PAGE
        for start in range(0, size - PAGE, step):
            kept.madvise(mmap.MADV_DONTNEED, start + PAGE, min(step, size - start) - PAGE)
        yield


@contextmanager
def huge_pages(size: int) -> Iterator[Path]:
    """A hugetlbfs of at least `size` bytes on 2 MiB pages, reserved for as long as it lasts.

    :raise UsageError: not root, or the kernel has not so many free."""
    wanted = -(-size // HUGE_PAGE)
    if os.geteuid() != 0 or not HUGE_PAGE_COUNT.exists():
        raise UsageError("reserving huge pages needs root and a kernel with 2 MiB huge pages")
    before = int(HUGE_PAGE_COUNT.read_text())
    with tempfile.TemporaryDirectory(prefix="ramferry-huge-") as directory:
        try:
            HUGE_PAGE_COUNT.write_text(str(before + wanted))
            reserved = int(HUGE_PAGE_COUNT.read_text()) - before
            if reserved < wanted:
                raise UsageError(f"{wanted} huge pages of 2 MiB wanted, {reserved} can be reserved")
            _run("mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", directory)
            try:
                _touch(Path(directory) / "touched", reserved * HUGE_PAGE)
                yield Path(directory)
            finally:
                _run("umount", directory)
        finally:
            HUGE_PAGE_COUNT.write_text(str(before))


def _touch(path: Path, size: int) -> None:
    """Write every page once, so that the host has given it: the first who runs pays nothing."""
    with path.open("w+b") as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as pages:
            np.frombuffer(pages, dtype=np.uint8)[::PAGE] = 1
    path.unlink()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
