"""One message in one datagram between a control process and its guest's agent, with descriptors."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Final

from engine.errors import WireError
from engine.wire import Message, encode

DATAGRAM_BYTES_MAX: Final = 64 * 1024
FDS_MAX: Final = 253  #: Linux: SCM_MAX_FD


def send(connection: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one datagram; the descriptors stay the caller's.

    :raise OSError: the peer is gone, or does not read (the buffer holds hundreds)."""
    socket.send_fds(connection, [encode(message)], list(fds))


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one datagram; the descriptors are the caller's. No bytes: the peer is gone.

    :raise WireError: it was cut; its descriptors are closed.
    :raise BlockingIOError: there is none."""
    fds = array.array("i")
    data, ancillary, flags, _ = connection.recvmsg(
        DATAGRAM_BYTES_MAX, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise WireError("guest agent: a message was cut, or came with too many descriptors")
    return data, list(fds)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wanted."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
