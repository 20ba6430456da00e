"""The destination of a postcopy, with a guest and services that a test plays."""

from __future__ import annotations

import asyncio
import errno
from types import SimpleNamespace
from typing import Any

import pytest

from engine.control.postcopy import destination
from engine.control.postcopy.destination import PostcopyDestination


class Played:
    """A guest that lends its userfaultfd, a fault service, and receivers that need their time."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self.has_unmapped = asyncio.Event()
        self.parameters = SimpleNamespace(x_postcopy_prefetch=0)
        self.faults, self.blocks, self.received = None, (), None
        self.guest = self

    async def open_missing(self) -> str:
        self.story.append("lent")
        return "missing"

    async def close_missing(self) -> None:
        self.story.append("given back")

    async def start(self, _: str) -> None:
        self.story.append("service")

    async def end(self) -> None:
        self.story.append("no service")

    def insert(self, *_: Any) -> None:
        self.story.append("insert")

    async def inserting(self) -> None:
        await self.has_unmapped.wait()
        self.story.append("inserting")


def begin(played: Any, monkeypatch: pytest.MonkeyPatch) -> asyncio.Task[PostcopyDestination]:
    monkeypatch.setattr(destination, "FaultService", lambda *_, **__: played)
    return asyncio.ensure_future(
        PostcopyDestination.begin(played, bytes(16), played, "tcp://127.0.0.1:0", lambda _: None)
    )


def test_it_is_prepared_when_receivers_have_unmapped_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        played = Played()
        beginning = begin(played, monkeypatch)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not beginning.done()
        played.has_unmapped.set()
        await beginning
        assert played.story == ["lent", "service", "insert", "inserting"]

    asyncio.run(scenario())


def test_no_memory_for_a_fault_service_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    async def scenario() -> None:
        played: Any = Played()
        monkeypatch.setattr(destination, "FaultService", full)
        with pytest.raises(OSError, match="Cannot allocate"):
            await PostcopyDestination.begin(played, bytes(16), played, "", lambda _: None)
        assert played.story == ["lent", "given back"]

    asyncio.run(scenario())


def test_receivers_that_do_not_answer_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        played = Played()

        async def never() -> None:
            raise TimeoutError

        played.inserting = never  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            await begin(played, monkeypatch)
        assert played.story == ["lent", "service", "insert", "no service", "given back"]

    asyncio.run(scenario())
