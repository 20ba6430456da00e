"""Missing pages of a process that knows nothing of us: who touches one waits, whoever of us dies.

For each block the process opens a userfaultfd because we make it, and keeps it open: when the last
descriptor of one is closed, what is missing reads as zero. So no death of ours lets the process see
a page that is not its own: it waits. Only `end_missing` ends that (docs/decisions/0008).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Sequence

from engine import _native
from engine.errors import MemoryRefused
from engine.guest.foreign import NEVER_FORKED, ForeignBlock, is_in_children, register
from engine.guest.injecting import CannotInject, Injector
from engine.memory.blocks import RamBlock
from engine.memory.missing import FEATURES

log = logging.getLogger("ramferry.guest")

#: One block of memory, and where the process maps it.
Range = tuple[RamBlock, int]


def block_ranges(blocks: Sequence[ForeignBlock]) -> list[Range]:
    """Which memory lies where in the process."""
    return [(each.block, each.address) for each in blocks]


def open_foreign_missing(pid: int, ranges: Sequence[Range]) -> list[int]:
    """From now on the process, and the kernel for it, waits for what is missing; return our
    descriptors, the caller's, one for each block.

    :raise MemoryRefused: not possible, and why; the process is as before.
    :raise GuestError: it has ended, or is not ours to look at."""
    if is_in_children(pid, [(address, block.size) for block, address in ranges]):
        raise MemoryRefused(
            f"a child of process {pid} would make missing pages zero, so there is no postcopy; "
            f"{NEVER_FORKED}"
        )
    uffds: list[int] = []
    injector = Injector()
    with contextlib.ExitStack() as undo:
        undo.callback(lambda: _let_go(pid, uffds, ranges, injector))
        for _ in ranges:
            uffds.append(_open_kept(pid, injector))
        for uffd, (block, address) in zip(uffds, ranges, strict=True):
            _register(pid, uffd, block, address)
        undo.pop_all()
    return uffds


def _let_go(pid: int, uffds: list[int], ranges: Sequence[Range], injector: Injector) -> None:
    _end(pid, uffds, ranges[: len(uffds)], injector)
    for uffd in uffds:
        os.close(uffd)


def _open_kept(pid: int, injector: Injector) -> int:
    try:
        uffd, _ = injector.open(pid, 0, keeps=True)
    except CannotInject as exc:
        if (exc.obstacle, exc.error) != (_native.INJECT_REFUSED, errno.EPERM):
            raise
        raise MemoryRefused(
            f"process {pid} may not wait for pages in system calls and KVM, which postcopy needs: "
            "sysctl vm.unprivileged_userfaultfd=1, or start it with CAP_SYS_PTRACE"
        ) from exc
    return uffd


def _register(pid: int, uffd: int, block: RamBlock, address: int) -> None:
    try:
        _native.uffd_negotiate(uffd, FEATURES | _native.UFFD_FEATURE_THREAD_ID)
    except OSError as exc:
        raise _cannot_wait(pid, block, exc) from exc
    register_missing(pid, uffd, block, address)


def register_missing(pid: int, uffd: int, block: RamBlock, address: int) -> None:
    """Whoever touches a page of the block that is missing waits from now on, for a userfaultfd of
    the process that was negotiated.

    :raise MemoryRefused: not possible, and why."""
    try:
        register(pid, uffd, (address, block.size), _native.UFFD_REGISTER_MISSING)
    except OSError as exc:
        raise _cannot_wait(pid, block, exc) from exc


def _cannot_wait(pid: int, block: RamBlock, exc: OSError) -> MemoryRefused:
    return MemoryRefused(
        f"memory '{block.name}' of process {pid} cannot wait for missing pages "
        f"({exc.strerror}); it must be in a tmpfs or hugetlbfs"
    )


def end_missing(pid: int, uffds: Sequence[int], ranges: Sequence[Range]) -> None:
    """What is missing reads as zero from now on, and nobody waits. The descriptors stay the
    caller's; those in the process are closed."""
    _end(pid, uffds, ranges, Injector())


def _end(pid: int, uffds: Sequence[int], ranges: Sequence[Range], injector: Injector) -> None:
    unregister(uffds, ranges)
    for uffd in uffds:
        if not _close_there(pid, uffd, injector):
            log.warning("a userfaultfd stays open in process %d, unused", pid)


def unregister(uffds: Sequence[int], ranges: Sequence[Range]) -> None:
    """Nobody waits any more, and nothing is tracked; the descriptors stay open."""
    for uffd, (block, address) in zip(uffds, ranges, strict=True):
        with contextlib.suppress(OSError):  # it was not registered yet, or the process is gone
            _native.uffd_unregister(uffd, address, block.size)


def _close_there(pid: int, uffd: int, injector: Injector) -> bool:
    """Whether the process has none any more that is this one."""
    for number in _userfaultfds(pid):
        if injector.close(pid, number, uffd):
            return True
    return not _userfaultfds(pid)


def _userfaultfds(pid: int) -> list[int]:
    """Numbers of its descriptors that are some userfaultfd."""
    directory, found = f"/proc/{pid}/fd", []
    try:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                if "userfaultfd" in os.readlink(f"{directory}/{name}"):
                    found.append(int(name))
    except OSError:  # it has ended
        pass
    return found
