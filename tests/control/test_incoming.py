"""The destination's bookkeeping, without a guest or a source."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any, cast

import pytest

from engine.control.host import Host
from engine.control.incoming import IncomingMigration
from engine.control.notifiers import Notifiers
from engine.control.status import Status
from engine.control.uri import Address
from engine.errors import UsageError


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


def test_a_failure_that_nobody_waits_for_any_more_complains_of_nothing() -> None:
    """The guest's death may come after what it has broken off."""
    complaints: list[dict[str, Any]] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        incoming = IncomingMigration(cast(Host, SilentHost()), Address(port=1))
        incoming.pause("first")
        incoming.pause("second")
        del incoming
        gc.collect()

    asyncio.run(scenario())
    assert complaints == []


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
