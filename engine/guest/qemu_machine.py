"""A running QEMU as its agent drives it: run state, device state and tracking. No event loop.

Device state goes by QEMU's own migration with `x-ignore-shared`, which leaves shared RAM to us,
through a pipe. Its capabilities and parameters are put back afterwards.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from engine.errors import GuestError, MemoryRefused
from engine.guest.back_ends import BackEnd, check_bypasses, track_all
from engine.guest.foreign import ForeignBlock, check_nobody_waits
from engine.guest.foreign_tracking import ForeignTracker, check_tracker
from engine.guest.qemu_memory import (
    check_drives,
    check_idle,
    check_named,
    check_no_back_ends,
    find_blocks,
)
from engine.guest.qmpclient import QmpClient, QmpRefused
from engine.guest.sharers import check_still_alone
from engine.memory.tracking import TrackerName
from engine.wire import STATE_BYTES_MAX

STATE_WAIT_S: Final = 30.0  #: for QEMU to save or load its device state; it takes 3 to 15 ms
LOOK_S: Final = 0.001
PIECE_BYTES: Final = 1024 * 1024
DESCRIPTOR: Final = "ramferry-state"
#: What the device state must go with; every other capability that is on would change its way.
SOURCE_WANTS: Final = frozenset({"x-ignore-shared"})
#: Images are not taken from the source before the guest itself is.
DESTINATION_WANTS: Final = frozenset({"x-ignore-shared", "late-block-activate"})
#: 1 TiB/s: nothing but device state and ROMs is sent.
PARAMETERS: Final = {"max-bandwidth": 2**40}


@dataclass(slots=True)
class Settings:
    """What this QEMU's operator had set for migrations, and what we have changed of it."""

    capabilities: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)


class QemuMachine:
    """One QEMU; owns the QMP connection, the descriptors of blocks and back ends, and the trackers,
    not the QEMU."""

    kind = "qemu"

    def __init__(self, path: str, back_ends: Sequence[int] = (), *, incoming: bool) -> None:
        """Attach.

        :param back_ends: pids of processes that may map its RAM, too.
        :raise MigrationError: one line that says what is missing; nothing was changed."""
        self.qmp_path = path
        self._settings = Settings()
        self._back_ends: list[BackEnd] = []
        self._trackers: list[ForeignTracker] = []
        self._continuing: int | None = None  #: a `cont` whose answer nobody has read yet
        self._ended = threading.Event()
        self._qmp = QmpClient(path)
        self.blocks: list[ForeignBlock] = []
        try:
            self.pid = self._qmp.peer_pid
            self._check_status(incoming)
            check_idle(self._qmp)
            check_drives(self._qmp)
            self._open_back_ends(back_ends)
            self.blocks = find_blocks(self._qmp, self.pid, self._pids)
            if incoming:  # what its back ends write is its own affair
                check_nobody_waits(self.blocks, self.pid)
                self._prepare(DESTINATION_WANTS)
            else:
                check_named(self._qmp, self._pids)
        except BaseException:
            self.close()
            raise

    def _check_status(self, incoming: bool) -> None:
        if self.pid <= 0:
            raise GuestError("QEMU runs in a pid namespace that cannot be seen from here")
        self.is_running = bool(self._status()["running"])
        is_waiting = self._status()["status"] == "inmigrate"
        if incoming and not is_waiting:
            raise GuestError(
                "QEMU does not wait for a migration; start it with -incoming defer, as the source "
                "and with RAM of its own"
            )
        if is_waiting and not incoming:
            raise GuestError("QEMU waits for a migration (-incoming); it has no guest yet")

    def _open_back_ends(self, pids: Sequence[int]) -> None:
        for pid in dict.fromkeys(pids):
            if pid in (self.pid, os.getpid()):
                raise GuestError(f"process {pid} is no vhost-user back end, but QEMU or ramferry")
            self._back_ends.append(BackEnd.open(pid))

    @property
    def _pids(self) -> frozenset[int]:
        """Of the back ends."""
        return frozenset(each.pid for each in self._back_ends)

    @property
    def what(self) -> str:
        return f"QEMU (pid {self.pid})"

    def _status(self) -> dict[str, Any]:
        return dict(self._qmp.execute("query-status"))

    # -- running ---------------------------------------------------------------------------------

    def looks_running(self) -> bool:
        """Ask whether its vCPUs run: others than we may have stopped or continued it."""
        self.is_running = bool(self._status()["running"])
        return self.is_running

    def pause(self) -> int:
        """Stop every vCPU and finish what its disks do; return the time when all stood."""
        self._qmp.execute("stop")
        at_ns = time.monotonic_ns()
        if self.looks_running():
            raise GuestError("somebody else continued the QEMU as it was stopped")
        return at_ns

    def resume(self) -> None:
        """Have it run, without waiting: the command has left when this returns. `confirm` tells
        whether it was obeyed; a QEMU that has not begun it forgets it when this process ends."""
        self._continuing = self._qmp.order("cont")
        self.is_running = True

    def confirm(self) -> None:
        """Wait for the answer to the last `resume`, if there was one.

        :raise GuestError: QEMU does not run."""
        number, self._continuing = self._continuing, None
        if number is None:
            return
        try:
            self._qmp.answer(number, "cont")
        except QmpRefused:
            self.is_running = False
            raise

    def vcpus(self) -> list[int]:
        """:raise GuestError: QEMU does not answer."""
        return [int(each["thread-id"]) for each in self._qmp.execute("query-cpus-fast")]

    # -- device state ----------------------------------------------------------------------------

    def save(self) -> tuple[int, int]:
        """Device state of the stopped guest: a memfd, the caller's, and its size.

        QEMU is in `postmigrate` then; `resume` undoes it.

        :raise GuestError: QEMU refused, hangs, or its state is too large."""
        check_idle(self._qmp)
        if self.looks_running():
            raise GuestError("the guest runs; pause it before its state is saved")
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(reader, "rb", buffering=0) as stream:
            try:
                self._qmp.execute("getfd", {"fdname": DESCRIPTOR}, fd=writer)
                self._qmp.execute("migrate", {"uri": f"fd:{DESCRIPTOR}"})
            finally:
                os.close(writer)
            with contextlib.ExitStack() as undo:
                memfd = os.memfd_create("ramferry-state", os.MFD_CLOEXEC)
                undo.callback(os.close, memfd)
                try:
                    size = self._collect(stream.fileno(), memfd)
                except GuestError:
                    self._cancel()
                    raise
                self._await_migrated("saving")
                undo.pop_all()
        return memfd, size

    def _collect(self, fd: int, memfd: int) -> int:
        deadline, size = time.monotonic() + STATE_WAIT_S, 0
        os.set_blocking(fd, False)
        while True:
            try:
                piece = os.read(fd, PIECE_BYTES)
            except BlockingIOError:
                self._pause_until(deadline, "send its device state")
                continue
            if not piece:
                return size
            size += os.write(memfd, piece)
            if size > STATE_BYTES_MAX:
                raise GuestError(
                    f"QEMU's device state is larger than {STATE_BYTES_MAX} bytes; start it with "
                    "-vga none or a smaller display, whose memory goes with it"
                )

    def _pause_until(self, deadline: float, doing: str) -> None:
        if time.monotonic() > deadline or self._ended.wait(LOOK_S):
            raise GuestError(f"QEMU did not {doing} in {STATE_WAIT_S:g} s")

    def _cancel(self) -> None:
        with contextlib.suppress(GuestError):
            self._qmp.execute("migrate_cancel")

    def _await_migrated(self, doing: str) -> None:
        """:raise GuestError: QEMU's own migration failed, or hangs."""
        deadline = time.monotonic() + STATE_WAIT_S
        while True:
            left_s = max(LOOK_S, deadline - time.monotonic())  # a page it needs may be on its way
            migration = self._qmp.execute("query-migrate", wait_s=left_s)
            status = migration.get("status", "none")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                reason = migration.get("error-desc", status)
                raise GuestError(f"QEMU failed in {doing} its device state: {reason}")
            self._pause_until(deadline, f"end {doing} its device state")

    def load(self, state_fd: int, size: int) -> None:
        """Take a device state over: the guest is whole then, and stands.

        :raise GuestError: QEMU refused it, and has ended or is of no more use."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with os.fdopen(writer, "wb", buffering=0) as stream:
            try:
                self._qmp.execute("getfd", {"fdname": DESCRIPTOR}, fd=reader)
                self._qmp.execute("migrate-incoming", {"uri": f"fd:{DESCRIPTOR}"})
            finally:
                os.close(reader)
            self._pour(state_fd, size, stream.fileno())
        self._await_migrated("loading")
        self._put_back()
        if self.looks_running():
            raise GuestError("QEMU ran the guest before it was told to")

    def _pour(self, state_fd: int, size: int, fd: int) -> None:
        deadline, offset = time.monotonic() + STATE_WAIT_S, 0
        os.set_blocking(fd, False)
        while offset < size:
            piece = os.pread(state_fd, min(PIECE_BYTES, size - offset), offset)
            if not piece:
                raise GuestError(f"the device state ends after {offset} of {size} bytes")
            try:
                offset += os.write(fd, piece)
            except BlockingIOError:
                self._pause_until(deadline, "take its device state")
            except BrokenPipeError as exc:
                raise GuestError("QEMU refused the device state; see its log") from exc

    def check_all_wait(self) -> None:
        check_no_back_ends(self._qmp)

    def count_vcpus(self) -> int:
        return len(self._qmp.execute("query-cpus-fast"))

    # -- what its operator had set ---------------------------------------------------------------

    def _prepare(self, wanted: frozenset[str]) -> None:
        """Set what the device state needs.

        :raise MemoryRefused: this QEMU is too old."""
        known = self._capabilities()
        if lacking := sorted(wanted - set(known)):
            raise MemoryRefused(f"this QEMU is too old: it has no capability {lacking[0]}")
        parameters = self._qmp.execute("query-migrate-parameters")
        changed = {name: on for name, on in known.items() if on != (name in wanted)}
        self._set_capabilities({name: not on for name, on in changed.items()})
        self._settings.capabilities = changed
        self._settings.parameters = {name: parameters[name] for name in PARAMETERS}
        self._qmp.execute("migrate-set-parameters", PARAMETERS)

    def _capabilities(self) -> dict[str, bool]:
        found = self._qmp.execute("query-migrate-capabilities")
        return {each["capability"]: bool(each["state"]) for each in found}

    def _set_capabilities(self, states: dict[str, bool]) -> None:
        if states:
            listed = [{"capability": name, "state": on} for name, on in states.items()]
            self._qmp.execute("migrate-set-capabilities", {"capabilities": listed})

    def _put_back(self) -> None:
        settings, self._settings = self._settings, Settings()
        self._set_capabilities(settings.capabilities)
        if settings.parameters:
            self._qmp.execute("migrate-set-parameters", settings.parameters)

    # -- tracking --------------------------------------------------------------------------------

    def start_tracking(self, wanted: TrackerName | None) -> list[ForeignTracker]:
        """:raise MemoryRefused: not possible, and why."""
        check_tracker(wanted)
        self.stop_tracking()
        check_idle(self._qmp)
        check_drives(self._qmp)
        check_named(self._qmp, self._pids)
        self._prepare(SOURCE_WANTS)
        try:
            self._trackers = track_all(self.pid, self.blocks, self._back_ends)
        except BaseException:
            with contextlib.suppress(GuestError):
                self._put_back()
            raise
        return self._trackers

    def check_sharers(self, besides: frozenset[int]) -> None:
        check_still_alone(self.blocks, self.pid, besides | self._pids)
        for back_end in self._back_ends:
            check_bypasses(back_end)

    def stop_tracking(self) -> None:
        """Track no more, and put the operator's settings back. Idempotent."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close()
        if trackers:
            with contextlib.suppress(GuestError):  # a QEMU that hangs or is gone has no use of it
                self._put_back()

    # -- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        """Have what waits give up soon."""
        self._ended.set()

    def close(self) -> None:
        """Let the QEMU be; nothing may run in another thread any more."""
        self.end()
        self.stop_tracking()
        with contextlib.suppress(GuestError):  # of a destination that has loaded nothing
            self._put_back()
        for each in self.blocks:
            os.close(each.block.fd)
        for back_end in self._back_ends:
            back_end.close()
        self.blocks, self._back_ends = [], []
        self._qmp.close()
