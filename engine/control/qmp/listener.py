"""Where clients connect: sockets that listen, and the file of a unix one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from engine import unixsocket
from engine.control.uri import Address
from engine.errors import UsageError

log = logging.getLogger("ramferry.qmp")

BACKLOG: Final = 64
PAUSE_S: Final = 1.0  #: nothing is accepted for so long when descriptors or memory have run out
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """Sockets of one address; owns them, and the file of a unix one."""

    def __init__(self, address: Address, sockets: list[socket.socket]) -> None:
        self._address, self._sockets = address, sockets
        self._take: Callable[[socket.socket], None] = _turn_away

    @classmethod
    async def open(cls, address: Address) -> Listener:
        """Listen at `address` (unix sockets get mode 0600); nobody is accepted yet.

        :raise UsageError: something else listens there, or it cannot be used."""
        try:
            if address.path:
                sockets = [unixsocket.bind(address.path)]
            else:
                sockets = await _bind_tcp(address)
            listener = cls(address, sockets)
            try:
                for one in sockets:
                    one.listen(BACKLOG)
            except OSError:
                listener.close()
                raise
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise UsageError(f"a monitor cannot listen at '{address.display}': {reason}") from exc
        if not address.path and not address.port:
            for one in sockets:
                port = one.getsockname()[1]
                log.info("a monitor listens at tcp:%s", replace(address, port=port).display)
        return listener

    def start(self, take: Callable[[socket.socket], None]) -> None:
        """Accept; `take` owns what it gets."""
        self._take = take
        for one in self._sockets:
            asyncio.get_running_loop().add_reader(one, self._accept, one)

    def _accept(self, listening: socket.socket) -> None:
        """One client; the loop calls again while others wait."""
        try:
            connected, _ = listening.accept()
        except OSError as exc:
            if exc.errno in _SHORTAGES:
                log.error("a monitor cannot accept a client: %s", exc.strerror)
                self._pause(listening)
            return  # else that client was gone before it was accepted
        self._take(connected)

    def _pause(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        loop.call_later(PAUSE_S, self._go_on, listening)

    def _go_on(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def close(self) -> None:
        """Idempotent; what was taken stays open."""
        for one in self._sockets:
            asyncio.get_running_loop().remove_reader(one)
            one.close()
        if self._address.path and self._sockets:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address.path)
        self._sockets = []


class Listeners:
    """All of one server; owns them."""

    def __init__(self, take: Callable[[socket.socket], None]) -> None:
        """`take` owns every connection that it gets."""
        self._take = take
        self._listeners: list[Listener] = []

    async def open(self, address: Address) -> None:
        """Accept clients at `address` (unix sockets get mode 0600).

        :raise UsageError: something else listens there, or it cannot be used."""
        listener = await Listener.open(address)
        self._listeners.append(listener)
        listener.start(self._take)

    def close(self) -> None:
        """Accept nobody any more. Idempotent."""
        for listener in self._listeners:
            listener.close()
        self._listeners = []


def _turn_away(connected: socket.socket) -> None:
    connected.close()


async def _bind_tcp(address: Address) -> list[socket.socket]:
    """A socket for every address that the host's name has.

    :raise OSError: one of them cannot be bound; none is then."""
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    with contextlib.ExitStack() as stack:
        sockets = []
        for family, type_, protocol, where in dict.fromkeys(
            (family, type_, protocol, where) for family, type_, protocol, _, where in found
        ):
            one = stack.enter_context(socket.socket(family, type_, protocol))
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(where)
            sockets.append(one)
        stack.pop_all()
        return sockets
