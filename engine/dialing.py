"""TCP and unix sockets, one address at a time: what the main channel and the handover share."""

from __future__ import annotations

import asyncio
import socket
from typing import Any


async def dial(family: int, where: Any) -> socket.socket:
    """A connected, non-blocking stream socket; the caller's.

    :raise OSError: as connect(2); nothing is left open, also when this is cancelled."""
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(connection, where)
    except BaseException:
        connection.close()
        raise
    return connection


def listen_tcp(port: int, only: tuple[int, Any] | None) -> socket.socket:
    """One listener, so that one port says it all: at `only` this family and address, or at every
    address of this host.

    :raise OSError: the address or the port cannot be had."""
    if only is not None:
        family, where = only
        return socket.create_server(where[:2], family=socket.AddressFamily(family))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
