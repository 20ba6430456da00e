"""The destination's bookkeeping, without a guest or a source."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine import wire
from engine.control.host import Host
from engine.control.incoming import IncomingMigration, Lane
from engine.control.mainchannel import DestinationEnd
from engine.control.notifiers import Notifiers
from engine.control.pool import Worker
from engine.control.status import Status
from engine.control.uri import Address
from engine.errors import UsageError, WorkerLost
from engine.multifd.progress import Progress


class SilentHost:
    """A host that only hears events."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.notifiers = Notifiers()

    def emit(self, event: str, data: dict[str, object] | None = None) -> None:
        self.events.append(data)


def test_work_beside_the_conversation_is_forgotten_when_it_has_ended() -> None:
    async def scenario() -> None:
        incoming = IncomingMigration(cast(Host, SilentHost()), Address(port=1))
        done = asyncio.Event()

        async def work() -> None:
            await done.wait()

        for _ in range(100):
            incoming._beside(work())
        assert len(incoming._inner) == 100
        ended = tuple(incoming._inner)
        done.set()
        await asyncio.gather(*ended)
        await asyncio.sleep(0)  # callbacks of a task run in the step after its end
        assert incoming._inner == set()

    asyncio.run(scenario())


def test_a_file_at_the_path_fails_the_migration_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")

    async def scenario() -> IncomingMigration:
        incoming = IncomingMigration(cast(Host, SilentHost()), Address(path=str(path)))
        with pytest.raises(UsageError, match="exists and is not a socket"):
            incoming.start()
        await incoming.close()
        return incoming

    incoming = asyncio.run(scenario())
    assert incoming.status is Status.FAILED
    assert incoming.error is not None
    assert incoming.error.count("\n") == 0
    assert path.read_text() == "precious"


def test_a_second_wish_for_a_lane_waits_until_its_new_receiver_listens() -> None:
    """The receiver was killed and replaced; before the new one listens the sender dies, too. What
    is lost from then on is of the second wish's incarnation."""
    said: list[wire.Message] = []

    async def send(message: wire.Message) -> None:
        said.append(message)

    async def scenario() -> list[wire.Message]:
        incoming = IncomingMigration(cast(Host, SilentHost()), Address(port=1))
        main = cast(DestinationEnd, SimpleNamespace(send=send))
        worker = cast(Worker[wire.ReceiverReport], SimpleNamespace(is_alive=True))
        lane = Lane(0, Progress.create(), worker, incarnation=2)
        incoming._lanes, incoming._main, incoming._is_welcomed = [lane], main, True
        incoming._start_reopening(main, 0, 3)
        await asyncio.sleep(0)
        before = list(said)
        incoming._take(lane, worker, wire.Opened(2))  # late, and over
        incoming._take(lane, worker, wire.Ready("tcp://127.0.0.1:7", "memcpy"))
        await asyncio.gather(*incoming._inner)
        incoming._lose(lane, WorkerLost("receiver", 0, "the process died"))
        await asyncio.gather(*incoming._inner)
        lane.progress.close()
        return before

    assert asyncio.run(scenario()) == []
    assert said[0] == wire.Reopened(0, 3, "tcp://127.0.0.1:7")
    assert isinstance(said[1], wire.ChannelBroken)
    assert said[1].incarnation == 3
