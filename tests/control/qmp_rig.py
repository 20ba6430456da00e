"""A QMP server with some commands on a real socket, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from engine.control.qmp.registry import Arguments, CommandRegistry
from engine.control.qmp.server import QmpServer
from engine.control.uri import Address
from engine.errors import MigrationError


class Echo(Arguments, frozen=True):
    value: str
    repeat_count: int = 1
    loud: bool | None = None


async def echo(arguments: Echo) -> object:
    return [arguments.value] * arguments.repeat_count


async def fail(_: object) -> object:
    raise MigrationError("the world said no")


async def bug(_: object) -> object:
    raise KeyError("ours")


class Gate:
    """A command that tells that it has begun, waits until it may go on, and tells that it ended."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.begun_count = 0
        self.may_end = asyncio.Event()
        self.ended = asyncio.Event()

    async def pass_through(self, _: object) -> None:
        self.begun_count += 1
        self.begun.release()
        await self.may_end.wait()
        self.ended.set()


async def unencodable(_: object) -> object:
    return ["\ud800"]


async def large(_: object) -> object:
    return "x" * 60_000


def registry() -> CommandRegistry:
    commands = CommandRegistry()
    commands.add("unencodable", unencodable)
    commands.add("large", large, oob=True)
    commands.add("echo", echo, Echo, oob=True)
    commands.add("fail", fail)
    commands.add("bug", bug)
    return commands


class Client:
    """A client that writes bytes and reads lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def line(self) -> Any:
        async with asyncio.timeout(60):
            return json.loads(await self.reader.readline())

    async def ask(self, *requests: Any) -> list[Any]:
        for request in requests:
            data = request if isinstance(request, bytes) else json.dumps(request).encode()
            self.writer.write(data)
        return [await self.line() for _ in requests]


@contextlib.asynccontextmanager
async def serving(path: Path, commands: CommandRegistry | None = None) -> AsyncIterator[QmpServer]:
    server = QmpServer(commands or registry())
    await server.listen(Address(path=str(path)))
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def client(path: Path, *, negotiate: bool = True, oob: bool = False) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    one = Client(reader, writer)
    assert "QMP" in await one.line()
    if negotiate:
        enable = {"enable": ["oob"]} if oob else {}
        answers = await one.ask({"execute": "qmp_capabilities", "arguments": enable})
        assert answers == [{"return": {}}]
    try:
        yield one
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def error(text: str, class_: str = "GenericError", **more: Any) -> dict[str, Any]:
    return {"error": {"class": class_, "desc": text}} | more


async def reached(fact: Callable[[], bool]) -> None:
    """Let the loop run until it is so."""
    async with asyncio.timeout(60):
        while not fact():
            await asyncio.sleep(0)


ECHO = {"execute": "echo", "arguments": {"value": "x"}}
