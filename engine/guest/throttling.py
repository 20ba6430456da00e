"""Less processor time for a guest whose process knows nothing of us: auto-converge from outside.

Best by a quota for each of its threads that are vCPUs, so that its other threads answer as fast as
ever. Where no control group can be had the whole process is stopped and continued, a hundred times
in a second. Both are undone by the one who throttles, or by the other one of agent and control
process if that one is killed (`Undoing`).
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from engine.errors import GuestError, MemoryRefused
from engine.guest.cgroups import THREADS_MAX, ThreadQuotas, find_hierarchy

log = logging.getLogger("ramferry.guest")

PERCENT_MAX: Final = 99
CYCLE_S: Final = 0.01
STAND_S_MAX: Final = 0.1  #: at once; enough for who ran 1 ms and shall have 1 percent
STAND_STATES: Final = "Tt"  #: of /proc/PID/stat: stopped, traced


class Way(enum.Enum):
    """How it is done; the values show in `query-migrate`."""

    QUOTA_V1 = "cgroup-v1 cpu.cfs_quota_us"
    QUOTA_V2 = "cgroup-v2 cpu.max"
    STOPS = "SIGSTOP and SIGCONT"


QUOTA_WAYS: Final = {1: Way.QUOTA_V1, 2: Way.QUOTA_V2}


class Throttle:
    """One process's throttle, in its agent. Not for two threads at once."""

    def __init__(self, pid: int, vcpus: Callable[[], Sequence[int]]) -> None:
        """:param vcpus: threads whose time is meant, as of now."""
        self._pid, self._vcpus = pid, vcpus
        self._percent = 0
        self._quotas = open_quotas(pid)
        self._is_limited = False
        self._stops: StopCycle | None = None
        self.way: Way | None = None  #: of the last time that it was put on

    def set(self, percent: int) -> None:
        """Take so much time away from now on, or from the next `put_on` while it is lifted.

        :raise GuestError: out of range, or the process is gone."""
        if not 0 <= percent <= PERCENT_MAX:
            raise GuestError(f"throttle of {percent} percent; 0 to {PERCENT_MAX} are allowed")
        self._percent = percent

    def put_on(self) -> None:
        """Have it as it was set.

        :raise GuestError: the process is gone."""
        if not self._percent:
            self.close()
        elif self._stops is not None:
            self._stops.percent = self._percent
        elif not self._limit():
            self._stops = StopCycle(self._pid, self._percent)
            self.way = Way.STOPS

    def _limit(self) -> bool:
        """By quotas; False: that is not possible, and nothing was changed."""
        if self._quotas is None:
            return False
        threads = self._vcpus()
        self._is_limited = True
        try:
            if len(threads) > THREADS_MAX:
                raise OSError(f"{len(threads)} threads are more than {THREADS_MAX}")
            self._quotas.limit(threads, self._percent)
        except OSError as exc:
            log.info("no CPU quota for process %d: %s", self._pid, exc)
            self._undo_quotas()
            self._quotas = None
            return False
        self.way = QUOTA_WAYS[self._quotas.version]
        return True

    def lift(self) -> None:
        """The process runs freely and no thread of ours stops it, until `put_on`. Idempotent."""
        if self._stops is not None:
            self._stops.close()
            self._stops = None
        if self._is_limited:
            assert self._quotas is not None, "it is limited by them"
            try:
                self._quotas.relax()
            except OSError:
                self._undo_quotas()

    def _undo_quotas(self) -> None:
        assert self._quotas is not None, "it is limited by them"
        try:
            self._quotas.undo()
            self._is_limited = False
        except OSError as exc:
            log.error("the CPU quota of process %d could not be taken back: %s", self._pid, exc)

    def close(self) -> None:
        """All is as if it had never been throttled. Idempotent."""
        self._percent = 0
        self.lift()
        if self._is_limited:
            self._undo_quotas()


class StopCycle:
    """Stops a process for its share of each cycle; owns a thread and a pidfd."""

    def __init__(self, pid: int, percent: int) -> None:
        """:raise GuestError: the process is gone."""
        self.percent = percent  #: may be changed at any time
        self._pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as exc:
            raise GuestError(f"process {pid} has ended") from exc
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="throttle", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Until told to end, or the process has ended. It stands in proportion to how long it ran,
        which on a busy machine is longer than it was meant to."""
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while not self._ended.wait(CYCLE_S * (100 - self.percent) / 100):
                if stands(self._pid):  # by somebody else, who will continue it
                    continue
                try:
                    signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
                    ran_s = time.monotonic() - began
                    self._ended.wait(min(ran_s * self.percent / (100 - self.percent), STAND_S_MAX))
                finally:
                    signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
                    began = time.monotonic()

    def close(self) -> None:
        """It runs, and is stopped no more."""
        self._ended.set()
        self._thread.join()
        os.close(self._pidfd)


def stands(pid: int) -> bool:
    """Whether a process is stopped.

    :raise OSError: it has ended."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return chr(stat.read().rpartition(b")")[2].split()[0][0]) in STAND_STATES


def open_quotas(pid: int) -> ThreadQuotas | None:
    """For a process; None: there are no control groups with quotas here."""
    try:
        hierarchy = find_hierarchy()
        return None if hierarchy is None else ThreadQuotas(pid, hierarchy)
    except (MemoryRefused, OSError, ValueError) as exc:
        log.info("no CPU quota for process %d: %s", pid, exc)
        return None


class Undoing:
    """What a control process does when an agent that throttled was killed; owns a pidfd."""

    def __init__(self, pid: int) -> None:
        """To be made before the throttle is.

        :raise GuestError: the process is gone."""
        self._pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as exc:
            raise GuestError(f"process {pid} has ended") from exc
        self._quotas = open_quotas(pid)

    def undo(self, *, stops: bool) -> None:
        """The process is as free as it was; `stops`: it may have been stopped for a moment."""
        if self._quotas is not None:
            try:
                self._quotas.undo()
            except OSError as exc:
                log.error("the CPU quota of process %d stays: %s", self._pid, exc)
        if stops:
            with contextlib.suppress(OSError):  # it has ended
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def close(self) -> None:
        """Only once."""
        os.close(self._pidfd)
