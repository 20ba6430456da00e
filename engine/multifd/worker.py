"""The ZeroMQ options that sender and receiver share."""

from __future__ import annotations

from typing import Final

import zmq

from engine import wire

#: Packets unsent or unread, each way: 2 x 2 MiB = 4 MiB a channel and side. One being used, one
#: ready: more only leaves the caches (4: 7 % more time and CPU on the peer benchmark).
QUEUE_PACKETS_MAX: Final = 2
HEARTBEAT_INTERVAL_MS: Final = 1_000
HEARTBEAT_TIMEOUT_MS: Final = 10_000


def set_channel_options(socket_: zmq.Socket[bytes]) -> None:
    """Bound every queue and notice a dead peer; never re-make a connection silently."""
    socket_.setsockopt(zmq.SNDHWM, QUEUE_PACKETS_MAX)
    socket_.setsockopt(zmq.RCVHWM, QUEUE_PACKETS_MAX)
    socket_.setsockopt(zmq.LINGER, 0)
    socket_.setsockopt(zmq.RECONNECT_IVL, -1)
    socket_.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket_.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket_.setsockopt(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)
    socket_.setsockopt(zmq.MAXMSGSIZE, max(wire.PAYLOAD_BYTES_MAX, wire.HEADER_BYTES_MAX))
    socket_.setsockopt(zmq.IPV6, True)
