"""A sender's channel: a ZeroMQ socket that connects once and says when it is lost."""

from __future__ import annotations

from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from engine import wire
from engine.multifd.worker import set_channel_options

LOOPBACK: Final = ("tcp://127.", "tcp://[::1]:", "tcp://localhost:")
#: On loopback nothing is on its way for long: a larger send buffer only leaves the caches (5 % less
#: CPU than with the kernel's own tuning, up to 4 MiB). Over a network the kernel tunes it.
LOOPBACK_SEND_BUFFER_BYTES: Final = 512 * 1024

LOST_EVENTS: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Channel:
    """One incarnation of the channel: a DEALER that connects once and says when it is lost."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], order: wire.OpenChannel) -> None:
        self.incarnation = order.incarnation
        self.sequence = 0
        self.is_open = False
        self.socket = context.socket(zmq.DEALER)
        self.monitor: zmq.Socket[bytes] | None = None
        try:
            set_channel_options(self.socket)
            if order.endpoint.startswith(LOOPBACK):
                self.socket.setsockopt(zmq.SNDBUF, LOOPBACK_SEND_BUFFER_BYTES)
            self.monitor = self.socket.get_monitor_socket(
                LOST_EVENTS | HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            )
            self.monitor.setsockopt(zmq.LINGER, 0)
            self.socket.connect(order.endpoint)
        except zmq.ZMQError:
            self.close()
            raise

    def check(self) -> bool:
        """Follow what happened to the connection; True when it has just opened.

        :raise ConnectionError: it is lost, with everything that was not acknowledged."""
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

    def close(self) -> None:
        """Drop the connection and what is queued. Idempotent."""
        if self.monitor is not None:
            self.socket.disable_monitor()
            self.monitor.close()
            self.monitor = None
        self.socket.close(linger=0)


class Superseded(Exception):
    """While a packet waited, control ordered the channel to be made anew."""
