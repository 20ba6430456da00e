"""A sender's channel: a ZeroMQ socket that connects once, or one end of a stream."""

from __future__ import annotations

import os
import select
from typing import Final, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from engine import wire
from engine.multifd.worker import set_channel_options

LOST_EVENTS: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Channel(Protocol):
    """One incarnation of the channel: it opens once and says when it is lost."""

    incarnation: int
    sequence: int  #: of the newest packet
    is_open: bool

    def watch(self, news: zmq.Poller, room: zmq.Poller) -> None:
        """Let both pollers wake on what happens to the connection, and `room` also when something
        can be sent."""
        ...

    def has_news(self, ready: dict[object, int]) -> bool:
        """Whether what a poller found calls for `check`."""
        ...

    def check(self) -> bool:
        """Follow what happened to the connection; True when it has just opened.

        :raise ConnectionError: it is lost, with everything that was not acknowledged."""
        ...

    def send(self, parts: list[bytes | memoryview]) -> bool:
        """Send one packet without waiting. False: there was no room for all of it, call again with
        the same parts when there is.

        :raise ConnectionError: the connection is lost.
        :raise zmq.ZMQError: ZeroMQ refused."""
        ...

    def close(self) -> None:
        """Drop the connection and what is queued. Idempotent."""
        ...


class SocketChannel:
    """A DEALER that connects once and says when it is lost."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        order: wire.OpenChannel,
        *,
        may_postcopy: bool = False,
    ) -> None:
        self.incarnation = order.incarnation
        self.sequence = 0
        self.is_open = False
        self.socket = context.socket(zmq.DEALER)
        self.monitor: zmq.Socket[bytes] | None = None
        try:
            set_channel_options(self.socket, order.endpoint, may_postcopy=may_postcopy)
            self.monitor = self.socket.get_monitor_socket(
                LOST_EVENTS | HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            )
            self.monitor.setsockopt(zmq.LINGER, 0)
            self.socket.connect(order.endpoint)
        except zmq.ZMQError:
            self.close()
            raise

    def watch(self, news: zmq.Poller, room: zmq.Poller) -> None:
        for poller in (news, room):
            poller.register(self.monitor, zmq.POLLIN)
        room.register(self.socket, zmq.POLLOUT)

    def has_news(self, ready: dict[object, int]) -> bool:
        return self.monitor in ready

    def check(self) -> bool:
        assert self.monitor is not None
        opened = False
        while int(self.monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event = recv_monitor_message(self.monitor)["event"]
            assert isinstance(event, int)
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                opened = self.is_open = True
            elif event & HANDSHAKE_FAILED:
                raise ConnectionError("the peer's ZeroMQ handshake failed")
            elif event & LOST_EVENTS:
                raise ConnectionError("connection lost" if self.is_open else "connection refused")
        return opened

    def send(self, parts: list[bytes | memoryview]) -> bool:
        try:
            self.socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        if self.monitor is not None:
            self.socket.disable_monitor()
            self.monitor.close()
            self.monitor = None
        self.socket.close(linger=0)


class StreamChannel:
    """A descriptor to which packets are written as chunks, in turn with control; owns it."""

    def __init__(self, fd: int, incarnation: int) -> None:
        """Take `fd` over; control has made it non-blocking."""
        self._fd = fd
        self.incarnation = incarnation
        self.sequence = 0
        self.is_open = False
        self._rest: memoryview | None = None  #: of the chunk that is being written
        self._state = select.poll()
        self._state.register(fd, 0)  # errors and hang-ups are always told

    def watch(self, news: zmq.Poller, room: zmq.Poller) -> None:
        news.register(self._fd, zmq.POLLERR)
        room.register(self._fd, zmq.POLLOUT)

    def has_news(self, ready: dict[object, int]) -> bool:
        return bool(ready.get(self._fd, 0) & zmq.POLLERR)

    def check(self) -> bool:
        if self._state.poll(0):
            raise ConnectionError("nobody reads it any more")
        opened, self.is_open = not self.is_open, True
        return opened

    def send(self, parts: list[bytes | memoryview]) -> bool:
        if self._rest is None:
            self._rest = memoryview(wire.chunk(bytes(parts[0]), parts[1:]))
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
        except BlockingIOError:
            return False
        except OSError as exc:
            raise ConnectionError(f"Unable to write: {exc.strerror}") from None
        self._rest = None
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Superseded(Exception):
    """While a packet waited, control ordered the channel to be made anew."""
