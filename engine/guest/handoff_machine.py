"""A VMM that has handed its memory over, as its agent drives it: orders over its connection.

Nothing is injected: it has sent a userfaultfd for each region, which tracks its writes at the
source and has it wait for missing pages at the destination.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from engine.errors import GuestError, MemoryRefused, WireError
from engine.guest.cgroups import threads_of
from engine.guest.foreign import NEVER_FORKED, ForeignBlock, check_nobody_waits, ranges_of
from engine.guest.foreign_missing import block_ranges, register_missing, unregister
from engine.guest.foreign_tracking import (
    ForeignTracker,
    check_tracker,
    open_pagemap,
    whole_pieces,
    write_protect,
)
from engine.guest.handoff_door import Visitor
from engine.guest.handoff_hello import (
    VERSION,
    Hello,
    check_descriptors,
    check_mapped,
    parse_hello,
)
from engine.guest.handoff_link import VmmLink, encode_line
from engine.guest.mappings import flags_of, looking_at, read_mappings
from engine.guest.sharers import check_still_alone
from engine.memory.tracking import TrackerName
from engine.wire import STATE_BYTES_MAX

STATE: Final = b"ramferry handoff 1\n"  #: what a device state begins with, also one of no bytes
STATE_WAIT_S: Final = 30.0


@dataclass(slots=True)
class HandedTracker(ForeignTracker):
    """Its userfaultfds are the machine's, and stay open."""

    end: Callable[[], None] = field(kw_only=True)

    def close(self) -> None:
        self.end()
        os.close(self.pagemap_fd)


class HandoffMachine:
    """One VMM; owns its connection and the descriptors that it has sent."""

    kind, qmp_path = "handoff", ""

    def __init__(self, visitor: Visitor, *, incoming: bool, on_end: Callable[[], None]) -> None:
        """Take over who has said hello, and say welcome.

        :param on_end: called by a thread when the VMM hangs up.
        :raise MigrationError: one line that says what is wrong; the visitor stays the caller's."""
        self.pid = visitor.pid
        self.blocks: list[ForeignBlock] = []
        self._tracker: HandedTracker | None = None
        self._ordered: tuple[int, str] | None = None  #: one whose answer nobody has read yet
        self._stays = False  #: what stands now stands whatever becomes of the connection
        hello = parse_hello(visitor.text)
        self.is_running, self._has_state = hello.running, hello.state
        self._check_role(incoming)
        self._vcpus = self._check_vcpus(hello)
        with looking_at(self.pid):
            offered = check_descriptors(hello, visitor.fds, self.pid, read_mappings(self.pid))
        check_nobody_waits(offered.blocks, self.pid)
        _check_not_in_children(offered.blocks, self.pid)
        role = "destination" if incoming else "source"
        try:
            visitor.connection.send(encode_line({"welcome": VERSION, "role": role}))
        except OSError as exc:
            raise GuestError("it hung up before it was welcome") from exc
        visitor.fds = []
        self.blocks, self._uffds = offered.blocks, offered.uffds
        self._link = VmmLink(visitor.connection, self.what, on_end)

    @property
    def what(self) -> str:
        return f"VMM (pid {self.pid})"

    def _check_role(self, incoming: bool) -> None:
        if incoming and self.is_running:
            raise GuestError(
                "it runs, and ramferry waits for a guest to put there; start it so that it stands "
                "until it is told to resume"
            )

    def _check_vcpus(self, hello: Hello) -> list[int]:
        """:raise WireError: threads of somebody else."""
        for thread in hello.vcpus:
            if not os.path.exists(f"/proc/{self.pid}/task/{thread}"):
                raise WireError(f"vcpus: process {self.pid} has no thread {thread}")
        return list(hello.vcpus)

    # -- running ---------------------------------------------------------------------------------

    def looks_running(self) -> bool:
        running = self._link.execute("status").running
        if running is None:
            raise GuestError(f"{self.what} does not say whether it runs")
        self.is_running = running
        return running

    def pause(self) -> int:
        """Stop it. If it ran, and its connection ends, it runs again, until `stay`."""
        self._stays = self._stays or not self.is_running
        at_ns = self._order_pause()
        if self.looks_running():
            raise GuestError(f"somebody else continued {self.what} as it was stopped")
        return at_ns

    def _order_pause(self) -> int:
        self._link.execute("pause", until="resume" if self._stays else "hangup")
        return time.monotonic_ns()

    def stay(self, stays: bool) -> None:
        """Whether it stands also without its connection, while it stands."""
        if self._stays is not stays:
            self._stays = stays
            self._order_pause()

    def arrive(self) -> None:
        """The guest is here, and stands: said without waiting, as `resume`."""
        self._stays = True
        self._order("arrived")

    def resume(self) -> None:
        self._stays = False
        self._order("resume")
        self.is_running = True

    def _order(self, command: str) -> None:
        """What becomes of it `confirm` tells, unless another order comes before."""
        before, self._ordered = self._ordered, None
        if before is not None:
            self._link.forget(before[0])
        self._ordered = (self._link.order(command), command)

    def confirm(self) -> None:
        """:raise GuestError: it did not do what it was told without waiting."""
        ordered, self._ordered = self._ordered, None
        if ordered is None:
            return
        try:
            self._link.answer(*ordered)
        except GuestError:
            self.is_running = False
            raise

    def vcpus(self) -> list[int]:
        """Threads that it has named, or all.

        :raise GuestError: it has ended."""
        try:
            return self._vcpus or threads_of(self.pid)
        except OSError as exc:
            raise GuestError(f"{self.what} has ended") from exc

    def check_all_wait(self) -> None:
        """It knows who maps what it hands over."""

    def count_vcpus(self) -> int:
        return len(self._vcpus)

    # -- device state ----------------------------------------------------------------------------

    def save(self) -> tuple[int, int]:
        if self.looks_running():
            raise GuestError(f"{self.what} runs; pause it before its state is saved")
        memfd = _make_state_file(len(STATE) + STATE_BYTES_MAX)
        try:
            size = self._save(memfd) if self._has_state else 0
            state = _make_state_file(len(STATE) + size)
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, state)
                os.pwrite(state, STATE, 0)
                _copy((memfd, 0), (state, len(STATE)), size)
                undo.pop_all()
        finally:
            os.close(memfd)
        return state, len(STATE) + size

    def _save(self, memfd: int) -> int:
        """Have it write its state; return how many bytes."""
        limit = STATE_BYTES_MAX - len(STATE)
        size = self._link.execute("save", memfd, STATE_WAIT_S, limit=limit).size
        if size is None or not 0 < size <= limit:
            raise GuestError(f"{self.what} saved a device state of {size} bytes")
        return size

    def load(self, state_fd: int, size: int) -> None:
        length = size - len(STATE)
        if length < 0 or os.pread(state_fd, len(STATE), 0) != STATE:
            raise GuestError(f"device state of {size} bytes is not that of a VMM by handoff")
        if self._has_state is not (length > 0):
            ours, theirs = ("a", "none") if self._has_state else ("no", "one")
            raise GuestError(f"{self.what} has {ours} device state, and {theirs} came")
        if length:
            memfd = _make_state_file(length)
            try:
                _copy((state_fd, len(STATE)), (memfd, 0), length)
                self._link.execute("load", memfd, STATE_WAIT_S, size=length)
            finally:
                os.close(memfd)
        if self.looks_running():
            raise GuestError(f"{self.what} ran the guest before it was told to")

    # -- tracking and missing pages --------------------------------------------------------------

    def check_memory(self) -> None:
        """It may have changed since the hello; slow, for a guest that runs.

        :raise MemoryRefused: it may write, elsewhere or as a child, what is not seen."""
        with looking_at(self.pid):
            mappings = read_mappings(self.pid)
        for each in self.blocks:
            check_mapped(each, self.pid, mappings)
        _check_not_in_children(self.blocks, self.pid)

    def start_tracking(self, wanted: TrackerName | None) -> list[ForeignTracker]:
        check_tracker(wanted)
        self.stop_tracking()
        self.check_memory()
        check_still_alone(self.blocks, self.pid)
        with contextlib.ExitStack() as undo:
            pagemap_fd = open_pagemap(self.pid)
            undo.callback(os.close, pagemap_fd)
            undo.callback(self._unregister)
            for uffd, (block, address) in zip(self._uffds, block_ranges(self.blocks), strict=True):
                write_protect(self.pid, uffd, pagemap_fd, address, block.size)
            undo.pop_all()
        pieces = whole_pieces(self.blocks)
        self._tracker = HandedTracker(self.pid, -1, pagemap_fd, 0, pieces, end=self._unregister)
        return [self._tracker]

    def check_sharers(self, besides: frozenset[int]) -> None:
        check_still_alone(self.blocks, self.pid, besides)

    def stop_tracking(self) -> None:
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def _unregister(self) -> None:
        unregister(self._uffds, block_ranges(self.blocks))

    def open_missing(self) -> list[int]:
        """It waits for what is missing, whoever of us dies, until `end_missing`; return copies of
        the userfaultfds, the caller's.

        :raise MigrationError: not possible, and why; it is as before."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._unregister)
            for uffd, place in zip(self._uffds, block_ranges(self.blocks), strict=True):
                register_missing(self.pid, uffd, *place)
            _check_not_in_children(self.blocks, self.pid)
            _check_waits(self.blocks, self.pid)
            self._link.execute("hold")
            uffds = [fcntl.fcntl(uffd, fcntl.F_DUPFD_CLOEXEC, 0) for uffd in self._uffds]
            undo.pop_all()
        return uffds

    def end_missing(self) -> None:
        """Nobody waits any more; it may close its userfaultfds when it hangs up."""
        self._unregister()
        with contextlib.suppress(GuestError):  # who is gone needs to know nothing
            self._link.tell("release")

    # -- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        self._link.give_up()

    def close(self) -> None:
        self.stop_tracking()
        self._link.close()
        for each in self.blocks:
            os.close(each.block.fd)
        self.blocks = []
        for uffd in self._uffds:
            os.close(uffd)
        self._uffds = []


def _check_not_in_children(blocks: list[ForeignBlock], pid: int) -> None:
    """Forks are not heard of here, so there may be none that matter.

    :raise MemoryRefused: a child would have the memory.
    :raise GuestError: the process has ended, or is not ours to look at."""
    if not _all_have("dc", blocks, pid):
        raise MemoryRefused(f"a child of process {pid} would have its memory; {NEVER_FORKED}")


def _check_waits(blocks: list[ForeignBlock], pid: int) -> None:
    """:raise MemoryRefused: what was registered is not the memory of this process.
    :raise GuestError: the process has ended, or is not ours to look at."""
    if not _all_have("um", blocks, pid):
        raise MemoryRefused(
            f"process {pid} does not wait for missing pages at the userfaultfds that it has sent; "
            "they must be its own"
        )


def _all_have(flag: str, blocks: list[ForeignBlock], pid: int) -> bool:
    """Whether all mappings of the blocks, one a block at the least, have the flag.

    :raise GuestError: the process has ended, or is not ours to look at."""
    found = flags_of(pid, ranges_of(blocks))
    return len(found) >= len(blocks) and all(flag in each for each in found)


def _make_state_file(size: int) -> int:
    """Of so many bytes for ever, so that nobody who has it makes it smaller or larger."""
    fd = os.memfd_create("ramferry-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd


def _copy(source: tuple[int, int], destination: tuple[int, int], size: int) -> None:
    """From one descriptor and place to the other; a source that ends before leaves zeros. Who has
    such a descriptor, too, may have moved its file position, so that is neither used nor moved."""
    (read_fd, read_at), (write_fd, write_at) = source, destination
    copied = 0
    while copied < size:
        piece = os.pread(read_fd, min(1024 * 1024, size - copied), read_at + copied)
        if not piece:
            return
        copied += os.pwrite(write_fd, piece, write_at + copied)
