"""The main channel: one typed conversation between the two control processes, over ZeroMQ.

The source connects a DEALER, the destination binds a ROUTER and talks to the first peer whose
`Hello` is right; others are refused. A lost connection is never re-made silently: it ends the
conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from engine import wire
from engine.errors import ChannelError, MigrationError, WireError

HEARTBEAT_INTERVAL_MS: Final = 1_000
HEARTBEAT_TIMEOUT_MS: Final = 10_000
#: Control messages are a few a round: 1000 x at most 2 MiB is never reached by a peer that answers.
QUEUE_MESSAGES_MAX: Final = 1_000
#: After a disconnect the ROUTER forgets the peer within this time, and sending to it fails.
FORGET_S: Final = 0.05

LOST: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class ConnectionLost(MigrationError):
    """The main channel is gone; the other side may or may not be."""


def _set_options(socket: zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.LINGER, 200)  # the last word (Abort, Failed) gets a moment to leave
    socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES_MAX)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES_MAX)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAIN_BYTES_MAX)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.setsockopt(zmq.IPV6, True)


class _Inbox:
    """What comes on a socket and on its monitor; leaving a wait never drops what has come."""

    def __init__(self, socket: zmq.asyncio.Socket, events: int) -> None:
        self._socket = socket
        self._monitor = socket.get_monitor_socket(events)
        self._message: asyncio.Future[list[bytes]] | None = None
        self._event: asyncio.Future[Any] | None = None

    async def next(self) -> list[bytes] | None:
        """The next message's parts, or None for an event of a connection."""
        self._message = self._message or asyncio.ensure_future(self._socket.recv_multipart())
        self._event = self._event or asyncio.ensure_future(recv_monitor_message(self._monitor))
        await asyncio.wait((self._message, self._event), return_when=asyncio.FIRST_COMPLETED)
        if self._message.done():
            message, self._message = self._message, None
            return message.result()
        self._event = None
        return None

    def close(self) -> None:
        """Close the socket too. Idempotent."""
        if self._socket.closed:
            return
        for waiting in (self._message, self._event):
            if waiting is not None:
                waiting.cancel()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()


class SourceEnd:
    """The source's end; owns its socket."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        """:raise ChannelError: the endpoint cannot be used at all."""
        self._decoder: wire.Decoder[wire.ToSource] = wire.Decoder(
            wire.ToSource, wire.MAIN_BYTES_MAX, "main channel"
        )
        self.sent_bytes = 0
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket)
        self._inbox = _Inbox(self._socket, LOST)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as exc:
            self.close()
            raise ChannelError(0, f"connecting to {endpoint}") from exc

    async def send(self, message: wire.Message) -> None:
        """Queue a message; waits while the peer is not connected (`receive` tells when it is lost).

        :raise ConnectionLost: the socket is unusable."""
        data = wire.encode(message)
        self.sent_bytes += len(data)
        try:
            await self._socket.send(data)
        except zmq.ZMQError as exc:
            raise ConnectionLost("the connection to the destination is lost") from exc

    async def say_last(self, message: wire.Message) -> None:
        """Queue a last message if the peer is still there, else forget it; never waits."""
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send(wire.encode(message), flags=zmq.NOBLOCK)

    async def receive(self) -> wire.ToSource:
        """The destination's next message.

        :raise ConnectionLost: the connection failed or was refused.
        :raise WireError: the destination does not speak our language."""
        parts = await self._inbox.next()
        if parts is None:
            raise ConnectionLost("the connection to the destination is lost")
        if len(parts) != 1:
            raise WireError(f"main channel: message of {len(parts)} parts")
        return self._decoder.decode(parts[0])

    def close(self) -> None:
        """Idempotent."""
        self._inbox.close()


class DestinationEnd:
    """The destination's end; owns its socket. Talks to the first peer with a right `Hello`."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        """:raise OSError: cannot listen there."""
        self._decoder: wire.Decoder[wire.ToDestination] = wire.Decoder(
            wire.ToDestination, wire.MAIN_BYTES_MAX, "main channel"
        )
        self._peer = b""
        self._socket = context.socket(zmq.ROUTER)
        _set_options(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._inbox = _Inbox(self._socket, zmq.EVENT_DISCONNECTED)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as exc:
            self.close()
            raise OSError(exc.errno, exc.strerror) from exc
        last = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes)
        self.endpoint = last.rstrip(b"\0").decode()

    async def accept(self) -> wire.Hello:
        """Wait for a peer that says a right Hello; strangers are dropped."""
        while True:
            came = await self._inbox.next()
            if came is None or len(came) != 2:
                continue
            identity, data = came
            try:
                message = self._decoder.decode(data)
            except WireError as exc:
                await self._refuse(identity, str(exc))
                continue
            if isinstance(message, wire.Hello):
                self._peer = identity
                return message

    async def _refuse(self, identity: bytes, reason: str) -> None:
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart(
                [identity, wire.encode(wire.Refused(wire.cut(reason)))]
            )

    async def send(self, message: wire.Message) -> None:
        """:raise ConnectionLost: the peer is gone."""
        try:
            await self._socket.send_multipart([self._peer, wire.encode(message)])
        except zmq.ZMQError as exc:
            raise ConnectionLost("the connection to the source is lost") from exc

    async def receive(self) -> wire.ToDestination:
        """The source's next message; other peers are refused meanwhile.

        :raise ConnectionLost: the source's connection is gone.
        :raise WireError: the source does not speak our language."""
        while True:
            came = await self._inbox.next()
            if came is None:
                await self._check_peer()
            elif came[0] != self._peer:
                await self._refuse(came[0], "this destination is busy with another source")
            elif len(came) == 2:
                return self._decoder.decode(came[1])

    async def _check_peer(self) -> None:
        """Some connection ended: was it the peer's? A ROUTER refuses to send to who is gone."""
        await asyncio.sleep(FORGET_S)
        await self.send(wire.StillThere())

    def close(self) -> None:
        """Idempotent."""
        self._inbox.close()
