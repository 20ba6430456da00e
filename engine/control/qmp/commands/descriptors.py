"""Descriptors that a client sends beside a command: named ones of its own, and fd sets."""

from __future__ import annotations

import os

from engine.control.process import ControlProcess
from engine.control.qmp.monitor import NAME_CHARACTERS_MAX, NAMED_MAX, current_monitor
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.errors import shown


class FdName(Arguments, frozen=True):
    """The name that `getfd` gives, and `closefd` takes."""

    fdname: str


class AddFd(Arguments, frozen=True):
    """Without `fdset-id` into a new set; `opaque` is shown by `query-fdsets`."""

    fdset_id: int | None = None
    opaque: str | None = None


class RemoveFd(Arguments, frozen=True):
    """Without `fd` all of the set."""

    fdset_id: int
    fd: int | None = None


class AddfdInfo(Arguments, frozen=True):
    """The set, and the descriptor's number in this process."""

    fdset_id: int
    fd: int


class FdsetFdInfo(Arguments, frozen=True):
    """One descriptor of a set."""

    fd: int
    opaque: str | None = None


class FdsetInfo(Arguments, frozen=True):
    """One set."""

    fdset_id: int
    fds: list[FdsetFdInfo]


def _received() -> int:
    """The oldest descriptor that this client sent and nobody took; the caller's from now on. Those
    that came with it are closed, as in QEMU (monitor_get_fd takes one of a batch).

    :raise QmpError: there is none."""
    monitor = current_monitor.get()
    if monitor is None or not monitor.received:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")
    fd = monitor.received.popleft()
    monitor.close_received()
    return fd


class Descriptors:
    """Handlers; names belong to the client's monitor, sets to the process."""

    def __init__(self, process: ControlProcess) -> None:
        self._sets = process.fdsets

    async def getfd(self, asked: FdName) -> None:
        fd, monitor = _received(), current_monitor.get()
        assert monitor is not None, "it had a descriptor"
        is_new = asked.fdname not in monitor.named
        try:
            if asked.fdname[:1].isdigit():
                raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
            if len(asked.fdname) > NAME_CHARACTERS_MAX:
                raise QmpError(
                    f"Parameter 'fdname' expects a name of at most {NAME_CHARACTERS_MAX} characters"
                )
            if is_new and len(monitor.named) >= NAMED_MAX:
                raise QmpError(f"this client has {NAMED_MAX} named descriptors; close some first")
        except QmpError:
            os.close(fd)
            raise
        if not is_new:
            os.close(monitor.named[asked.fdname])
        monitor.named[asked.fdname] = fd

    async def closefd(self, asked: FdName) -> None:
        monitor = current_monitor.get()
        fd = None if monitor is None else monitor.named.pop(asked.fdname, None)
        if fd is None:
            raise QmpError(f"File descriptor named '{shown(asked.fdname)}' not found")
        os.close(fd)

    async def add_fd(self, asked: AddFd) -> object:
        fd = _received()
        return {"fdset-id": self._sets.add(fd, asked.fdset_id, asked.opaque), "fd": fd}

    async def remove_fd(self, asked: RemoveFd) -> None:
        self._sets.remove(asked.fdset_id, asked.fd)

    async def query_fdsets(self, _: object) -> object:
        return self._sets.query()


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Descriptors(process)
    registry.add("getfd", commands.getfd, FdName)
    registry.add("closefd", commands.closefd, FdName)
    registry.add("add-fd", commands.add_fd, AddFd, returns=AddfdInfo)
    registry.add("remove-fd", commands.remove_fd, RemoveFd)
    registry.add("query-fdsets", commands.query_fdsets, returns=list[FdsetInfo])
