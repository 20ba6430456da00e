"""Where VMMs hand their memory over: a unix socket at which one is served, and others refused."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import Final

from engine import unixsocket
from engine.errors import GuestError, MigrationError, UsageError, WireError, shown
from engine.guest.adoption import say
from engine.guest.datagrams import close_all
from engine.guest.handoff_hello import FDS_A_REGION, HELLO_BYTES_MAX
from engine.guest.handoff_link import encode_line
from engine.guest.rundir import remove_file
from engine.wire import BLOCKS_MAX, cut

HELLO_WAIT_S: Final = 5.0  #: for all of a hello, from a VMM that has connected
BACKLOG: Final = 8
FDS_MAX: Final = FDS_A_REGION * BLOCKS_MAX
#: As of accept(2): no descriptor or memory is to be had now.
NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_ROOM_WAIT_S: Final = 0.2
BUSY: Final = "another VMM is served here"


@dataclass(slots=True)
class Visitor:
    """A VMM that has said hello; owns the connection and the descriptors until both are taken.

    :ivar text: what it has said: a line that begins with `{`, or an array."""

    connection: socket.socket
    pid: int
    text: bytes = b""
    fds: list[int] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """It speaks Firecracker's handshake, which is an array and ends with no line."""
        return self.text[:1] == b"["

    def refuse(self, reason: str) -> None:
        """Say why, as far as it listens, and close all that was not taken."""
        with contextlib.suppress(OSError):
            self.connection.send(encode_line({"error": cut(reason)}), socket.MSG_DONTWAIT)
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self.connection.close()
        close_all(self.fds)
        self.fds = []


class Door:
    """A listener for this user's processes; owns it, its file, and those who wait behind it."""

    def __init__(self, path: str) -> None:
        """:raise UsageError: nobody can listen there."""
        try:
            self._listener = unixsocket.bind(path)
            self._listener.listen(BACKLOG)
        except OSError as exc:
            raise UsageError(f"'{shown(path)}' cannot be listened at: {exc.strerror}") from exc
        self._path = path
        self._refusing: asyncio.Task[None] | None = None

    async def next(self) -> Visitor:
        """The next one that says hello in time, the caller's; others are told why not."""
        while True:
            connection = await self._accept()
            visitor = Visitor(connection, 0)
            try:
                visitor.pid = _peer_of(connection)
                async with asyncio.timeout(HELLO_WAIT_S):
                    await _hear(visitor)
            except TimeoutError:
                self.refuse(visitor, f"no hello within {HELLO_WAIT_S:g} s")
            except (MigrationError, OSError) as exc:
                self.refuse(visitor, str(exc))
            except BaseException:
                visitor.close()
                raise
            else:
                return visitor

    def refuse(self, visitor: Visitor, reason: str) -> None:
        """Tell it, and people."""
        say(f"handoff[{os.getpid()}]: process {visitor.pid} was refused: {reason}")
        visitor.refuse(reason)

    def refuse_others(self) -> None:
        """From now on everybody is told that there is one already."""
        self._refusing = asyncio.get_running_loop().create_task(self._refuse_all())

    async def _refuse_all(self) -> None:
        while True:
            Visitor(await self._accept(), 0).refuse(BUSY)

    async def _accept(self) -> socket.socket:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            except ConnectionError:
                continue
            except OSError as exc:
                if exc.errno not in NO_ROOM:
                    raise
                await asyncio.sleep(NO_ROOM_WAIT_S)  # it waits until others close theirs
                continue
            return connection

    async def close(self) -> None:
        """Idempotent."""
        if self._refusing is not None:
            self._refusing.cancel()
            await asyncio.gather(self._refusing, return_exceptions=True)
        if self._listener.fileno() >= 0:
            remove_file(self._path)
            self._listener.close()


def _peer_of(connection: socket.socket) -> int:
    """:raise GuestError: it is somebody else's process, or cannot be seen from here."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, user, _ = struct.unpack("3i", credentials)
    if os.getuid() not in (0, user) and user != 0:
        raise GuestError(f"it belongs to user {user}; only user {os.getuid()} and root may come")
    if pid <= 0:
        raise GuestError("it is in a pid namespace that cannot be seen from here")
    return int(pid)


async def _hear(visitor: Visitor) -> None:
    """Until the hello has ended.

    :raise WireError: too long, too many descriptors, or it hung up before."""
    loop = asyncio.get_running_loop()
    visitor.connection.setblocking(False)
    while not _is_whole(visitor.text):
        readable = asyncio.Event()
        loop.add_reader(visitor.connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(visitor.connection)
        _receive(visitor)


def _receive(visitor: Visitor) -> None:
    fds = array.array("i")
    try:
        data, ancillary, flags, _ = visitor.connection.recvmsg(
            HELLO_BYTES_MAX, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    visitor.fds += fds
    visitor.text += data
    if flags & socket.MSG_CTRUNC or len(visitor.fds) > FDS_MAX:
        raise WireError(f"more than {FDS_MAX} descriptors, or no room for them")
    if len(visitor.text) > HELLO_BYTES_MAX:
        raise WireError(f"a hello of more than {HELLO_BYTES_MAX} bytes")
    if not data:
        raise WireError("it hung up before its hello was whole")


def _is_whole(text: bytes) -> bool:
    """A line, or an array, which no line ends.

    :raise WireError: it goes on behind its end: nobody speaks before the answer."""
    if text[:1] == b"[":
        return text.rstrip().endswith(b"]")
    end = text.find(b"\n")
    if 0 <= end < len(text) - 1:
        raise WireError("it speaks before its hello was answered")
    return end >= 0
