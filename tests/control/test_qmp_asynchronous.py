"""Asynchronous commands: the session goes on meanwhile, and some end with their client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.control.qmp import works as works_module
from engine.control.qmp.registry import CommandRegistry
from engine.control.qmp.server import REQUESTS_MAX
from tests.control.qmp_rig import ECHO, Echo, Gate, client, echo, reached, registry, serving


class Waiting(Gate):
    """Asynchronous commands: one that ends with its client, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = asyncio.Event()

    async def until_cancelled(self, _: object) -> str:
        try:
            await self.pass_through(None)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return "passed"

    def registry(self) -> CommandRegistry:
        commands = registry()
        commands.add("watch", self.until_cancelled, is_asynchronous=True, is_cancellable=True)
        commands.add("work", self.until_cancelled, is_asynchronous=True)
        return commands


def test_an_asynchronous_command_lets_the_next_ones_pass_and_is_answered_when_it_ends(
    tmp_path: Path,
) -> None:
    async def scenario() -> tuple[list[Any], list[Any]]:
        gate = Waiting()
        path = tmp_path / "qmp"
        async with serving(path, gate.registry()), client(path) as one:
            one.writer.write(b'{"execute":"work","id":"slow"}{"execute":"watch","id":"slower"}')
            early = await one.ask(ECHO | {"id": 1}, ECHO | {"id": 2})
            gate.may_end.set()
            return early, [await one.line(), await one.line()]

    early, late = asyncio.run(scenario())
    assert early == [{"return": ["x"], "id": 1}, {"return": ["x"], "id": 2}]
    assert late == [{"return": "passed", "id": "slow"}, {"return": "passed", "id": "slower"}]


def test_asynchronous_commands_that_wait_are_bounded_too(tmp_path: Path) -> None:
    count = REQUESTS_MAX * 3

    async def scenario() -> tuple[int, int]:
        gate = Waiting()
        path = tmp_path / "qmp"
        async with serving(path, gate.registry()) as server, client(path) as one:
            one.writer.write(b'{"execute":"work"}' * count)
            (session,) = server._sessions
            await reached(session._room.locked)
            for _ in range(100):  # what could begin now, would
                await asyncio.sleep(0)
            begun = gate.begun_count
            gate.may_end.set()
            return begun, len([await one.line() for _ in range(count)])

    assert asyncio.run(scenario()) == (REQUESTS_MAX, count)


@pytest.mark.parametrize("leaves_altogether", [False, True])
def test_a_cancellable_command_ends_when_its_client_says_no_more(
    tmp_path: Path, leaves_altogether: bool
) -> None:
    async def scenario() -> bool:
        gate = Waiting()
        path = tmp_path / "qmp"
        async with serving(path, gate.registry()) as server, client(path) as one:
            one.writer.write(b'{"execute":"watch"}')
            await reached(lambda: gate.begun_count == 1)
            if leaves_altogether:
                one.writer.transport.abort()
            else:
                one.writer.write_eof()
            await reached(lambda: not server._sessions)
            return gate.cancelled.is_set() and not gate.ended.is_set()

    assert asyncio.run(scenario())


def test_a_client_that_left_is_noticed_though_what_it_said_was_not_read(tmp_path: Path) -> None:
    async def scenario() -> int:
        gate = Waiting()
        path = tmp_path / "qmp"
        async with serving(path, gate.registry()) as server, client(path) as one:
            one.writer.write(b'{"execute":"watch"}' * 50_000)
            (session,) = server._sessions
            await reached(session._room.locked)
            one.writer.transport.abort()
            await reached(lambda: not server._sessions)
            return gate.begun_count

    assert asyncio.run(scenario()) <= REQUESTS_MAX


def test_an_asynchronous_command_that_is_not_cancellable_ends_though_its_client_is_gone(
    tmp_path: Path,
) -> None:
    async def scenario() -> tuple[bool, bool]:
        gate = Waiting()
        path = tmp_path / "qmp"
        async with serving(path, gate.registry()) as server:
            async with client(path) as one:
                one.writer.write(b'{"execute":"work"}')
                await reached(lambda: gate.begun_count == 1)
            await reached(lambda: not server._sessions)
            gate.may_end.set()
            async with asyncio.timeout(60):
                await gate.ended.wait()
            return gate.ended.is_set(), gate.cancelled.is_set()

    assert asyncio.run(scenario()) == (True, False)


def test_closing_the_server_cancels_what_is_cancellable_and_does_not_wait_for_it(
    tmp_path: Path,
) -> None:
    async def scenario() -> bool:
        gate = Waiting()
        path = tmp_path / "qmp"
        async with serving(path, gate.registry()) as server, client(path) as one:
            one.writer.write(b'{"execute":"watch"}')
            await reached(lambda: gate.begun_count == 1)
            async with asyncio.timeout(works_module.COMMANDS_WAIT_S):
                await server.close()
            return gate.cancelled.is_set()

    assert asyncio.run(scenario())


def test_only_an_asynchronous_command_can_be_cancellable() -> None:
    with pytest.raises(AssertionError, match="watch"):
        registry().add("watch", echo, Echo, is_cancellable=True)
