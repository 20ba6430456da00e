"""Writes of a process that knows nothing of us, seen by a userfaultfd of its own.

We hold the only descriptor: when it is closed, or when this process ends, the kernel ends all
tracking, and the other process pays nothing any more.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from engine import _native
from engine.errors import MemoryRefused
from engine.guest.foreign import NEVER_FORKED, ForeignBlock, is_in_children, register
from engine.guest.injecting import Injector
from engine.guest.mappings import Range
from engine.guest.sharers import check_still_alone
from engine.guest.tracker import FEATURES
from engine.memory.blocks import PAGE_SIZE, STRIPE_SIZE
from engine.memory.pieces import TrackedPiece, whole_piece
from engine.memory.tracking import TrackerName

#: struct uffd_msg of linux/userfaultfd.h: what it tells of, and a descriptor.
FORK_MESSAGE: Final = struct.Struct("<B7xI20x")
EVENT_FORK: Final = 0x13
REASON: Final = "userfaultfd write-protect async with PAGEMAP_SCAN, injected into process"


@dataclass(slots=True)
class ForeignTracker:
    """Writes of process `pid` to some of its memory are tracked; owns both descriptors.

    :ivar pieces: what is tracked.
    :ivar uffd: to be watched: when it can be read `note_forks` is due.
    :ivar pagemap_fd: to be scanned, by whomever it is lent.
    :ivar stopped_ns: so long stood one of its threads, once.
    :ivar has_forked: a child may have written what nobody saw."""

    pid: int
    uffd: int
    pagemap_fd: int
    stopped_ns: int
    pieces: list[TrackedPiece]
    has_forked: bool = False

    @property
    def what(self) -> str:
        """The process, as people are told of it."""
        return f"process {self.pid}"

    def note_forks(self) -> None:
        """A fork returns, in parent and child, when it was noted: no child writes before. One at a
        time: who forks without end keeps nobody here."""
        with contextlib.suppress(BlockingIOError):
            event, child_uffd = FORK_MESSAGE.unpack(os.read(self.uffd, FORK_MESSAGE.size))
            if event == EVENT_FORK:
                self.has_forked = True
                os.close(child_uffd)  # the child is not tracked

    def check_forks(self) -> None:
        """:raise MemoryRefused: not all was seen that was written."""
        if self.has_forked:
            raise MemoryRefused(
                f"{self.what} has forked meanwhile, and what its child writes is not seen; "
                "migrate it once more"
            )

    def check(self) -> None:
        """:raise MemoryRefused: not all was seen that was written."""
        self.check_forks()

    def close(self) -> None:
        """Stop tracking. Only once."""
        os.close(self.uffd)
        os.close(self.pagemap_fd)


TrackerT = TypeVar("TrackerT", bound=ForeignTracker)


def check_tracker(wanted: TrackerName | None) -> None:
    """:raise MemoryRefused: nothing but a userfaultfd sees what a stranger writes."""
    if wanted not in (None, TrackerName.UFFD):
        raise MemoryRefused(
            f"dirty tracker '{wanted.value}' does not work for a process that knows nothing of us; "
            "working is: uffd-wp"
        )


def track_foreign(pid: int, blocks: Sequence[ForeignBlock]) -> ForeignTracker:
    """Begin to track writes to the blocks of the process, which nobody else maps; all is clean from
    now.

    :raise MemoryRefused: not possible, and why; the process is as before."""
    with contextlib.ExitStack() as undo:
        tracker = track(pid, whole_pieces(blocks), Injector(), ForeignTracker)
        undo.callback(tracker.close)
        check_still_alone(blocks, pid)  # now that forks are noted
        undo.pop_all()
        return tracker


def whole_pieces(blocks: Sequence[ForeignBlock]) -> list[TrackedPiece]:
    """All of the memory, where its owner maps it."""
    return [whole_piece(i, each.address, each.block.size) for i, each in enumerate(blocks)]


def track(
    pid: int,
    pieces: list[TrackedPiece],
    injector: Injector,
    kind: Callable[[int, int, int, int, list[TrackedPiece]], TrackerT],
) -> TrackerT:
    """Begin to track writes of the process to the pieces; all is clean from now.

    :param kind: makes the tracker, of what a `ForeignTracker` is made of.
    :raise MemoryRefused: not possible, and why; the process is as before.
    :raise GuestError: it has ended."""
    ranges = [(each.address, each.size) for each in pieces]
    with contextlib.ExitStack() as undo:
        pagemap_fd = open_pagemap(pid)
        undo.callback(os.close, pagemap_fd)
        uffd, stopped_ns = injector.open(pid, _native.UFFD_USER_MODE_ONLY)
        undo.callback(os.close, uffd)
        try:
            _negotiate(pid, uffd, ranges)
        except OSError as exc:
            raise MemoryRefused(f"tracking process {pid}: {exc.strerror}") from exc
        for address, size in ranges:
            write_protect(pid, uffd, pagemap_fd, address, size)
        undo.pop_all()
        return kind(pid, uffd, pagemap_fd, stopped_ns, pieces)


def reason_of(trackers: Sequence[ForeignTracker]) -> str:
    """For people: how is tracked, and what it cost the processes."""
    pids = ", ".join(str(each.pid) for each in trackers)
    stopped_us = ", ".join(str(each.stopped_ns // 1000) for each in trackers)
    return f"{REASON} {pids}; a thread of it stood for {stopped_us} us"


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
        register(pid, uffd, (address, size), _native.UFFD_REGISTER_WP)
        _call_clean(pagemap_fd, address, size // PAGE_SIZE)
    except OSError as exc:
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
