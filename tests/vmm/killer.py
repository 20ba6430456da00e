"""Run an injector and kill it before or after the N-th of its calls that touch the target."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import subprocess
import sys
from typing import Final

SEIZE, INTERRUPT, SYSCALL, SYSCALL_INFO = 0x4206, 0x4207, 24, 0x420E
#: PTRACE_O_TRACESYSGOOD, TRACECLONE, EXITKILL.
OPTIONS: Final = 0x1 | 0x8 | 0x100000
WALL: Final = 0x40000000
SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
ENTRY, EXIT = 1, 2
#: ptrace, process_vm_writev, pidfd_getfd
TOUCHING: Final = {"x86_64": {101, 311, 438}, "aarch64": {117, 271, 438}}
INJECTOR: Final = """
import os, sys
from engine import _native
print(flush=True)
input()
found = _native.inject_userfaultfd(int(sys.argv[1]), _native.UFFD_USER_MODE_ONLY, 20 * 10**9)
os._exit(found[0])
"""
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: object = None) -> int:
    return int(libc.ptrace(request, pid, address, data))


def _number(pid: int, entered: dict[int, int]) -> int:
    """The system call that the thread is before or after."""
    info = ctypes.create_string_buffer(128)
    _ptrace(SYSCALL_INFO, pid, len(info), ctypes.cast(info, ctypes.c_void_p))
    if info.raw[0] == ENTRY:
        entered[pid] = struct.unpack_from("Q", info.raw, 24)[0]
    return entered.get(pid, -1)


def run_and_kill(target: int, calls: int) -> bool:
    """Kill it at the stop before or after its `calls`th touching call; False: it made less, and
    ended well."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", INJECTOR, str(target)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as injector:
        assert injector.stdin is not None
        assert injector.stdout is not None
        injector.stdout.readline()
        assert _ptrace(SEIZE, injector.pid, 0, OPTIONS) == 0
        assert _ptrace(INTERRUPT, injector.pid) == 0
        injector.stdin.write(b"\n")
        injector.stdin.flush()
        status = _drive(injector.pid, calls)
        injector.returncode = os.waitstatus_to_exitcode(status)
    assert injector.returncode in (0, -signal.SIGKILL)
    return injector.returncode != 0


def _drive(injector: int, calls: int) -> int:
    """Its threads from stop to stop, until it has ended; its status."""
    entered: dict[int, int] = {}
    threads = {injector}
    while True:
        thread, status = _next_stop(threads)
        if not os.WIFSTOPPED(status):
            threads.discard(thread)
            if thread == injector:
                return status
            continue
        number, passed = os.WSTOPSIG(status), 0
        if number == SYSCALL_STOP:
            if _number(thread, entered) in TOUCHING[platform.machine()]:
                calls -= 1
            if calls < 0:
                os.kill(injector, signal.SIGKILL)
                continue
        elif status >> 16 == 0:
            passed = number
        _ptrace(SYSCALL, thread, 0, passed)


def _next_stop(threads: set[int]) -> tuple[int, int]:
    """A stop or end of one of them, or of a new one: other children are not touched."""
    thread, status = os.waitpid(-1, WALL)
    threads.add(thread)
    return thread, status
