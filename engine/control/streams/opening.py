"""From an address to an open stream: descriptors of clients, programs, files and vsock sockets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from engine.control.fdsets import FdSets
from engine.control.framestream import notice_death
from engine.control.streams.child import Child
from engine.control.uri import (
    ExecAddress,
    FdAddress,
    FileAddress,
    StreamAddress,
    VsockAddress,
)
from engine.errors import UsageError, shown

log = logging.getLogger("ramferry.stream")

PIPE_BYTES: Final = 1024 * 1024  #: what an unprivileged process may have (pipe-max-size)
FILE_MODE: Final = 0o600
_FDSET: Final = re.compile(r"/dev/fdset/([0-9]{1,10})")
ONE_WAY: Final = (
    "Unable to read from {0}: the capability return-path needs a descriptor that goes both ways"
)


def no_names(name: str) -> int:
    """Nobody has named a descriptor.

    :raise UsageError: QEMU's text."""
    raise UsageError(f"File descriptor named '{shown(name)}' has not been found")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where descriptors come from.

    :ivar named: takes a client's descriptor by its name, which is then the caller's.
    :ivar inherited: numbers of those that the process was started with, and that nobody took."""

    named: Callable[[str], int] = no_names
    fdsets: FdSets = field(default_factory=FdSets)
    inherited: set[int] = field(default_factory=set)


class Stream:
    """One open stream; owns its descriptors and, for `exec:`, the program.

    :ivar fd: where the stream itself goes out or comes in; non-blocking.
    :ivar answer_fd: where answers go the other way, or -1.
    :ivar start: of a regular file: where the stream begins in it; else None.
    :ivar may_be_cut: nothing of anybody else's is in the file behind `start`.
    :ivar is_fifo: it is a pipe, with or without a name.
    """

    def __init__(self, fd: int, answer_fd: int = -1, child: Child | None = None) -> None:
        """Take all of it over, unless this raises.

        :raise OSError: the descriptor is not open."""
        self.fd, self.answer_fd, self.child = fd, answer_fd, child
        self.start: int | None = None
        self.may_be_cut = False
        self._was_blocking: list[int] = []
        found = os.fstat(fd)
        self.is_socket, self.is_fifo = stat.S_ISSOCK(found.st_mode), stat.S_ISFIFO(found.st_mode)
        if stat.S_ISREG(found.st_mode):
            appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
            self.start = found.st_size if appends else os.lseek(fd, 0, os.SEEK_CUR)
            self.may_be_cut = found.st_size <= self.start
        if self.is_socket:
            with socket.socket(fileno=os.dup(fd)) as ours, contextlib.suppress(OSError):
                notice_death(ours)
        if self.is_fifo:
            with contextlib.suppress(OSError):  # this user has many large ones already
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        for one in {fd, answer_fd} - {-1}:
            if os.get_blocking(one):
                self._was_blocking.append(one)
                os.set_blocking(one, False)

    @contextlib.contextmanager
    def reopened_for_reading(self) -> Iterator[int]:
        """The other end of the pipe, for what nobody reads; whoever holds it does not see that the
        last reader has gone, so only when everything was written."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def say_end(self) -> None:
        """Nothing more comes from us, also where others hold the same socket. Idempotent."""
        if self.is_socket and self.fd >= 0:
            with socket.socket(fileno=os.dup(self.fd)) as ours, contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End both ways, also where others hold the same socket."""
        if self.is_socket and self.fd >= 0:
            with socket.socket(fileno=os.dup(self.fd)) as ours, contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptors back as they were; the program is ended by `child`. Idempotent.

        What others hold of the same open file is theirs, and blocks again if it did."""
        for fd in self._was_blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(fd, True)
        self._was_blocking.clear()
        for fd in {self.fd, self.answer_fd} - {-1}:
            os.close(fd)
        self.fd = self.answer_fd = -1


def read_all(fd: int) -> int:
    """Take everything out that is there; return how many bytes that was."""
    total = 0
    with contextlib.suppress(BlockingIOError):
        while data := os.read(fd, PIPE_BYTES):
            total += len(data)
    return total


# -- the source's end ----------------------------------------------------------------------------


def open_source(address: StreamAddress, sources: Sources, *, answers: bool) -> Stream | None:
    """What a source writes to; None for vsock, which has to be connected first.

    :param answers: the destination must be able to answer.
    :raise MigrationError: QEMU's text where it has one."""
    match address:
        case FdAddress(name):
            return _given(sources.named(name), name, os.O_WRONLY, answers=answers)
        case FileAddress():
            if answers:
                raise UsageError(ONE_WAY.format("file"))
            return _created(address, sources)
        case ExecAddress(args):
            return _spawned(args, answers=answers)
        case VsockAddress():
            return None


def _given(fd: int, name: str, access: int, *, answers: bool) -> Stream:
    """A client's descriptor, if it can do what is needed; it is closed if it cannot."""
    try:
        mode = os.fstat(fd).st_mode
        if (reason := _unfit(fd, mode, access)) is not None:
            raise UsageError(f"file descriptor '{shown(name)}' {reason}")
        if answers and not stat.S_ISSOCK(mode):
            raise UsageError(ONE_WAY.format(f"file descriptor '{shown(name)}'"))
        if stat.S_ISREG(mode):
            log.warning("fd: migration to a file is deprecated. Use file: instead.")
        return Stream(fd, os.dup(fd) if stat.S_ISSOCK(mode) else -1)
    except BaseException:
        os.close(fd)
        raise


def _unfit(fd: int, mode: int, access: int) -> str | None:
    """Why nothing can be streamed through it."""
    if stat.S_ISDIR(mode):
        return "is a directory"
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(fd)) as ours:
            is_stream = ours.type == socket.SOCK_STREAM
            listens = bool(ours.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        return None if is_stream and not listens else "is not a connected stream socket"
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE not in (access, os.O_RDWR):
        return f"is not open for {'writing' if access == os.O_WRONLY else 'reading'}"
    return None


def _created(address: FileAddress, sources: Sources) -> Stream:
    """Bytes before the offset stay, whatever is behind it goes, as in QEMU."""
    path, offset = address.path, address.offset
    fd = _open_file(path, os.O_CREAT | os.O_WRONLY, sources, "create")
    try:
        try:
            if offset > 2**63 - 1:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            os.ftruncate(fd, offset)
            os.lseek(fd, offset, os.SEEK_SET)
        except OSError as exc:
            raise UsageError(
                f"failed to truncate migration file to offset {offset:x}: {exc.strerror}"
            ) from None
        return Stream(fd)
    except BaseException:
        os.close(fd)
        raise


def _open_file(path: str, flags: int, sources: Sources, doing: str) -> int:
    """Without waiting for the other end of a named pipe.

    :raise UsageError: QEMU's text."""
    if match := _FDSET.fullmatch(path):
        return sources.fdsets.duplicate(int(match[1]), flags)
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE)
    except UnicodeEncodeError:
        raise UsageError(f"'{shown(path)}' is no path") from None
    except OSError as exc:
        raise UsageError(f"Could not {doing} '{shown(path)}': {exc.strerror}") from None


def _spawned(args: tuple[str, ...], *, answers: bool) -> Stream:
    """Its stdin is the stream; what it prints is the answers, or nobody's."""
    out_read, out_write = os.pipe()
    answer_read, answer_write = os.pipe() if answers else (-1, subprocess.DEVNULL)
    try:
        child = Child(args, out_read, answer_write)
    except BaseException:
        _close(out_write, answer_read)
        raise
    finally:
        _close(out_read, answer_write)
    return Stream(out_write, answer_read, child)


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


# -- the destination's end -----------------------------------------------------------------------


def open_destination(address: StreamAddress, sources: Sources) -> Stream | None:
    """What a destination reads from; None for vsock, where a source has to be waited for.

    :raise MigrationError: QEMU's text where it has one."""
    match address:
        case FdAddress(name):
            return _given(_by_name_or_number(name, sources), name, os.O_RDONLY, answers=False)
        case FileAddress():
            return _opened(address, sources)
        case ExecAddress(args):
            return _spawned_reader(args)
        case VsockAddress():
            return None


def _by_name_or_number(name: str, sources: Sources) -> int:
    """A number is one that the process was started with; others are its own affair. Nothing is left
    at that number, so that whoever writes there sees us close it."""
    if not (name.isascii() and name.isdigit()):
        return sources.named(name)
    if len(name) > 9 or int(name) not in sources.inherited:
        return no_names(name)
    sources.inherited.discard(int(name))
    fd = os.dup(int(name))
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)
    return fd


def _opened(address: FileAddress, sources: Sources) -> Stream:
    fd = _open_file(address.path, os.O_RDONLY, sources, "open")
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise UsageError(f"Could not open '{shown(address.path)}': {os.strerror(errno.EISDIR)}")
        if address.offset or stat.S_ISREG(os.fstat(fd).st_mode):
            try:
                os.lseek(fd, min(address.offset, 2**63 - 1), os.SEEK_SET)
            except OSError as exc:
                raise UsageError(
                    f"failed to seek to offset {address.offset:x}: {exc.strerror}"
                ) from None
        return Stream(fd)
    except BaseException:
        os.close(fd)
        raise


def _spawned_reader(args: tuple[str, ...]) -> Stream:
    """Its stdout is the stream; what answers there are, it reads."""
    in_read, in_write = os.pipe()
    answer_read, answer_write = os.pipe()
    try:
        child = Child(args, answer_read, in_write)
    except BaseException:
        _close(in_read, answer_write)
        raise
    finally:
        _close(in_write, answer_read)
    return Stream(in_read, answer_write, child)
