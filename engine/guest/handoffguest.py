"""`--guest handoff:PATH`: the guest of a VMM that connects and hands its memory over."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Sequence
from typing import Final

from engine.guest import messages
from engine.guest.foreign_missing import Range, unregister
from engine.guest.foreignguest import ForeignGuest, attach_foreign
from engine.guest.handoff_link import VmmLink
from engine.guest.link import AgentLink, start_agent
from engine.guest.rundir import default_rundir

log = logging.getLogger("ramferry.guest")

AGENT: Final = "engine.guest.handoff_agent"


class HandoffGuest(ForeignGuest):
    """As every process that others have started; but it is told by its connection, which is the
    agent's and a copy of it ours: for when the agent is killed."""

    def __init__(
        self, link: AgentLink, started: messages.ForeignStarted, fds: list[int], pidfd: int
    ) -> None:
        self._connection = socket.socket(fileno=fds.pop()) if started.has_connection else None
        super().__init__(link, started, fds, pidfd)
        self._kind = started.kind

    @property
    def kind(self) -> str:
        """One that speaks Firecracker's handshake is memory and nothing else."""
        return self._kind

    def _end_missing_alone(self, uffds: Sequence[int], places: Sequence[Range]) -> None:
        """Its own descriptors are its to close."""
        unregister(uffds, places)

    async def _put_right(self, *, is_running: bool) -> None:
        """As for every process. What becomes of one that its agent may have given up `settle` tells
        later; any other sees the end of its connection, and does what it was told for that."""
        await super()._put_right(is_running=is_running)
        if self._connection is not None and not self._is_given:
            with contextlib.suppress(OSError):  # it has hung up
                self._connection.shutdown(socket.SHUT_RDWR)
            self._close_connection()

    def _proceed(self) -> None:
        """Have it run, also if its agent had told it to stand for good, and see that it does."""
        connection, self._connection = self._connection, None
        if connection is None:  # it went on when its connection ended
            return
        link = VmmLink(connection, f"VMM (pid {self.pid})", on_end=lambda: None)
        try:
            link.execute("resume")
        finally:
            link.close()

    async def _give_back(self) -> None:
        await super()._give_back()
        self._close_connection()

    def _close_connection(self) -> None:
        """Our copy alone: an agent that is left goes on with it. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def attach_handoff(path: str, *, incoming: bool) -> ForeignGuest:
    """Wait, as long as it takes, for a VMM to connect to a socket at `path`; it runs or stands as
    before.

    :raise UsageError: nobody can listen there."""
    where = os.path.abspath(path)
    log.info("waiting for a VMM at '%s'", where)
    link = start_agent(AGENT)
    request = messages.StartHandoff(link.next_id(), where, incoming, default_rundir())
    guest = await attach_foreign(link, request, math.inf, HandoffGuest)
    log.info("VMM (pid %d) has handed %d RAM blocks over", guest.pid, len(guest.blocks))
    return guest
