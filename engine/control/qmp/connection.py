"""One client's socket: bytes and descriptors in, bytes out, and whether the client is there.

Streams of asyncio drop what comes beside the bytes, so the socket is read here.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from engine.control.qmp.monitor import RECEIVED_MAX

log = logging.getLogger("ramferry.qmp")

#: QEMU reads as much at once. So many opening brackets keep the event loop for 8 ms; the end of the
#: longest string of escapes (VALUE_BYTES_MAX), the worst of all, for about 70 ms.
READ_BYTES: Final = 4096
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(RECEIVED_MAX * array.array("i").itemsize)
#: The client has shut down its side of the connection, or closed it.
_INPUT_ENDED: Final = select.EPOLLRDHUP

Requests = TypeVar("Requests")


class Connection:
    """Owns the socket, and descriptors until they are taken. Whatever fails is a ConnectionError.

    :ivar descriptors: came with what `receive` has returned; whoever takes one owns it."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.setblocking(False)
        self.descriptors: deque[int] = deque()  #: of one read: RECEIVED_MAX at most
        self._unsent = b""  #: of one answer
        self._takes_descriptors = connected.family == socket.AF_UNIX
        if not self._takes_descriptors:
            with contextlib.suppress(OSError):  # it may be gone already
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def receive(self, look: Callable[[bytes], Requests | None]) -> Requests | None:
        """Read until `look` makes something of it; None if the client will say no more.

        It is called where the bytes are read, READ_BYTES at most, and answers None if it wants to
        see more: so what needs no waiting needs no task either. Others have their turn before each
        read, so that a client that never pauses does not keep the event loop.

        :raise ConnectionError: the client is gone."""
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[Requests | None] = loop.create_future()

        def read() -> None:
            if seen.done():
                return
            try:
                data = self._receive_now()
                requests = look(data) if data else None
                if requests is not None or not data:
                    seen.set_result(requests)
            except (BlockingIOError, InterruptedError):
                return
            except Exception as exc:  # noqa: BLE001, whoever awaits it gets it
                seen.set_exception(exc)

        fd = self._socket.fileno()
        loop.add_reader(fd, read)
        try:
            return await seen
        except ConnectionError:
            raise
        except OSError as exc:
            raise ConnectionResetError("a monitor's client is gone") from exc
        finally:
            loop.remove_reader(fd)

    def _receive_now(self) -> bytes:
        if not self._takes_descriptors:
            return self._socket.recv(READ_BYTES)
        data, ancillary, flags, _ = self._socket.recvmsg(
            READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) // numbers.itemsize * numbers.itemsize])
                self.descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC:  # the kernel has closed the rest
            log.warning("a monitor's client sent more than %d descriptors at once", RECEIVED_MAX)
        return data

    async def send(self, data: bytes) -> None:
        """Give it all to the kernel, after what `send_now` has left; wait as long as the client
        does not read. One at a time.

        :raise ConnectionError: the client is gone; some of it may have been sent."""
        data, self._unsent = self._unsent + data, b""
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, data)
        except OSError as exc:
            raise ConnectionResetError("a monitor's client is gone") from exc

    @property
    def is_unsent(self) -> bool:
        """Some of what was given is not sent yet."""
        return bool(self._unsent)

    def send_now(self, data: bytes) -> bool:
        """Give the kernel what it takes; False: the next `send` sends the rest first. Nothing else
        may be unsent.

        :raise ConnectionError: the client is gone."""
        assert not self._unsent, "it would overtake"
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as exc:
            raise ConnectionResetError("a monitor's client is gone") from exc
        self._unsent = data[sent:]
        return not self._unsent

    async def input_ended(self) -> None:
        """Wait until the client says no more, though what it said was not read yet."""
        await self._condition(_INPUT_ENDED)

    async def gone(self) -> None:
        """Wait until the client neither says nor hears anything any more."""
        await self._condition(0)

    async def _condition(self, mask: int) -> None:
        with select.epoll() as poll:  # it tells of a hang-up in any case
            poll.register(self._socket, mask)
            await _readable(poll.fileno())

    def close(self) -> None:
        """What the client has not read yet stays readable for it. Idempotent."""
        self._socket.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, tell)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
