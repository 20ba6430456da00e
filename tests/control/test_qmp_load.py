"""Many clients at once that poll, among them one that never reads."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Final

from tests.control.qmp_rig import ECHO, Client, client, serving

CLIENTS_COUNT: Final = 50
POLLS_COUNT: Final = 100
EVENTS_COUNT: Final = 50


async def poll(one: Client) -> tuple[list[Any], list[Any]]:
    """Ask again and again; ids of the answers, and numbers of the events between them."""
    identities, passes = [], []
    for number in range(POLLS_COUNT):
        (message,) = await one.ask(ECHO | {"id": number})
        while "event" in message:
            passes.append(message["data"]["pass"])
            message = await one.line()
        identities.append(message["id"])
    return identities, passes


def test_fifty_clients_poll_and_each_gets_its_answers_and_all_events_in_order(
    tmp_path: Path,
) -> None:
    path = tmp_path / "qmp"

    async def scenario() -> list[tuple[list[Any], list[Any]]]:
        async with serving(path) as server, contextlib.AsyncExitStack() as stack:
            silent = await stack.enter_async_context(client(path))
            silent.writer.transport.pause_reading()  # type: ignore[attr-defined]
            silent.writer.write(b'{"execute":"large"}' * 1000)
            clients = [await stack.enter_async_context(client(path)) for _ in range(CLIENTS_COUNT)]
            polling = asyncio.gather(*(poll(one) for one in clients))
            for number in range(EVENTS_COUNT):
                server.emit("MIGRATION_PASS", {"pass": number})
                await asyncio.sleep(0)
            return await polling

    for identities, passes in asyncio.run(scenario()):
        assert identities == list(range(POLLS_COUNT))
        assert passes == list(range(EVENTS_COUNT))
