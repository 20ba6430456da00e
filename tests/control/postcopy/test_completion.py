"""What ends a destination's postcopy: its last page, whoever is gone then, or its guest's death."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from engine import wire
from engine.control.framestream import ConnectionLost
from engine.control.postcopy import completion
from engine.control.postcopy.completion import Completion
from engine.control.status import Status, check_incoming
from engine.errors import GuestError

WAIT_S = 20


class Main:
    """A main channel that is lost."""

    def __init__(self) -> None:
        self.said: list[wire.Message] = []

    def stop_listening(self) -> None: ...

    async def receive(self) -> None:
        raise ConnectionLost("hung up")


class Postcopy:
    def __init__(self) -> None:
        self.service = SimpleNamespace(has_all=asyncio.Event())
        self.is_closed = False

    async def end(self, *, is_closing: bool) -> None:
        self.is_closed = is_closing


class Guest:
    def __init__(self) -> None:
        self.dead = asyncio.Event()

    @property
    def is_alive(self) -> bool:
        return not self.dead.is_set()

    async def died(self) -> str:
        await self.dead.wait()
        return "killed"


class Migration:
    """What `Completion` uses of an incoming migration.

    :ivar last_page_comes: beside which end, if it does."""

    session, error, address = bytes(16), None, None

    def __init__(self, postcopy: Postcopy, *, last_page_comes: str = "") -> None:
        self.guest = Guest()
        self.host: Any = SimpleNamespace(guest=self.guest)
        self.statuses = [Status.POSTCOPY_ACTIVE]
        self.has_all, self.last_page_comes = postcopy.service.has_all, last_page_comes
        self.breaks_off: Exception = ConnectionLost("cut")

    @property
    def status(self) -> Status:
        return self.statuses[-1]

    def set_status(self, status: Status) -> None:
        check_incoming(self.status, status)
        self.statuses.append(status)
        if status is Status.POSTCOPY_PAUSED and self.last_page_comes == "in the pause":
            asyncio.get_running_loop().call_soon(self.has_all.set)

    async def converse_until(self, main: Main, over: asyncio.Event) -> None:
        if over is self.has_all:
            if self.last_page_comes == "with the end":
                over.set()
            raise self.breaks_off

    def forget_failure(self) -> None: ...

    async def end_channels(self, main: Main, *, has_failed: bool) -> None: ...

    async def last_word(self, main: Main, message: wire.Message) -> None:
        main.said.append(message)


async def completed(last_page_comes: str) -> tuple[Migration, Main]:
    postcopy, main = Postcopy(), Main()
    migration = Migration(postcopy, last_page_comes=last_page_comes)
    async with asyncio.timeout(WAIT_S):
        await Completion(migration, main).run(postcopy, None)  # type: ignore[arg-type]
    assert postcopy.is_closed
    assert migration.error is None
    return migration, main


def test_a_last_page_that_comes_with_the_end_of_the_connections_is_the_end() -> None:
    migration, main = asyncio.run(completed("with the end"))
    assert migration.statuses == [Status.POSTCOPY_ACTIVE, Status.COMPLETED]
    assert [type(one) for one in main.said] == [wire.TookOver, wire.HasAll]


def test_a_last_page_that_comes_in_a_pause_ends_it() -> None:
    migration, main = asyncio.run(completed("in the pause"))
    assert migration.statuses == [
        Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER,
        Status.POSTCOPY_ACTIVE, Status.COMPLETED,
    ]  # fmt: skip
    assert [type(one) for one in main.said] == [wire.TookOver]


GONE = GuestError("the guest is gone, or has unmapped its RAM")


def test_whoever_sees_first_that_the_guest_is_gone_it_is_the_guest_s_death() -> None:
    """Its kernel frees its memory before its process has ended."""

    async def scenario() -> tuple[Migration, Main]:
        postcopy, main = Postcopy(), Main()
        migration = Migration(postcopy)
        migration.breaks_off = GONE
        task = asyncio.create_task(Completion(migration, main).run(postcopy, None))  # type: ignore[arg-type]
        while not main.said:
            await asyncio.sleep(0)
        for _ in range(20):  # it does not matter how long that takes
            await asyncio.sleep(0)
        migration.guest.dead.set()
        await asyncio.wait_for(task, WAIT_S)
        return migration, main

    migration, main = asyncio.run(scenario())
    assert migration.statuses == [Status.POSTCOPY_ACTIVE, Status.FAILED]
    assert main.said == [wire.TookOver(), wire.Failed("the guest died: killed")]


def test_a_guest_that_lives_on_without_its_ram_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "DYING_WAIT_S", 0.01)

    async def scenario() -> list[Status]:
        postcopy, main = Postcopy(), Main()
        migration = Migration(postcopy, last_page_comes="in the pause")
        migration.breaks_off = GONE
        async with asyncio.timeout(WAIT_S):
            await Completion(migration, main).run(postcopy, None)  # type: ignore[arg-type]
        return migration.statuses

    assert asyncio.run(scenario())[:2] == [Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED]
