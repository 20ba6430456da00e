"""A userfaultfd that another process opens because we make it.

How, and why that is safe: `native/inject.h`, docs/decisions/0007-injection.md.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from engine import _native
from engine.errors import MemoryRefused

log = logging.getLogger("ramferry.guest")
INJECT_WAIT_NS: Final = 5_000_000_000  #: for one
#: For all that are asked for at once: half of what control waits, for the rest takes time as well.
ALL_WAIT_NS: Final = 20_000_000_000
OBSTACLES: Final = {
    _native.INJECT_GONE: "process {pid} has ended",
    _native.INJECT_NOT_ALLOWED: "process {pid} may not be traced by this user; run ramferry as its "
    "user or root, and with kernel.yama.ptrace_scope below 2 or CAP_SYS_PTRACE",
    _native.INJECT_TRACED: "process {pid} is traced by another program; end that (a debugger?)",
    _native.INJECT_NOT_64_BIT: "process {pid} is a 32-bit program",
    _native.INJECT_FILTERED: "the seccomp filter of process {pid} forbids userfaultfd, or reading "
    "it needs root; start QEMU without -sandbox on, a back end without its own (--seccomp none)",
    _native.INJECT_SHADOW_STACK: "process {pid} runs with a shadow stack; start it with "
    "GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
    _native.INJECT_NO_CODE: "process {pid} has no code that makes a plain system call",
    _native.INJECT_NO_SAFE_THREAD: "no thread of process {pid} can be stopped at a safe place: on "
    "a stack that ends in a guard, in no restartable sequence, and not waiting for a disk",
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


class Injector:
    """Has processes open userfaultfds, one after the other, with one deadline for all."""

    def __init__(self) -> None:
        self._deadline_ns = time.monotonic_ns() + ALL_WAIT_NS
        self._slowest = (0, 0)  #: for how many ns, and which process

    def open(self, pid: int, flags: int, *, keeps: bool = False) -> tuple[int, int]:
        """A fresh userfaultfd of the process's memory, the caller's; and for how many ns one of its
        threads stood.

        :param keeps: the process keeps it open, too.
        :raise CannotInject: says why not; the process is as before.
        :raise MemoryRefused: too little time was left for it; the process is as before."""
        began_ns, wait_ns = time.monotonic_ns(), self._left_ns
        if not wait_ns:
            raise self._too_slow()
        obstacle, uffd, left_open, error, thread, stopped_ns, attempts = _native.inject_userfaultfd(
            pid, flags, wait_ns, keeps
        )
        self._slowest = max(self._slowest, (time.monotonic_ns() - began_ns, pid))
        if obstacle == _native.INJECT_NO_SAFE_THREAD and wait_ns < INJECT_WAIT_NS:
            raise self._too_slow()
        if obstacle != _native.INJECT_DONE:
            raise CannotInject(obstacle, pid, error)
        log.info(
            "userfaultfd of process %d: thread %d stood for %d us, %d attempts",
            pid, thread, stopped_ns // 1000, attempts,
        )  # fmt: skip
        if left_open >= 0 and not keeps:
            log.warning("descriptor %d stays open in process %d, unused", left_open, pid)
        return uffd, stopped_ns

    def close(self, pid: int, number: int, uffd: int) -> bool:
        """Whether the process has no descriptor `number` any more that is this one. It is tried
        once also where no time is left."""
        return _native.inject_close(pid, number, uffd, self._left_ns)[2] < 0

    @property
    def _left_ns(self) -> int:
        """For one."""
        return max(0, min(INJECT_WAIT_NS, self._deadline_ns - time.monotonic_ns()))

    def _too_slow(self) -> MemoryRefused:
        took_ns, pid = self._slowest
        return MemoryRefused(
            f"{ALL_WAIT_NS // 10**9} s did not do to have all processes open a userfaultfd; the "
            f"slowest one, process {pid}, took {took_ns / 1e9:.1f} s; try again when it does less"
        )
