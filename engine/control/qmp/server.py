"""The QMP server: listeners, a session for each client, events to all of them.

No client can block the engine: what is read, what waits to be executed and what waits to be written
is bounded for each. A client that does not read loses events, and the loss is counted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from typing import Any, Final

from engine.control.qmp.connection import Connection
from engine.control.qmp.events import EVENTS_MAX, make_event
from engine.control.qmp.listener import Listeners
from engine.control.qmp.messages import VERSION
from engine.control.qmp.registry import CommandRegistry
from engine.control.qmp.session import REQUESTS_MAX, Session
from engine.control.qmp.works import Works
from engine.control.uri import Address

__all__ = ["CLIENTS_MAX", "EVENTS_MAX", "REQUESTS_MAX", "VERSION", "QmpServer"]

log = logging.getLogger("ramferry.qmp")

CLIENTS_MAX: Final = 64


class QmpServer:
    """Listeners and sessions; owns both."""

    def __init__(self, registry: CommandRegistry) -> None:
        self._registry = registry
        self._listeners = Listeners(self._accept)
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._works = Works()
        self._is_closing = False

    async def listen(self, address: Address) -> None:
        """Accept clients at `address` (unix sockets get mode 0600).

        :raise UsageError: something else listens there, or it cannot be used."""
        await self._listeners.open(address)

    def _accept(self, connected: socket.socket) -> None:
        if self._is_closing or len(self._sessions) >= CLIENTS_MAX:
            log.warning("a monitor's client is turned away: %d are served", len(self._sessions))
            connected.close()
            return
        session = Session(self._registry, Connection(connected), self._works)
        task = asyncio.ensure_future(self._serve(session))
        self._sessions[session] = task

    async def _serve(self, session: Session) -> None:
        try:
            await session.run()
        except Exception:
            log.exception("internal error in a QMP session; it is closed")
        finally:
            del self._sessions[session]

    def emit(self, event: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to every client that has negotiated; never blocks."""
        if self._sessions:
            made = make_event(event, data)
            for session in self._sessions:
                session.notify(made)

    async def close(self) -> None:
        """Let clients have what waits for them, then end everything. Idempotent.

        Takes FLUSH_WAIT_S and COMMANDS_WAIT_S at most, whatever the clients do."""
        self._is_closing = True
        self._listeners.close()
        await asyncio.gather(*(session.flush() for session in tuple(self._sessions)))
        tasks = tuple(self._sessions.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._works.close()
