"""Many clients at once that poll, among them one that never reads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import Path
from typing import Any, Final

from engine.control.qmp.messages import Shared, answer_line
from tests.control.qmp_rig import ECHO, Client, Gate, client, registry, serving

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


async def answer(_: object) -> object:
    return Shared(a=1)


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


def test_what_never_waits_overtakes_nothing(tmp_path: Path) -> None:
    """A poll between a command that waits and an event, in one write and in many."""
    path, gate = tmp_path / "qmp", Gate()

    async def scenario() -> tuple[list[Any], list[Any]]:
        commands = registry()
        commands.add("poll", answer, is_immediate=True)
        commands.add("gate", gate.pass_through)
        async with serving(path, commands) as server, client(path) as one:
            one.writer.write(b'{"execute":"gate","id":1}')
            await gate.begun.acquire()
            one.writer.write(b'{"execute":"poll","id":2}')
            await asyncio.sleep(0.05)  # it is read, and must wait
            server.emit("STOP")
            gate.may_end.set()
            late = [await one.line() for _ in range(3)]
            server.emit("RESUME")
            one.writer.write(b'{"execute":"poll","id":3}{"execute":"echo","id":4}')
            return late, [await one.line() for _ in range(3)]

    late, early = asyncio.run(scenario())
    assert [one.get("event", one.get("id")) for one in late] == ["STOP", 1, 2]
    assert [one.get("event", one.get("id")) for one in early] == ["RESUME", 3, 4]


def test_polls_of_a_client_that_does_not_read_are_answered_whole_and_in_order(
    tmp_path: Path,
) -> None:
    """The kernel takes a part of an answer; the rest waits, and nothing overtakes it."""
    path, count = tmp_path / "qmp", 400

    async def scenario() -> list[int]:
        commands = registry()
        made = itertools.count()

        async def poll(_: object) -> object:
            return Shared(number=next(made), filling="x" * 5000)

        commands.add("poll", poll, is_immediate=True)
        async with serving(path, commands), client(path) as one:
            one.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(count):
                one.writer.write(b'{"execute":"poll"}')
                await asyncio.sleep(0)
            one.writer.transport.resume_reading()  # type: ignore[attr-defined]
            return [(await one.line())["return"]["number"] for _ in range(count)]

    assert asyncio.run(scenario()) == list(range(count))


def test_an_answer_that_is_shared_is_encoded_once() -> None:
    shared = Shared(a=1.0, b=["\u00e9"])
    whole = {"id": [1, 2.0]}
    assert answer_line(shared, {}) == answer_line(dict(shared), {})
    assert answer_line(shared, whole) == answer_line(dict(shared), whole)
    assert shared.encoded() is shared.encoded()
