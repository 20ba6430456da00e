"""What this machine's kernel can do, found out without the engine: for tests to choose by."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import struct
from typing import Final

USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282}  #: system call numbers
USER_MODE_ONLY: Final = 1
SOFT_DIRTY: Final = 1 << 55  #: of an entry of /proc/PID/pagemap


def release() -> tuple[int, ...]:
    """Version of the running kernel, like (6, 7)."""
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def has_pagemap_scan() -> bool:
    return release() >= (6, 7)


def has_userfaultfd(flags: int = USER_MODE_ONLY) -> bool:
    """Whether this user may have one; without flags: also for what the kernel does."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(USERFAULTFD[platform.machine()], os.O_CLOEXEC | flags)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def has_soft_dirty() -> bool:
    """Clear the bits of this process, write a page and look."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page, open("/proc/self/clear_refs", "w") as clear:
        page[0] = 1
        clear.write("4")
        clear.flush()
        page[0] = 2
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            (entry,) = struct.unpack("Q", pagemap.read(8))
    return bool(entry & SOFT_DIRTY)
