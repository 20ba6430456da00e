"""The fault channel's connection: who listens, who is let in, and its first two frames.

A plain TCP or unix connection, because a request and its answer are what a vCPU waits for: see
docs/decisions/0006-fault-channel.md. What comes after the first frames is native code's.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from dataclasses import dataclass
from typing import Any, Final, cast

from engine import unixsocket, wire
from engine.errors import MemoryRefused, UsageError, WireError

CONNECT_WAIT_S: Final = 5.0  #: for the connection and OPENED, together
STRANGERS_MAX: Final = 16  #: connections without OPEN; the oldest gives way
OPEN_WAIT_S: Final = 10.0
#: A dead peer is noticed 4 + 3 x 2 = 10 s after its last sign, or when bytes wait 10 s for an
#: acknowledgement.
KEEPALIVE: Final = (
    (socket.TCP_KEEPIDLE, 4), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 10_000),
)  # fmt: skip
PRIORITY: Final = (
    6  #: the highest any user may have: ahead of the background in a queue of the host
)
LOW_DELAY: Final = 0x10  #: IP_TOS, for queues on the way


def _set_options(connection: socket.socket) -> None:
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    with contextlib.suppress(OSError):  # a wish
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, LOW_DELAY)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, PRIORITY)


def _split(endpoint: str) -> str | tuple[str, int]:
    """(host, port) or a path; `*` is any host or a free port.

    :raise UsageError: neither."""
    kind, _, where = endpoint.partition("://")
    if kind == "ipc" and where:
        return where
    host, _, port = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if kind == "tcp" and host and (port == "*" or (port.isdecimal() and int(port) < 2**16)):
        return "" if host == "*" else host, 0 if port == "*" else int(port)
    raise UsageError(f"'{endpoint}' is not tcp://HOST:PORT or ipc://PATH")


def connect(endpoint: str, session: bytes, incarnation: int) -> socket.socket:
    """The page service's end: connect, say OPEN, wait for OPENED; not blocking when returned.

    :raise ConnectionError: refused, lost, too slow, or not a fault service of this session."""
    target = _split(endpoint)
    family, where = int(socket.AF_UNIX), cast(Any, target)
    try:
        if isinstance(target, tuple):
            family, *_, where = socket.getaddrinfo(*target, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise ConnectionError(f"cannot connect to {endpoint}: {exc.strerror}") from exc
    try:
        until_ns = time.monotonic_ns() + int(CONNECT_WAIT_S * 1e9)
        connection.settimeout(CONNECT_WAIT_S)
        connection.connect(where)
        _set_options(connection)
        connection.sendall(wire.FaultFrame(wire.FaultKind.OPEN, session, 1, incarnation).encode())
        answer = wire.decode_fault_frame(_read_frame(connection, until_ns))
        if (answer.kind, answer.session, answer.sequence, answer.request) != (
            wire.FaultKind.OPENED, session, 1, incarnation,
        ):  # fmt: skip
            raise ConnectionError(f"{endpoint} answered {answer.kind.name}, not OPENED")
    except (OSError, WireError) as exc:
        connection.close()
        if isinstance(exc, ConnectionError) and exc.strerror is None:
            raise
        text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise ConnectionError(f"cannot connect to {endpoint}: {text}") from exc
    connection.setblocking(False)
    return connection


def _read_frame(connection: socket.socket, until_ns: int) -> bytes:
    """Exactly one frame, for the next byte is native code's."""
    data = b""
    while len(data) < wire.FAULT_FRAME.size:
        left_ns = until_ns - time.monotonic_ns()
        if left_ns <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left_ns / 1e9)
        part = connection.recv(wire.FAULT_FRAME.size - len(data))
        if not part:
            raise ConnectionError("the fault service hung up")
        data += part
    return data


@dataclass(slots=True)
class _Stranger:
    """A connection that has not said who it is."""

    connection: socket.socket
    until_ns: int
    said: bytes = b""


class Lobby:
    """The fault service's listener, and those who have not said OPEN yet. Owns them all.

    They are registered with `poller`; whoever polls calls `attend` for a descriptor that is ready
    and ours, and `expire` now and then."""

    def __init__(self, bind: str, session: bytes, poller: select.epoll) -> None:
        """:raise MemoryRefused: it cannot listen there."""
        self._session, self._poller = session, poller
        self._strangers: dict[int, _Stranger] = {}
        self._path = ""
        try:
            where = _split(bind)
            if isinstance(where, str):
                self._listener = unixsocket.bind(where)
                self._path = where
                self._listener.listen()
            else:
                family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
                self._listener = socket.create_server(where, family=family)
        except (OSError, UsageError) as exc:
            text = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise MemoryRefused(f"cannot listen on {bind}: {text}") from exc
        self._listener.setblocking(False)
        poller.register(self._listener, select.EPOLLIN)

    @property
    def endpoint(self) -> str:
        """Where it listens, as a page service may connect to it."""
        if self._path:
            return f"ipc://{self._path}"
        host, port = self._listener.getsockname()[:2]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def attend(self, fd: int) -> tuple[socket.socket, int] | None:
        """Look after `fd`. Once somebody of our session has said OPEN: the connection, now the
        caller's, and the incarnation. Whoever says anything else is dropped."""
        if fd == self._listener.fileno():
            self._accept()
            return None
        stranger = self._strangers.get(fd)
        if stranger is None:
            return None
        try:
            part = stranger.connection.recv(wire.FAULT_FRAME.size - len(stranger.said))
            stranger.said += part
            if not part:
                raise ConnectionError
            if len(stranger.said) < wire.FAULT_FRAME.size:
                return None
            frame = wire.decode_fault_frame(stranger.said)
            if (frame.kind, frame.session, frame.sequence) != (
                wire.FaultKind.OPEN, self._session, 1,
            ):  # fmt: skip
                raise WireError("not an OPEN of this session")
        except BlockingIOError:
            return None
        except (OSError, WireError):
            self._drop(fd)
            return None
        self._poller.unregister(fd)
        return self._strangers.pop(fd).connection, frame.request

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            _set_options(connection)
        except OSError:  # gone again, or no descriptors left: it may knock again
            return
        if len(self._strangers) == STRANGERS_MAX:
            self._drop(next(iter(self._strangers)))
        until_ns = time.monotonic_ns() + int(OPEN_WAIT_S * 1e9)
        self._strangers[connection.fileno()] = _Stranger(connection, until_ns)
        self._poller.register(connection, select.EPOLLIN)

    def expire(self) -> None:
        """Drop those who took too long."""
        now_ns = time.monotonic_ns()
        for fd in [fd for fd, s in self._strangers.items() if s.until_ns <= now_ns]:
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        self._poller.unregister(fd)
        self._strangers.pop(fd).connection.close()

    def close(self) -> None:
        """Listen no more; a connection that was handed out goes on."""
        for fd in list(self._strangers):
            self._drop(fd)
        self._poller.unregister(self._listener)
        self._listener.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
