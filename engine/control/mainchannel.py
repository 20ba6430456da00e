"""The main channel: one typed conversation between the two control processes, on one connection.

The destination listens and talks to the first peer whose `Hello` is right; others are refused. A
lost connection is never re-made: it ends the conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Generic, TypeVar

from engine import unixsocket, wire
from engine.control.framestream import ConnectionLost, FrameStream
from engine.control.uri import Address
from engine.dialing import dial, listen_tcp
from engine.errors import PeerRefused, WireError

__all__ = ["ConnectionLost", "DestinationEnd", "SourceEnd"]

#: Peers that have not said a right Hello; the oldest gives way, so nobody can keep the source out.
#: They hold at most 16 x (4 + HELLO_BYTES_MAX + 256 KiB of one read) = 5.3 MiB.
STRANGERS_MAX: Final = 16
HELLO_WAIT_S: Final = 10.0
F = TypeVar("F", bound=wire.FirstWord)

BUSY: Final = "this destination is busy with another source"
#: Who comes to a destination that waits for something else.
MISPLACED: Final[Mapping[type[wire.FirstWord], str]] = {
    wire.Hello: "a migration that begins, where a paused postcopy is to be resumed",
    wire.Resume: "a postcopy that is resumed, where none is paused",
}


class SourceEnd:
    """The source's end; owns its connection."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._decoder: wire.Decoder[wire.ToSource] = wire.Decoder(
            wire.ToSource, wire.MAIN_BYTES_MAX, "main channel"
        )
        self._stream: FrameStream | None = None
        self.sent_bytes = 0

    async def connect(self) -> None:
        """Connect, once; `send` and `receive` come after.

        :raise PeerRefused: nobody listens there."""
        try:
            connection = await _connect(self._address)
        except OSError as exc:
            where = self._address.display
            raise PeerRefused(f"Failed to connect to '{where}': {_reason(exc)}") from None
        stream = FrameStream("destination")
        loop = asyncio.get_running_loop()
        make = loop.create_unix_connection if self._address.path else loop.create_connection
        await make(lambda: stream, sock=connection)  # closes the connection if it fails
        self._stream = stream

    async def send(self, message: wire.Message) -> None:
        """Queue a message; waits while the destination is slow.

        :raise ConnectionLost: the connection ended, or the destination takes nothing."""
        data = wire.encode(message)
        self.sent_bytes += len(data)
        await self._need_stream().send(data)

    async def say_last(self, message: wire.Message) -> None:
        """Queue a last message if the peer is still there, else forget it; never waits."""
        if self._stream is not None:
            with contextlib.suppress(ConnectionLost):
                self._stream.say(wire.encode(message))

    async def receive(self) -> wire.ToSource:
        """The destination's next message; cancelling this loses nothing.

        :raise ConnectionLost: the connection failed.
        :raise WireError: the destination does not speak our language."""
        return self._decoder.decode(await self._need_stream().receive(wire.MAIN_BYTES_MAX))

    def close(self) -> None:
        """Idempotent."""
        if self._stream is not None:
            self._stream.close()

    def _need_stream(self) -> FrameStream:
        assert self._stream is not None, "`connect` comes first"
        return self._stream


async def _connect(address: Address) -> socket.socket:
    """:raise OSError: the last of the errors of all the addresses that the name has."""
    loop = asyncio.get_running_loop()
    addresses: list[tuple[int, Any]] = [(socket.AF_UNIX, address.path)]
    if not address.path:
        found = await loop.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM)
        addresses = [(family, where) for family, _, _, _, where in found]
    failure = OSError("the name has no address")
    for family, where in addresses:
        try:
            return await dial(family, where)
        except OSError as exc:
            failure = exc
    raise failure


def _reason(exc: OSError) -> str:
    """The system's word for it: asyncio's own texts repeat the address."""
    if isinstance(exc, socket.gaierror) or not exc.errno:
        return exc.strerror or str(exc)
    return os.strerror(exc.errno)


def _listener(address: Address) -> socket.socket:
    """An empty host means every address."""
    if address.path:
        return unixsocket.bind(address.path)
    if not address.host:
        return listen_tcp(address.port, None)
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    family, _, _, _, where = found[0]
    return listen_tcp(address.port, (family, where))


class DestinationEnd(Generic[F]):
    """The destination's end; owns the listener, its file and every connection."""

    def __init__(self, address: Address, first: type[F]) -> None:
        """Bind; peers are served from the first `accept` on.

        :param first: what a right peer says first.
        :raise OSError: cannot listen there.
        :raise UsageError: something else is at the unix path."""
        self._path = address.path
        try:
            self._socket = _listener(address)
        except OSError as exc:
            raise OSError(exc.errno, _reason(exc)) from exc
        #: where it really listens (names and port 0 resolved)
        self.address = address
        if not address.path:
            host, port = self._socket.getsockname()[:2]
            self.address = replace(address, host=address.host and host, port=port)
        self._socket.listen()
        self._server: asyncio.Server | None = None
        self._decoder: wire.Decoder[wire.ToDestination] = wire.Decoder(
            wire.ToDestination, wire.MAIN_BYTES_MAX, "main channel"
        )
        self._first = first
        self._hello_decoder: wire.Decoder[wire.FirstWord] = wire.Decoder(
            wire.FirstWord, wire.HELLO_BYTES_MAX, "main channel"
        )
        self._strangers: dict[FrameStream, asyncio.Task[None]] = {}  #: oldest first
        self._peer: FrameStream | None = None
        self._hello: F | None = None  #: the peer's, until `accept` returns it
        self._greeted = asyncio.Event()

    # -- strangers -------------------------------------------------------------------------------

    async def accept(self) -> F:
        """Wait for a peer that says a right first word; the peer of an earlier `accept` is given
        up.

        Cancelling this loses nothing: the next call returns what has come."""
        if self._peer is not None and self._hello is None:
            self._peer.close()
            self._peer = None
        await self._serve()
        while self._hello is None:
            self._greeted.clear()
            await self._greeted.wait()
        hello, self._hello = self._hello, None
        return hello

    async def _serve(self) -> None:
        if self._server is None:
            loop = asyncio.get_running_loop()
            make = loop.create_unix_server if self._path else loop.create_server
            self._server = await make(
                lambda: FrameStream("source", self._meet), sock=self._socket, start_serving=False
            )
        await self._server.start_serving()

    def _meet(self, stranger: FrameStream) -> None:
        if len(self._strangers) >= STRANGERS_MAX:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()  # its task sees the end
        task = asyncio.get_running_loop().create_task(self._greet(stranger))
        self._strangers[stranger] = task
        task.add_done_callback(lambda _: self._strangers.pop(stranger, None))

    async def _greet(self, stranger: FrameStream) -> None:
        """Make the stranger our peer if it says a right Hello and we have none, else refuse it."""
        try:
            async with asyncio.timeout(HELLO_WAIT_S):
                data = await stranger.receive(wire.HELLO_BYTES_MAX)
            hello = self._hello_decoder.decode(data)
        except (ConnectionLost, TimeoutError):
            stranger.abort()
            return
        except WireError as exc:
            await self._refuse(stranger, str(exc))
            return
        if not isinstance(hello, self._first):
            await self._refuse(stranger, MISPLACED[type(hello)])
            return
        if self._peer is not None:
            await self._refuse(stranger, BUSY)
            return
        self._peer, self._hello = stranger, hello
        self._greeted.set()

    @staticmethod
    async def _refuse(stranger: FrameStream, reason: str) -> None:
        await stranger.refuse(wire.encode(wire.Refused(wire.cut(reason))))

    # -- the peer --------------------------------------------------------------------------------

    async def send(self, message: wire.Message) -> None:
        """Queue a message; waits while the source is slow.

        :raise ConnectionLost: the source is gone, or takes nothing."""
        await self._need_peer().send(wire.encode(message))

    async def receive(self) -> wire.ToDestination:
        """The source's next message; cancelling this loses nothing.

        :raise ConnectionLost: the source's connection is gone.
        :raise WireError: the source does not speak our language."""
        return self._decoder.decode(await self._need_peer().receive(wire.MAIN_BYTES_MAX))

    async def lost(self) -> None:
        """Wait for the end of the source's connection, while nobody receives.

        :raise ConnectionLost: always."""
        await self._need_peer().lost()

    def _need_peer(self) -> FrameStream:
        if self._peer is None:
            raise ConnectionLost("no source is connected")
        return self._peer

    serves_others = True  #: after a source that does not fit another may come

    async def end(self, *, has_failed: bool) -> None:
        """As `close`; the peer has been told what became of the migration."""
        self.close()

    def stop_listening(self) -> None:
        """Whoever comes from now on finds nobody; the peer stays. Idempotent."""
        if self._socket.fileno() == -1:
            return
        if self._server is not None:
            self._server.close()
        self._socket.close()
        if self._path:
            unixsocket.remove_dead(self._path)
        for stranger in self._strangers:
            stranger.abort()

    def close(self) -> None:
        """Stop listening, remove the file, end every connection. Idempotent."""
        self.stop_listening()
        if self._peer is not None:
            self._peer.close()
