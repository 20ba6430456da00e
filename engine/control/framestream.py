"""Frames on one TCP or unix connection: bounded both ways, and never lost between two waits.

A frame is its length (`wire.FRAME`) and so many bytes. Bytes are taken from the kernel only as far
as somebody wants them: a connection costs at most one frame of the length that its reader allows,
and what is above `READ_AHEAD_BYTES` in one read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

from engine import wire
from engine.errors import MigrationError, WireError

#: Without a reader so much is taken; asyncio reads at most 256 KiB at once, so a connection holds
#: no more than max(READ_AHEAD_BYTES, 4 + the length allowed) + 256 KiB.
READ_AHEAD_BYTES: Final = 16 * 1024
WRITE_BYTES: Final = 64 * 1024  #: above this a send waits; at most this and one frame are buffered
#: 255 channels, for each of which a round's end, a break, a reopening and one more may be said.
SENDS_MAX: Final = 1024
SEND_WAIT_S: Final = 10.0  #: a peer that takes nothing for so long is gone
LINGER_S: Final = 1.0  #: for the last words to leave, and for a refused peer to read why

#: A dead peer is noticed 4 + 3 x 2 = 10 s after its last sign, or when bytes wait 10 s for an
#: acknowledgement.
KEEPALIVE_IDLE_S: Final = 4
KEEPALIVE_INTERVAL_S: Final = 2
KEEPALIVE_PROBES: Final = 3
USER_TIMEOUT_MS: Final = 10_000


class ConnectionLost(MigrationError):
    """The main channel is gone; the other side may or may not be."""


def notice_death(connection: socket.socket) -> None:
    """Have the kernel look after the peer's host; of another end it tells by itself, as it does of
    every end on sockets that are not TCP's."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
        (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class FrameStream(asyncio.Protocol):
    """One connection; owns it. One task may receive, any number may send."""

    def __init__(self, peer: str, on_made: Callable[[FrameStream], None] | None = None) -> None:
        """:param peer: who is at the other end, for messages."""
        self._lost_text = f"the connection to the {peer} is lost"
        self._on_made = on_made
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()  #: what has come and was not received
        self._wanted_bytes = READ_AHEAD_BYTES  #: with so much in the buffer, reading stops
        self._is_lost = False  #: nothing more comes, nothing more can be sent
        self._is_closing = False  #: our side is done: what comes is thrown away
        self._changed = asyncio.Event()  #: something came, or the end
        self._ended = asyncio.Event()  #: as `_is_lost`
        self._writable = asyncio.Event()  #: the write buffer has room, or the connection is lost
        self._turn = asyncio.Lock()
        self._sends = 0  #: never above SENDS_MAX
        self._lingering: asyncio.TimerHandle | None = None

    # -- what asyncio calls ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_BYTES)
        with contextlib.suppress(OSError):  # gone already: the next read tells
            notice_death(transport.get_extra_info("socket"))
        self._writable.set()
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        self._buffer += data
        if len(self._buffer) >= self._wanted_bytes:
            self._need_transport().pause_reading()
        self._changed.set()

    def eof_received(self) -> None:
        """Who has ended does not listen either: asyncio closes when this returns None."""
        self._lose()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._lose()
        if self._lingering is not None:
            self._lingering.cancel()

    def _lose(self) -> None:
        self._is_lost = True
        self._ended.set()
        self._changed.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- receiving -------------------------------------------------------------------------------

    async def receive(self, bytes_max: int) -> bytes:
        """The next frame. Cancelling this loses nothing: the next call goes on where it was.

        :raise ConnectionLost: it ended, and every whole frame was received.
        :raise WireError: a frame of a forbidden length; this connection is worth nothing more."""
        while (frame := self._take_frame(bytes_max)) is None:
            if self._is_lost:
                raise ConnectionLost(self._lost_text)
            self._changed.clear()
            self._need_transport().resume_reading()
            await self._changed.wait()
        return frame

    def _take_frame(self, bytes_max: int) -> bytes | None:
        """The whole frame at the buffer's head; without one, say how much is wanted."""
        head = wire.FRAME.size
        if len(self._buffer) < head:
            return None
        (size,) = wire.FRAME.unpack_from(self._buffer)
        if not 0 < size <= bytes_max:
            raise WireError(f"main channel: frame of {size} bytes, 1 to {bytes_max} are allowed")
        self._wanted_bytes = max(READ_AHEAD_BYTES, head + size)
        if len(self._buffer) < head + size:
            return None
        frame = bytes(memoryview(self._buffer)[head : head + size])
        del self._buffer[: head + size]
        self._wanted_bytes = READ_AHEAD_BYTES
        return frame

    async def lost(self) -> None:
        """Wait for the end of the connection, while nobody receives.

        :raise ConnectionLost: always."""
        self._need_transport().resume_reading()
        await self._ended.wait()
        raise ConnectionLost(self._lost_text)

    # -- sending ---------------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """Queue one frame, in turn; waits while the peer is slow.

        :raise ConnectionLost: it ended, or the peer does not take what is sent."""
        if self._sends >= SENDS_MAX:
            self.abort()
            raise ConnectionLost(f"{self._lost_text}: {SENDS_MAX} messages wait to be read there")
        self._sends += 1
        try:
            async with self._turn:
                await self._until_writable()
                self.say(data)
        finally:
            self._sends -= 1

    async def _until_writable(self) -> None:
        try:
            async with asyncio.timeout(SEND_WAIT_S):
                await self._writable.wait()
        except TimeoutError as exc:
            self.abort()
            raise ConnectionLost(f"{self._lost_text}: nothing is read there") from exc

    def say(self, data: bytes) -> None:
        """Queue one frame now, however full the buffer is: for short last words.

        :raise ConnectionLost: it ended."""
        if self._is_lost or self._is_closing:
            raise ConnectionLost(self._lost_text)
        self._need_transport().write(wire.FRAME.pack(len(data)) + data)

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Let what was queued leave; end when the peer does, or after `LINGER_S`. Idempotent.

        Until then what comes is read and thrown away: ending with unread bytes would reset the
        connection, and take our last words away from the peer."""
        if self._is_lost or self._is_closing:
            return
        self._is_closing = True
        self._buffer.clear()
        transport = self._need_transport()
        try:
            transport.write_eof()
        except OSError:
            transport.abort()
            return
        transport.resume_reading()
        self._lingering = asyncio.get_running_loop().call_later(LINGER_S, transport.abort)

    async def refuse(self, data: bytes) -> None:
        """Say a last frame and end; returns when the connection has ended."""
        with contextlib.suppress(ConnectionLost):
            self.say(data)
        self.close()
        while not self._is_lost:
            self._changed.clear()
            await self._changed.wait()

    def abort(self) -> None:
        """End at once. Idempotent."""
        self._is_closing = True
        self._buffer.clear()
        self._need_transport().abort()

    def _need_transport(self) -> asyncio.Transport:
        assert self._transport is not None, "asyncio connects before it hands the protocol out"
        return self._transport
