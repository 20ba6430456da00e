"""`--guest handoff:PATH`: the guest of a VMM that connects and hands its memory over."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Final

from engine.guest import messages
from engine.guest.foreign_missing import Range, unregister
from engine.guest.foreignguest import ForeignGuest, attach_foreign
from engine.guest.link import AgentLink, start_agent
from engine.guest.rundir import default_rundir

log = logging.getLogger("ramferry.guest")

AGENT: Final = "engine.guest.handoff_agent"


class HandoffGuest(ForeignGuest):
    """As every process that others have started; but it notices when its agent is gone."""

    def __init__(
        self, link: AgentLink, started: messages.ForeignStarted, fds: list[int], pidfd: int
    ) -> None:
        super().__init__(link, started, fds, pidfd)
        self._kind = started.kind

    @property
    def kind(self) -> str:
        """One that speaks Firecracker's handshake is memory and nothing else."""
        return self._kind

    def _end_missing_alone(self, uffds: Sequence[int], places: Sequence[Range]) -> None:
        """Its own descriptors are its to close."""
        unregister(uffds, places)

    def _proceed(self) -> None:
        """It went on when the connection ended."""


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
