"""The human monitor on real sockets: many clients, slow clients, waiting ones, its files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from engine.control.hmp import HmpServer
from engine.control.hmp import server as server_module
from engine.control.hmp.commands import build_monitor
from engine.control.hmp.held import Held
from engine.control.hmp.server import CLIENTS_MAX, LINES_MAX, PROMPT
from engine.control.hmp.telnet import LINE_BYTES_MAX
from engine.control.status import Status
from engine.control.uri import Address
from engine.errors import UsageError
from tests.control.test_hmp import WAIT_S, FakeMigration, Registry


class Client:
    """A client of a human monitor."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def until_prompt(self) -> str:
        async with asyncio.timeout(WAIT_S):
            return (await self.reader.readuntil(PROMPT))[: -len(PROMPT)].decode()

    async def until_end(self) -> str:
        async with asyncio.timeout(WAIT_S):
            return (await self.reader.read()).decode()

    async def ask(self, line: bytes) -> str:
        self.writer.write(line + b"\n")
        return await self.until_prompt()

    async def is_silent(self) -> bool:
        """Nothing comes, also not after everything that could run has run."""
        for _ in range(50):
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(0.05):
                return not await self.reader.read(1)
        except TimeoutError:
            return True


@contextlib.asynccontextmanager
async def serving(
    path: Path, answers: Mapping[str, Any], migration: FakeMigration | None = None
) -> AsyncIterator[HmpServer]:
    server = HmpServer(build_monitor(Registry(answers), Held(lambda: migration)))
    await server.listen(Address(path=str(path)))
    try:
        yield server
    finally:
        async with asyncio.timeout(WAIT_S):
            await server.close()


@contextlib.asynccontextmanager
async def client(path: Path) -> AsyncIterator[Client]:
    one = Client(*await asyncio.open_unix_connection(str(path)))
    try:
        yield one
    finally:
        one.writer.close()
        with contextlib.suppress(ConnectionError):
            await one.writer.wait_closed()


VERSION: Final = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "x"}


def test_a_conversation(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        path = tmp_path / "hmp"
        async with serving(path, {"query-version": VERSION}), client(path) as one:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            said = [await one.until_prompt()]
            for line in (b"info version\r", b"", b"\xff\xfb\x01info version", b"\xc3(", b"nope"):
                said.append(await one.ask(line))
            one.writer.write(b"x" * (LINE_BYTES_MAX + 1) + b"\ninfo version\ninfo version")
            one.writer.write_eof()
            said.append(await one.until_end())
        assert not path.exists()
        return said

    banner, *answers = asyncio.run(scenario())
    assert banner.startswith("ramferry ")
    assert banner.endswith(" monitor - type 'help' for more information\r\n")
    prompt = PROMPT.decode()
    assert answers == [
        "10.0.2x\r\n", "", "10.0.2x\r\n", "Error: a line must be UTF-8\r\n",
        "unknown command: 'nope'\r\n",
        f"Error: a line may have 4095 bytes\r\n{prompt}10.0.2x\r\n{prompt}",
    ]  # fmt: skip


def test_a_client_that_waits_does_not_keep_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        path, migration = tmp_path / "hmp", FakeMigration()
        answers = {
            "migrate": {}, "query-migrate": {"status": "failed", "error-desc": "why"},
            "query-version": VERSION,
        }  # fmt: skip
        async with (
            serving(path, answers, migration),
            client(path) as waiter,
            client(path) as other,
        ):
            await waiter.until_prompt()
            await other.until_prompt()
            waiter.writer.write(b"migrate u\ninfo version\n")
            assert await other.ask(b"info version") == "10.0.2x\r\n"
            assert await waiter.is_silent()
            migration.end(Status.FAILED)
            assert await waiter.until_prompt() == "Error: why\r\n"
            assert await waiter.until_prompt() == "10.0.2x\r\n"

    asyncio.run(scenario())


@pytest.mark.parametrize("failure", [UsageError("no"), KeyError("bug")])
def test_a_client_gets_its_prompt_back_whatever_goes_wrong(
    tmp_path: Path, failure: Exception
) -> None:
    async def scenario() -> None:
        path, migration = tmp_path / "hmp", FakeMigration()
        async with serving(path, {"migrate": failure}, migration), client(path) as one:
            await one.until_prompt()
            assert (await one.ask(b"migrate u")).startswith("Error: ")
        migration.end(Status.FAILED)
        async with (
            serving(path, {"migrate": {}, "query-migrate": failure}, migration),
            client(path) as one,
        ):
            await one.until_prompt()
            assert (await one.ask(b"migrate u")).startswith("Error: ")
            assert (await one.ask(b"nope")).startswith("unknown")

    asyncio.run(scenario())


def test_a_client_that_floods_leaves_others_their_turn(tmp_path: Path) -> None:
    async def scenario() -> list[int]:
        path, turns, seen = tmp_path / "hmp", 0, []

        async def stop() -> object:
            seen.append(turns)
            return {}

        async def another() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with serving(path, {"stop": stop}), client(path) as one:
            await one.until_prompt()
            running = asyncio.ensure_future(another())
            for _ in range(3):
                one.writer.write(b"stop\n" * LINES_MAX)
                for _ in range(LINES_MAX):
                    await one.until_prompt()
            running.cancel()
        return seen

    seen = asyncio.run(scenario())
    assert len(seen) == 3 * LINES_MAX
    assert seen == sorted(set(seen))  # a turn between any two lines


def test_closing_ends_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.control.hmp.held.LOOK_S", 3600.0)

    async def scenario() -> None:
        path, migration = tmp_path / "hmp", FakeMigration()
        answers = {"migrate": {}, "query-migrate": {"status": "active"}}
        async with serving(path, answers, migration) as server, client(path) as one:
            await one.until_prompt()
            one.writer.write(b"migrate u\n")
            assert await one.is_silent()
            async with asyncio.timeout(WAIT_S):
                await server.close()
            assert server.clients == 0
            assert await one.until_end() == PROMPT.decode()

    asyncio.run(scenario())


def test_a_command_that_has_begun_ends_though_its_client_left(tmp_path: Path) -> None:
    async def scenario() -> bool:
        path = tmp_path / "hmp"
        begun, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def slow() -> object:
            begun.set()
            await may_end.wait()
            ended.set()
            return {}

        async with serving(path, {"stop": slow}) as server:
            async with client(path) as one:
                await one.until_prompt()
                one.writer.write(b"stop\n")
                await begun.wait()
                one.writer.transport.abort()
            closing = asyncio.ensure_future(server.close())
            await asyncio.sleep(0)
            may_end.set()
            await closing
        return ended.is_set()

    assert asyncio.run(scenario())


def test_one_client_too_many_is_told_and_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "hmp"
        async with serving(path, {}) as server, contextlib.AsyncExitStack() as stack:
            for _ in range(CLIENTS_MAX):
                one = await stack.enter_async_context(client(path))
                await one.until_prompt()
            assert server.clients == CLIENTS_MAX
            async with client(path) as another:
                assert (
                    await another.until_end() == f"Error: {CLIENTS_MAX} clients are connected\r\n"
                )
            assert await one.ask(b"nope") == "unknown command: 'nope'\r\n"

    asyncio.run(scenario())


async def written_until_blocked(one: Client, data: bytes) -> int:
    """How much the server takes before it reads no more, in bytes; without limit: 64 MiB."""
    sent = 0
    while sent < 64 * 1024 * 1024:
        one.writer.write(data)
        sent += len(data)
        try:
            async with asyncio.timeout(0.3):
                await one.writer.drain()
        except TimeoutError:
            break
    return sent


@pytest.mark.parametrize(
    "lines",
    [pytest.param(b"help\n" * 1000, id="reads-no-answers"),
     pytest.param(b"stop\n" * 1000, id="while-a-command-runs")],
)  # fmt: skip
def test_a_client_that_only_writes_is_not_read_without_end(tmp_path: Path, lines: bytes) -> None:
    async def scenario() -> int:
        path, may_end = tmp_path / "hmp", asyncio.Event()
        async with serving(path, {"stop": may_end.wait}), client(path) as one:
            sent = await written_until_blocked(one, lines)
            may_end.set()
            one.writer.transport.abort()
        return sent

    assert asyncio.run(scenario()) < 4 * 1024 * 1024


def test_a_line_without_end_takes_no_room(tmp_path: Path) -> None:
    async def scenario() -> str:
        path = tmp_path / "hmp"
        async with serving(path, {}), client(path) as one:
            await one.until_prompt()
            for _ in range(256):
                one.writer.write(b"x" * 65536)
                await one.writer.drain()
            return await one.ask(b"")

    assert asyncio.run(scenario()) == "Error: a line may have 4095 bytes\r\n"


def test_listening_at_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "hmp"
        async with serving(path, {}) as server:
            with pytest.raises(UsageError, match="another process listens"):
                await server.listen(Address(path=str(path)))
            with pytest.raises(UsageError, match="a monitor cannot listen at"):
                await server.listen(Address(path=str(tmp_path / "no" / "such")))

    asyncio.run(scenario())


def test_a_free_port_of_tcp_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> str:
        server = HmpServer(build_monitor(Registry({}), Held(lambda: None)))
        try:
            await server.listen(Address(host="127.0.0.1"))
            port = int(caplog.messages[-1].rpartition(":")[2])
            one = Client(*await asyncio.open_connection("127.0.0.1", port))
            banner = await one.until_prompt()
            one.writer.close()
            await one.writer.wait_closed()
            return banner
        finally:
            await server.close()

    with caplog.at_level("INFO"):
        assert asyncio.run(scenario()).startswith("ramferry ")


def test_what_may_wait_is_small() -> None:
    assert LINES_MAX * LINE_BYTES_MAX + 3 * server_module.READ_BYTES < 80 * 1024


def test_an_end_that_only_tcp_knows_ends_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(self: asyncio.StreamReader, count: int = -1) -> bytes:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    async def scenario() -> None:
        path = tmp_path / "hmp"
        async with serving(path, {}) as server:
            connected = socket.socket(socket.AF_UNIX)
            with connected, monkeypatch.context() as patch:
                patch.setattr(asyncio.StreamReader, "read", lost)
                connected.connect(str(path))
                async with asyncio.timeout(WAIT_S):
                    while not server.clients:
                        await asyncio.sleep(0)
                    while server.clients:
                        await asyncio.sleep(0)

    asyncio.run(scenario())
