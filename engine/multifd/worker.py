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
LOOPBACK: Final = ("tcp://127.", "tcp://[::1]:", "tcp://localhost:")
#: On loopback nothing is on its way for long: a larger send buffer only leaves the caches (5 % less
#: CPU than with the kernel's own tuning, up to 4 MiB). Over a network the kernel tunes it.
SEND_BUFFER_BYTES: Final = 512 * 1024
#: What one system call moves at most, twice this, delays who is woken on the same CPU: a guest that
#: waits for a page waits 0.44 ms instead of 0.70 (p99, 7 and 13 runs, two CPUs). Precopy gets 6 %
#: slower.
POSTCOPY_BUFFER_BYTES: Final = 64 * 1024


def set_channel_options(
    socket_: zmq.Socket[bytes], endpoint: str, *, may_postcopy: bool = False
) -> None:
    """Bound every queue and notice a dead peer; never re-make a connection silently."""
    if endpoint.startswith(LOOPBACK):
        socket_.setsockopt(zmq.SNDBUF, POSTCOPY_BUFFER_BYTES if may_postcopy else SEND_BUFFER_BYTES)
        if may_postcopy:
            socket_.setsockopt(zmq.RCVBUF, POSTCOPY_BUFFER_BYTES)
    socket_.setsockopt(zmq.SNDHWM, QUEUE_PACKETS_MAX)
    socket_.setsockopt(zmq.RCVHWM, QUEUE_PACKETS_MAX)
    socket_.setsockopt(zmq.LINGER, 0)
    socket_.setsockopt(zmq.RECONNECT_IVL, -1)
    socket_.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket_.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket_.setsockopt(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)
    socket_.setsockopt(zmq.MAXMSGSIZE, max(wire.PAYLOAD_BYTES_MAX, wire.HEADER_BYTES_MAX))
    socket_.setsockopt(zmq.IPV6, True)
