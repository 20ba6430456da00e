"""The destination of a postcopy gives all back, also when it is told so in the middle of that."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

import pytest

from engine.control.host import Host
from engine.control.postcopy.destination import PostcopyDestination
from engine.control.postcopy.faultservice import FaultService
from engine.guest.base import Missing


class SlowService:
    """A fault service whose worker takes as long to end as the test says."""

    def __init__(self) -> None:
        self.may_end, self.has_ended = asyncio.Event(), False

    async def end(self) -> None:
        await self.may_end.wait()
        self.has_ended = True


class WaitingGuest:
    """A guest whose userfaultfd is open."""

    guest: WaitingGuest

    def __init__(self) -> None:
        self.guest, self.is_missing_open = self, True

    async def close_missing(self) -> None:
        self.is_missing_open = False


def test_an_end_that_is_cancelled_is_done_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {"faults": 7}
    monkeypatch.setattr(PostcopyDestination, "_read", lambda _: figures)

    async def scenario() -> tuple[bool, bool, dict[str, Any]]:
        service, host = SlowService(), WaitingGuest()
        postcopy = PostcopyDestination(
            cast(Host, host), Missing((), (), 0), cast(FaultService, service)
        )
        first = asyncio.ensure_future(postcopy.end(is_closing=True))
        await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        service.may_end.set()
        await postcopy.end(is_closing=True)
        return service.has_ended, host.is_missing_open, postcopy.info()

    assert asyncio.run(scenario()) == (True, False, figures)
