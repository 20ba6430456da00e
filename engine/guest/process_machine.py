"""Any process with a shared mapping, as its agent drives it: signals, and no device state.

What is tracked is what goes through the mapping; `write` to the file itself is not seen. The
process must not mind being stopped (SIGSTOP), and its twin takes over nothing but the memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Final

from engine.errors import GuestError, MemoryRefused, shown
from engine.guest.cgroups import threads_of
from engine.guest.foreign import ForeignBlock, check_nobody_waits, find_shared, open_block
from engine.guest.foreign_tracking import ForeignTracker, check_tracker, track_foreign
from engine.guest.mappings import looking_at, read_mappings
from engine.guest.sharers import check_alone, check_still_alone
from engine.memory.tracking import TrackerName

BLOCK_NAME: Final = "memory"
STATE: Final = b"ramferry process 1"
STOP_WAIT_S: Final = 10.0  #: for all threads to stand; one may be in an uninterruptible wait
LOOK_S: Final = 0.0005
STOPPED: Final = "TtXZ"  #: states of a thread that runs no more: stopped, traced, dead


class ProcessMachine:
    """One process; owns its pidfd, the file's descriptor and the tracker, not the process."""

    kind, qmp_path = "process", ""

    def __init__(self, pid: int, path: str, *, incoming: bool) -> None:
        """Attach. A process that shall take a memory over is stopped until then.

        :raise MigrationError: one line that says what is missing; nothing was changed."""
        self.pid = pid
        self.blocks: list[ForeignBlock] = []
        self._tracker: ForeignTracker | None = None
        self._ended = threading.Event()
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as exc:
            raise GuestError(f"there is no process {pid}: {exc.strerror}") from exc
        try:
            self.blocks = [self._find(path)]
            self.looks_running()
            if incoming:
                check_nobody_waits(self.blocks, pid)
                self.pause()
        except BaseException:
            self.close()
            raise

    @property
    def what(self) -> str:
        return f"process {self.pid}"

    def _find(self, path: str) -> ForeignBlock:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise MemoryRefused(f"'{shown(path)}': {exc.strerror}") from exc
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            with looking_at(self.pid):
                mappings = read_mappings(self.pid)
            size = os.fstat(fd).st_size
            found = find_shared(f"'{shown(path)}'", fd, size, self.pid, mappings)
            check_alone({found.file}, self.pid)
            block = ForeignBlock(open_block(BLOCK_NAME, fd, size), found.start)
            undo.pop_all()
        return block

    # -- running ---------------------------------------------------------------------------------

    def _states(self) -> list[str]:
        """A letter for each thread; those that end meanwhile are left out."""
        states = []
        try:
            for name in os.listdir(f"/proc/{self.pid}/task"):
                try:
                    with open(f"/proc/{self.pid}/task/{name}/stat", "rb") as stat:
                        states.append(chr(stat.read().rpartition(b")")[2].split()[0][0]))
                except (FileNotFoundError, ProcessLookupError):
                    continue
        except FileNotFoundError as exc:
            raise GuestError(f"process {self.pid} has ended") from exc
        return states

    def looks_running(self) -> bool:
        self.is_running = any(state not in STOPPED for state in self._states())
        return self.is_running

    def pause(self) -> int:
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_WAIT_S
        while self.looks_running():
            if time.monotonic() > deadline or self._ended.wait(LOOK_S):
                raise GuestError(f"process {self.pid} did not stand in {STOP_WAIT_S:g} s")
        return time.monotonic_ns()

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self.is_running = True

    def confirm(self) -> None:
        """A signal needs no answer."""

    def vcpus(self) -> list[int]:
        """All of its threads.

        :raise GuestError: it has ended."""
        try:
            return threads_of(self.pid)
        except OSError as exc:
            raise GuestError(f"process {self.pid} has ended") from exc

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except OSError as exc:
            raise GuestError(f"process {self.pid} takes no signal: {exc.strerror}") from exc

    # -- device state ----------------------------------------------------------------------------

    def save(self) -> tuple[int, int]:
        if self.looks_running():
            raise GuestError("the process runs; pause it before its state is saved")
        fd = os.memfd_create("ramferry-state", os.MFD_CLOEXEC)
        os.write(fd, STATE)
        return fd, len(STATE)

    def load(self, state_fd: int, size: int) -> None:
        if size != len(STATE) or os.pread(state_fd, size, 0) != STATE:
            raise GuestError(f"device state of {size} bytes is not that of a process")
        if self.looks_running():
            raise GuestError(f"somebody continued process {self.pid} before its memory was whole")

    def check_all_wait(self) -> None:
        """It is alone."""

    def count_vcpus(self) -> int:
        """Nobody knows which of its threads work."""
        return 0

    # -- tracking --------------------------------------------------------------------------------

    def start_tracking(self, wanted: TrackerName | None) -> list[ForeignTracker]:
        check_tracker(wanted)
        self.stop_tracking()
        self._tracker = track_foreign(self.pid, self.blocks)
        return [self._tracker]

    def check_sharers(self, besides: frozenset[int]) -> None:
        check_still_alone(self.blocks, self.pid, besides)

    def stop_tracking(self) -> None:
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    # -- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        self._ended.set()

    def close(self) -> None:
        self.end()
        self.stop_tracking()
        for each in self.blocks:
            os.close(each.block.fd)
        self.blocks = []
        os.close(self._pidfd)
