"""Memory of a process that knows nothing of us: where it is mapped, and who writes to it.

The tracker is a userfaultfd that the process opens because we make it (`native/inject.h`,
docs/decisions/0007-injection.md). We hold the only descriptor: when it is closed, or when this
process ends, the kernel ends all tracking, and the other process pays nothing any more.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine import _native
from engine.errors import MemoryRefused
from engine.guest.tracker import FEATURES
from engine.memory.blocks import PAGE_SIZE, STRIPE_SIZE

log = logging.getLogger("ramferry.guest")

INJECT_WAIT_NS: Final = 2_000_000_000
REASON: Final = "userfaultfd write-protect async with PAGEMAP_SCAN, injected into process"
OBSTACLES: Final = {
    _native.INJECT_GONE: "process {pid} has ended",
    _native.INJECT_NOT_ALLOWED: "process {pid} may not be traced by this user; run ramferry as its "
    "user or root, and with kernel.yama.ptrace_scope below 2 or CAP_SYS_PTRACE",
    _native.INJECT_TRACED: "process {pid} is traced by another program; end that (a debugger?)",
    _native.INJECT_NOT_64_BIT: "process {pid} is a 32-bit program",
    _native.INJECT_FILTERED: "the seccomp filter of process {pid} forbids userfaultfd, or reading "
    "it needs root; start QEMU without -sandbox on",
    _native.INJECT_SHADOW_STACK: "process {pid} runs with a shadow stack; start it with "
    "GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
    _native.INJECT_NO_CODE: "process {pid} has no code that makes a plain system call",
    _native.INJECT_NO_SAFE_THREAD: "no thread of process {pid} waits in a system call on a stack "
    "of its own",
    _native.INJECT_TOO_OLD: "the kernel is too old: userfaultfd and pidfd_getfd are needed",
    _native.INJECT_REFUSED: "the kernel refuses process {pid} a userfaultfd: {error}; "
    "sysctl vm.unprivileged_userfaultfd=1 allows it",
    _native.INJECT_FAILED: "a userfaultfd could not be had from process {pid}: {error}",
}


class CannotInject(MemoryRefused):
    """The process cannot be made to open a userfaultfd; it is as before. `obstacle` is the kernel's
    name for why, one of `_native.INJECT_*`."""

    def __init__(self, obstacle: int, pid: int, error: int) -> None:
        super().__init__(obstacle, pid, error)
        self.obstacle, self.pid, self.error = obstacle, pid, error

    def __str__(self) -> str:
        return OBSTACLES[self.obstacle].format(pid=self.pid, error=os.strerror(self.error))


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps. `offset` is where in its file it begins."""

    start: int
    end: int
    rights: str
    offset: int
    device: int
    inode: int


def read_mappings(pid: int) -> list[Mapping]:
    """:raise OSError: the process is gone, or not ours to look at."""
    mappings = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            place, rights, offset, device, inode = line.split(maxsplit=5)[:5]
            start, _, end = place.partition("-")
            major, _, minor = device.partition(":")
            number = os.makedev(int(major, 16), int(minor, 16))
            mappings.append(
                Mapping(int(start, 16), int(end, 16), rights, int(offset, 16), number, int(inode))
            )
    return mappings


def others_mapping(inodes: set[tuple[int, int]], pid: int) -> list[int]:
    """Processes other than `pid` and us that map one of the files, as (device, inode)."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (pid, os.getpid()):
            continue
        with contextlib.suppress(OSError, ValueError):
            if any((each.device, each.inode) in inodes for each in read_mappings(int(name))):
                found.append(int(name))
    return found


@dataclass(slots=True)
class ForeignTracker:
    """Writes of process `pid` to some of its memory are tracked; owns both descriptors.

    :ivar pagemap_fd: to be scanned, by whomever it is lent.
    :ivar stopped_ns: so long stood one of its threads, once."""

    pid: int
    uffd: int
    pagemap_fd: int
    stopped_ns: int

    def close(self) -> None:
        """Stop tracking. Only once."""
        os.close(self.uffd)
        os.close(self.pagemap_fd)


def open_foreign_uffd(pid: int, flags: int) -> tuple[int, int]:
    """A fresh userfaultfd of the process's memory, the caller's; and for how many ns one of its
    threads stood.

    :raise CannotInject: says why not; the process is as before."""
    obstacle, uffd, left_open, error, thread, stopped_ns, attempts = _native.inject_userfaultfd(
        pid, flags, INJECT_WAIT_NS
    )
    if obstacle != _native.INJECT_DONE:
        raise CannotInject(obstacle, pid, error)
    log.info(
        "userfaultfd of process %d: thread %d stood for %d us, %d attempts",
        pid, thread, stopped_ns // 1000, attempts,
    )  # fmt: skip
    if left_open >= 0:
        log.warning("descriptor %d stays open in process %d, unused", left_open, pid)
    return uffd, stopped_ns


def track_foreign(pid: int, ranges: Sequence[tuple[int, int]]) -> ForeignTracker:
    """Begin to track writes to `ranges` (address, size) of the process; all is clean from now.

    :raise MemoryRefused: not possible, and why; the process is as before."""
    with contextlib.ExitStack() as undo:
        try:
            pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise MemoryRefused(f"/proc/{pid}/pagemap: {exc.strerror}") from exc
        undo.callback(os.close, pagemap_fd)
        if not _native.pagemap_scan_supported(pagemap_fd):
            raise MemoryRefused("the kernel has no PAGEMAP_SCAN, which Linux 6.7 brought")
        uffd, stopped_ns = open_foreign_uffd(pid, _native.UFFD_USER_MODE_ONLY)
        undo.callback(os.close, uffd)
        try:
            _native.uffd_negotiate(uffd, FEATURES)
            for address, size in ranges:
                _native.uffd_register(uffd, address, size, _native.UFFD_REGISTER_WP)
                _call_clean(pagemap_fd, address, size // PAGE_SIZE)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise MemoryRefused(
                    f"the memory of process {pid} is tracked already, by another ramferry or by "
                    "the process itself"
                ) from exc
            raise MemoryRefused(f"tracking process {pid}: {exc.strerror}") from exc
        undo.pop_all()
        return ForeignTracker(pid, uffd, pagemap_fd, stopped_ns)


def _call_clean(pagemap_fd: int, address: int, page_count: int) -> None:
    scratch = bytearray(-(-page_count // 64) * 8)
    stripe = (page_count, STRIPE_SIZE // PAGE_SIZE, 0, 1)
    _native.pagemap_scan(pagemap_fd, address, scratch, stripe)
