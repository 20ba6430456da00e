"""A destination's end of a stream: control reads its begin and its end, a receiver what is between.

It has the shape of `mainchannel.DestinationEnd`, so that a migration comes in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import Final

from engine import wire
from engine.control.framestream import ConnectionLost
from engine.control.mainchannel import HELLO_WAIT_S
from engine.control.streams import vsock
from engine.control.streams.line import ChunkWriter, MessageReader
from engine.control.streams.opening import Sources, Stream, open_destination
from engine.control.uri import StreamAddress, VsockAddress
from engine.control.waiting import until_readable
from engine.errors import PeerRefused, WireError

log = logging.getLogger("ramferry.destination")

STREAM_HELLO_BYTES_MAX: Final = wire.HELLO_BYTES_MAX + 256
LINGER_S: Final = 1.0  #: for our last words to be read before the connection is cut
CHILD_GRACE_S: Final = 5.0


class StreamDestination:
    """Owns the stream, or the listener at which it will come."""

    def __init__(self, address: StreamAddress, sources: Sources) -> None:
        """Open it; nothing is read before `accept`.

        :raise MigrationError: it cannot be had."""
        self._stream = open_destination(address, sources)
        self._listener: socket.socket | None = None
        #: where a source can connect to, if that is how it comes
        self.address: VsockAddress | None = None
        if isinstance(address, VsockAddress):
            self.address, self._listener = address, vsock.listen(address)
        self._writer: ChunkWriter | None = None  #: where the source wants answers
        self._reader: MessageReader | None = None
        self._is_our_turn = asyncio.Event()

    @property
    def serves_others(self) -> bool:
        """After a source that does not fit another may come."""
        return self._listener is not None

    @property
    def fd(self) -> int:
        """The stream, to be lent to the receiver."""
        assert self._stream is not None, "`accept` comes first"
        return self._stream.fd

    # -- begin -----------------------------------------------------------------------------------

    async def accept(self) -> wire.Hello:
        """Wait for the stream's begin; a listener waits for a right one.

        :raise PeerRefused: the source wants answers, and the stream goes one way.
        :raise ConnectionLost: it ended before.
        :raise WireError: it is not a stream of ours."""
        while True:
            if self._listener is not None:
                await self._drop()
                self._stream = await vsock.accept(self._listener)
            try:
                async with asyncio.timeout(None if self._listener is None else HELLO_WAIT_S):
                    return await self._greet()
            except TimeoutError:
                log.warning("refused a source: it says nothing")
            except (ConnectionLost, WireError, PeerRefused) as exc:
                if self._listener is None:
                    raise
                log.warning("refused a source: %s", exc)

    async def _greet(self) -> wire.Hello:
        assert self._stream is not None
        stream = self._stream
        if stream.is_fifo:  # one with a name reads as ended before its first writer has come
            await until_readable(stream.fd)
        reader = MessageReader(stream.fd, wire.StreamHello, STREAM_HELLO_BYTES_MAX)
        begin: wire.StreamHello = await reader.receive()
        self._writer = None
        if begin.answers:
            if stream.answer_fd < 0:
                raise PeerRefused(
                    "the source waits for answers (return-path), and this stream goes one way"
                )
            self._writer = ChunkWriter(stream.answer_fd)
        self._reader = MessageReader(stream.fd, wire.StreamMessage, wire.MAIN_BYTES_MAX)
        return begin.hello

    async def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    # -- the source ------------------------------------------------------------------------------

    def channel_ended(self) -> None:
        """The receiver has read the last packet: what follows is ours."""
        self._is_our_turn.set()

    async def send(self, message: wire.Message) -> None:
        """Answer, if the source listens.

        :raise ConnectionLost: it is gone, or takes nothing."""
        if self._writer is not None:
            await self._writer.send(message)

    async def receive(self) -> wire.StreamMessage:
        """The source's next message, once the receiver is done.

        :raise ConnectionLost: the stream ended.
        :raise WireError: it does not speak our language."""
        await self._is_our_turn.wait()
        assert self._reader is not None, "`accept` comes first"
        message: wire.StreamMessage = await self._reader.receive()
        return message

    async def end(self, *, has_failed: bool) -> None:
        """Give everything back, once no receiver is left. Idempotent.

        :param has_failed: nobody shall go on writing."""
        if self._listener is not None:
            self._listener.close()
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if self._writer is not None and stream.is_socket:
            stream.say_end()
            with contextlib.suppress(TimeoutError, OSError):
                await asyncio.wait_for(_read_away(stream), LINGER_S)
        if has_failed:
            stream.cut()
        stream.close()
        if stream.child is not None:
            if has_failed:
                await stream.child.kill()
            else:
                await stream.child.end(CHILD_GRACE_S)
            status = await stream.child.wait()
            if status and not has_failed:
                log.warning("%s; the whole stream had come", stream.child.describe(status))


async def _read_away(stream: Stream) -> None:
    """Unread bytes would reset the connection, and take our last words away from the peer."""
    scratch = bytearray(65536)
    while True:
        try:
            if not os.readv(stream.fd, [scratch]):
                return
        except BlockingIOError:
            await until_readable(stream.fd)
