"""Whether the token has come to the guest here, once its source can be asked no more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from engine.errors import GuestError
from engine.guest.base import Guest

log = logging.getLogger("ramferry.destination")

#: A source that is silent for so long while it has something to say is gone; heartbeats notice
#: sooner.
TOKEN_WAIT_S: Final = 60.0
ASK_AGAIN_S: Final = 1.0  #: between two questions to a guest that does not answer


async def has_taken_over(guest: Guest, taken: asyncio.Event) -> bool:
    """False once the token cannot come any more, True when it came. Nothing less allows us to give
    RAM back or to say that we failed: the guest is asked until it answers or is dead.

    :param taken: set when the guest says that it has come."""
    while guest.is_alive and not taken.is_set():
        try:
            if await guest.disarm():
                return False
            await asyncio.wait_for(taken.wait(), TOKEN_WAIT_S)
        except (GuestError, TimeoutError) as exc:
            log.warning("the guest does not say whether it has taken over: %s", exc)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(guest.died(), ASK_AGAIN_S)
    return taken.is_set()
