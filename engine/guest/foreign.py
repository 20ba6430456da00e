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
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from engine import _native
from engine.errors import MemoryRefused, shown
from engine.guest.tracker import FEATURES
from engine.memory.blocks import PAGE_SIZE, STRIPE_SIZE, RamBlock
from engine.memory.tracking import TrackerName

log = logging.getLogger("ramferry.guest")

#: struct uffd_msg of linux/userfaultfd.h: what it tells of, and a descriptor.
FORK_MESSAGE: Final = struct.Struct("<B7xI20x")
EVENT_FORK: Final = 0x13
#: What a process does whose memory its children do not need.
NEVER_FORKED: Final = "have the process call madvise(MADV_DONTFORK) for that memory"
INJECT_WAIT_NS: Final = 5_000_000_000
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
    _native.INJECT_NO_SAFE_THREAD: "no thread of process {pid} can be stopped at a safe place: on "
    "a stack that ends in a guard, in no restartable sequence, and not waiting for a disk",
    _native.INJECT_TOO_OLD: "the kernel is too old: userfaultfd and pidfd_getfd are needed",
    _native.INJECT_REFUSED: "the kernel refuses process {pid} a userfaultfd: {error}; "
    "sysctl vm.unprivileged_userfaultfd=1 allows it",
    _native.INJECT_FAILED: "a userfaultfd could not be had from process {pid}: {error}",
}


Range = tuple[int, int]  #: address and size, in the process


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
    texts = [
        f" {os.major(device):02x}:{os.minor(device):02x} {inode} ".encode()
        for device, inode in inodes
    ]
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (pid, os.getpid()):
            continue
        with contextlib.suppress(OSError, ValueError):
            if not _maps_have(int(name), texts):
                continue
            if any((each.device, each.inode) in inodes for each in read_mappings(int(name))):
                found.append(int(name))
    return found


def _maps_have(pid: int, texts: Sequence[bytes]) -> bool:
    """Whether /proc/PID/maps has one of the texts anywhere, be it in a file's name; parsing every
    line takes three times as long.

    :raise OSError: the process is gone, or not ours to look at."""
    with open(f"/proc/{pid}/maps", "rb", buffering=0) as maps:
        lines = maps.readall()
    return any(text in lines for text in texts)


@dataclass(frozen=True, slots=True)
class ForeignBlock:
    """A RAM block of the process.

    :ivar block: its descriptor is ours, to be closed.
    :ivar address: where the process maps it whole."""

    block: RamBlock
    address: int


class ForeignMachine(Protocol):
    """What an agent drives: a guest in a process that others have started. No event loop; all but
    `resume` may take long. All raise MigrationError when it cannot be done."""

    kind: str  #: as in `--guest`
    qmp_path: str  #: of a QEMU's socket, else empty
    pid: int
    blocks: list[ForeignBlock]
    is_running: bool  #: as of the last look or order

    @property
    def what(self) -> str:
        """The process, as people are told of it."""
        ...

    def looks_running(self) -> bool:
        """Look whether it runs: others than we may have stopped or continued it."""
        ...

    def pause(self) -> int:
        """Stop it; return the monotonic time (ns) when all stood."""
        ...

    def resume(self) -> None:
        """Have it run, without waiting: that happens whatever becomes of this process."""
        ...

    def vcpus(self) -> list[int]:
        """Threads that a throttle is meant for, as of now."""
        ...

    def confirm(self) -> None:
        """Wait for what became of the last `resume`, if there was one."""
        ...

    def save(self) -> tuple[int, int]:
        """Device state of the stopped guest: a memfd, the caller's, and its size."""
        ...

    def load(self, state_fd: int, size: int) -> None:
        """Take a device state over: the guest is whole then, and stands."""
        ...

    def count_vcpus(self) -> int:
        """Threads that must wait for "all wait"; 0: nobody can say."""
        ...

    def start_tracking(self, wanted: TrackerName | None) -> ForeignTracker:
        """Begin to track; the tracker stays ours."""
        ...

    def stop_tracking(self) -> None:
        """Track no more. Idempotent."""
        ...

    def end(self) -> None:
        """Have what waits give up soon."""
        ...

    def close(self) -> None:
        """Let it be; nothing may run in another thread any more."""
        ...


@dataclass(slots=True)
class ForeignTracker:
    """Writes of process `pid` to some of its memory are tracked; owns both descriptors.

    :ivar uffd: to be watched: when it can be read `note_forks` is due.
    :ivar pagemap_fd: to be scanned, by whomever it is lent.
    :ivar stopped_ns: so long stood one of its threads, once.
    :ivar has_forked: a child may have written what nobody saw."""

    pid: int
    uffd: int
    pagemap_fd: int
    stopped_ns: int
    has_forked: bool = False

    def note_forks(self) -> None:
        """A fork returns, in parent and child, when it was noted: no child writes before."""
        with contextlib.suppress(BlockingIOError):
            while True:
                event, child_uffd = FORK_MESSAGE.unpack(os.read(self.uffd, FORK_MESSAGE.size))
                if event == EVENT_FORK:
                    self.has_forked = True
                    os.close(child_uffd)  # the child is not tracked

    def check_forks(self) -> None:
        """:raise MemoryRefused: not all was seen that was written."""
        if self.has_forked:
            raise MemoryRefused(
                f"process {self.pid} has forked meanwhile, and what its child writes is not seen; "
                "migrate it once more"
            )

    def close(self) -> None:
        """Stop tracking. Only once."""
        os.close(self.uffd)
        os.close(self.pagemap_fd)


def ranges_of(blocks: Sequence[ForeignBlock]) -> list[Range]:
    """Where they are in the process."""
    return [(each.address, each.block.size) for each in blocks]


def check_tracker(wanted: TrackerName | None) -> None:
    """:raise MemoryRefused: nothing but a userfaultfd sees what a stranger writes."""
    if wanted not in (None, TrackerName.UFFD):
        raise MemoryRefused(
            f"dirty tracker '{wanted.value}' does not work for a process that knows nothing of us; "
            "working is: uffd-wp"
        )


def open_block(name: str, fd: int, size: int) -> RamBlock:
    """:raise MemoryRefused: not whole pages of the file's."""
    page_size = max(os.fstatvfs(fd).f_bsize, PAGE_SIZE)
    if size <= 0 or size % page_size:
        raise MemoryRefused(
            f"memory '{shown(name)}' of {size} bytes is not whole pages of {page_size}"
        )
    return RamBlock(name, size, fd, page_size)


def check_whole(name: str, mapping: Mapping, size: int, mappings: Sequence[Mapping]) -> None:
    """:raise MemoryRefused: the file is not mapped once, and from its beginning to its end."""
    file = (mapping.device, mapping.inode)
    whole = [each for each in mappings if (each.device, each.inode) == file]
    covered = sum(each.end - each.start for each in whole)
    end = max(each.end for each in whole)
    if covered != size or mapping.offset != 0 or end != mapping.start + size:
        raise MemoryRefused(
            f"the file of memory '{shown(name)}' is mapped in part, from an offset, or more than "
            "once; give it a file of its own"
        )


def check_alone(
    files: set[tuple[int, int]], pid: int, besides: frozenset[int] = frozenset()
) -> None:
    """Others' writes would not be seen.

    :param besides: processes that may.
    :raise MemoryRefused: another process maps one of the files, as (device, inode)."""
    if others := [each for each in others_mapping(files, pid) if each not in besides]:
        numbers = ", ".join(str(each) for each in others)
        raise MemoryRefused(
            f"other processes map the memory of process {pid}, too (pid {numbers}), and are not "
            "tracked yet; end them (a QEMU's vhost-user back ends: use devices of QEMU itself)"
        )


def check_still_alone(
    blocks: Sequence[ForeignBlock], pid: int, besides: frozenset[int] = frozenset()
) -> None:
    """As `check_alone`, also of those who have come since the blocks were found."""
    found = (os.fstat(each.block.fd) for each in blocks)
    check_alone({(each.st_dev, each.st_ino) for each in found}, pid, besides)


def family_of(pid: int) -> frozenset[int]:
    """A process and its children, also when threads of it end meanwhile; none of one that has
    ended."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return frozenset()
    found = {pid}
    for thread in threads:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as children,
        ):
            found.update(int(child) for child in children.read().split())
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Place:
    """A mapping, as of smaps in proc(5); `flags` are the kernel's."""

    start: int
    end: int
    page_size: int
    flags: frozenset[str]


def read_places(pid: int) -> list[Place]:
    """All mappings, by address.

    :raise OSError: the process is gone, or not ours to look at."""
    places, start, end, page_size = [], 0, 0, 0
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            words = line.split()
            if not words[0].endswith(":"):
                start, end = (int(each, 16) for each in words[0].split("-"))
            elif words[0] == "KernelPageSize:":
                page_size = int(words[1]) * 1024
            elif words[0] == "VmFlags:":
                places.append(Place(start, end, page_size, frozenset(words[1:])))
    return places


def flags_of(pid: int, ranges: Sequence[Range]) -> list[frozenset[str]]:
    """The kernel's flags of each mapping in these ranges of the process.

    :raise OSError: the process is gone, or not ours to look at."""
    return [
        place.flags
        for place in read_places(pid)
        if any(address <= place.start < address + size for address, size in ranges)
    ]


def check_nobody_waits(blocks: Sequence[ForeignBlock], pid: int) -> None:
    """A postcopy whose ramferry was killed leaves memory that waits for pages for ever.

    :raise MemoryRefused: one of the blocks is such memory.
    :raise OSError: the process is gone, or not ours to look at."""
    if any("um" in each for each in flags_of(pid, ranges_of(blocks))):
        raise MemoryRefused(
            f"the memory of process {pid} waits for pages of a migration that nobody goes on with; "
            "end the process and start another one"
        )


def is_in_children(pid: int, ranges: Sequence[Range]) -> bool:
    """Whether a fork would give memory of these ranges to the child: no MADV_DONTFORK holds.

    :raise OSError: the process is gone, or not ours to look at."""
    return not all("dc" in each for each in flags_of(pid, ranges))


def open_foreign_uffd(pid: int, flags: int, *, keeps: bool = False) -> tuple[int, int]:
    """A fresh userfaultfd of the process's memory, the caller's; and for how many ns one of its
    threads stood.

    :param keeps: the process keeps it open, too.
    :raise CannotInject: says why not; the process is as before."""
    obstacle, uffd, left_open, error, thread, stopped_ns, attempts = _native.inject_userfaultfd(
        pid, flags, INJECT_WAIT_NS, keeps
    )
    if obstacle != _native.INJECT_DONE:
        raise CannotInject(obstacle, pid, error)
    log.info(
        "userfaultfd of process %d: thread %d stood for %d us, %d attempts",
        pid, thread, stopped_ns // 1000, attempts,
    )  # fmt: skip
    if left_open >= 0 and not keeps:
        log.warning("descriptor %d stays open in process %d, unused", left_open, pid)
    return uffd, stopped_ns


def track_foreign(pid: int, blocks: Sequence[ForeignBlock]) -> ForeignTracker:
    """Begin to track writes to the blocks of the process; all is clean from now.

    :raise MemoryRefused: not possible, and why; the process is as before."""
    ranges = ranges_of(blocks)
    with contextlib.ExitStack() as undo:
        pagemap_fd = open_pagemap(pid)
        undo.callback(os.close, pagemap_fd)
        uffd, stopped_ns = open_foreign_uffd(pid, _native.UFFD_USER_MODE_ONLY)
        undo.callback(os.close, uffd)
        try:
            _negotiate(pid, uffd, ranges)
        except OSError as exc:
            raise MemoryRefused(f"tracking process {pid}: {exc.strerror}") from exc
        for address, size in ranges:
            write_protect(pid, uffd, pagemap_fd, address, size)
        check_still_alone(blocks, pid)  # now that forks are noted
        undo.pop_all()
        return ForeignTracker(pid, uffd, pagemap_fd, stopped_ns)


def open_pagemap(pid: int) -> int:
    """The caller's.

    :raise MemoryRefused: not to be had, or the kernel cannot scan it."""
    try:
        pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise MemoryRefused(f"/proc/{pid}/pagemap: {exc.strerror}") from exc
    if not _native.pagemap_scan_supported(pagemap_fd):
        os.close(pagemap_fd)
        raise MemoryRefused("the kernel has no PAGEMAP_SCAN, which Linux 6.7 brought")
    return pagemap_fd


def write_protect(pid: int, uffd: int, pagemap_fd: int, address: int, size: int) -> None:
    """Have a negotiated userfaultfd of the process track one range; all of it is clean from now.

    :raise MemoryRefused: not possible, and why."""
    try:
        _native.uffd_register(uffd, address, size, _native.UFFD_REGISTER_WP)
        _call_clean(pagemap_fd, address, size // PAGE_SIZE)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise MemoryRefused(
                f"the memory of process {pid} is tracked already, by another ramferry or by "
                "the process itself"
            ) from exc
        raise MemoryRefused(f"tracking process {pid}: {exc.strerror}") from exc


def _negotiate(pid: int, uffd: int, ranges: Sequence[Range]) -> None:
    """So that forks are told, if there can be any that matter.

    :raise MemoryRefused: they cannot."""
    try:
        _native.uffd_negotiate(uffd, FEATURES | _native.UFFD_FEATURE_EVENT_FORK)
    except PermissionError as exc:
        if is_in_children(pid, ranges):
            raise MemoryRefused(
                f"forks of process {pid} cannot be seen by this user, nor what its children write; "
                f"run ramferry with CAP_SYS_PTRACE, or {NEVER_FORKED}"
            ) from exc
        _native.uffd_negotiate(uffd, FEATURES)


def _call_clean(pagemap_fd: int, address: int, page_count: int) -> None:
    scratch = bytearray(-(-page_count // 64) * 8)
    stripe = (page_count, STRIPE_SIZE // PAGE_SIZE, 0, 1)
    _native.pagemap_scan(pagemap_fd, address, scratch, stripe)
