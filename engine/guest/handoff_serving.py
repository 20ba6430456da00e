"""What an agent and the process that serves pages (`handoff_pages`) say to each other: one byte."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

READY: Final = b"r"  #: pages can be served; said first, to the agent
YOURS: Final = b"y"  #: the guest is the VMM's; serve when you are told, or when nobody can tell you
SERVE: Final = b"s"


def is_wanted(orders: socket.socket) -> bool:
    """Say `READY`, and wait until pages shall be served: for `SERVE`, or, behind `YOURS`, also for
    the end of whoever could have said so."""
    said = b""
    with contextlib.suppress(ConnectionError):  # it may have ended, and have said so before
        orders.send(READY)
    with contextlib.suppress(ConnectionError):
        said = orders.recv(1)
        if said == YOURS:
            orders.recv(1)
    return said in (YOURS, SERVE)
