"""The entry of a guest's agent: `python -m engine.guest.agent FD`, or of another kind."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol


class Runs(Protocol):
    """An agent that serves until it is told to end."""

    def run(self) -> Awaitable[None]: ...


def run_agent(kind: Callable[[socket.socket], Runs]) -> None:
    """Serve control on the inherited descriptor that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)

    async def run() -> None:
        await kind(control).run()

    asyncio.run(run())
