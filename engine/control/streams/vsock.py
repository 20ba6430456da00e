"""AF_VSOCK: one connection between a host and its virtual machines, both ways."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Final

from engine.control.streams.opening import Stream
from engine.control.uri import VsockAddress
from engine.errors import MigrationError, UsageError, shown

_MISSING: Final = (errno.EAFNOSUPPORT, errno.ENODEV)


def _numbers(address: VsockAddress) -> tuple[int, int]:
    """:raise UsageError: QEMU's text."""
    for name, text in (("cid", address.cid), ("port", address.port)):
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**32):
            raise UsageError(f"Failed to parse {name} '{shown(text)}'")
    return int(address.cid), int(address.port)


def _socket() -> socket.socket:
    """:raise MigrationError: this host has no vsock."""
    try:
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as exc:
        raise _failure("Failed to create socket", exc) from None


def _failure(doing: str, exc: OSError) -> MigrationError:
    missing = " (no vsock on this host: is the kernel's vsock transport loaded?)"
    hint = missing if exc.errno in _MISSING else ""
    return MigrationError(f"{doing}: {os.strerror(exc.errno or 0)}{hint}")


def _stream(connection: socket.socket) -> Stream:
    """Takes the connection over."""
    fd = connection.detach()
    return Stream(fd, os.dup(fd))


async def connect(address: VsockAddress) -> Stream:
    """:raise MigrationError: nobody listens there."""
    where = _numbers(address)
    connection = _socket()
    try:
        await asyncio.get_running_loop().sock_connect(connection, where)
    except OSError as exc:
        connection.close()
        raise _failure(f"Failed to connect to '{address.display}'", exc) from None
    except BaseException:
        connection.close()
        raise
    return _stream(connection)


def listen(address: VsockAddress) -> socket.socket:
    """A listener; the caller's.

    :raise MigrationError: it cannot be had."""
    where = _numbers(address)
    listener = _socket()
    try:
        listener.bind(where)
        listener.listen(1)
    except OSError as exc:
        listener.close()
        raise _failure("Failed to bind socket", exc) from None
    return listener


async def accept(listener: socket.socket) -> Stream:
    """Wait for a connection."""
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    return _stream(connection)
