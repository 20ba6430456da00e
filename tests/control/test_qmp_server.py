"""The QMP server on real sockets: negotiation, errors, many clients, slow clients, its files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from engine.control.qmp.registry import Arguments, CommandRegistry
from engine.control.qmp.server import CLIENTS_MAX, EVENTS_MAX, QmpServer
from engine.control.uri import Address
from engine.errors import MigrationError, UsageError


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


def registry() -> CommandRegistry:
    commands = CommandRegistry()
    commands.add("echo", echo, Echo, oob=True)
    commands.add("fail", fail)
    commands.add("bug", bug)
    return commands


class Client:
    """A client that writes bytes and reads lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def line(self) -> Any:
        async with asyncio.timeout(10):
            return json.loads(await self.reader.readline())

    async def ask(self, *requests: Any) -> list[Any]:
        for request in requests:
            data = request if isinstance(request, bytes) else json.dumps(request).encode()
            self.writer.write(data)
        return [await self.line() for _ in requests]


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[QmpServer]:
    server = QmpServer(registry())
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


ECHO = {"execute": "echo", "arguments": {"value": "x"}}


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (ECHO, {"return": ["x"]}),
        (ECHO | {"id": {"any": [1]}}, {"return": ["x"], "id": {"any": [1]}}),
        ({"execute": "fail", "id": 7}, error("the world said no", id=7)),
        ({"execute": "bug"}, error("internal error: KeyError('ours')")),
        ({"execute": "no"}, error("The command no has not been found", "CommandNotFound")),
        ({}, error("QMP input lacks member 'execute'")),
        ({"execute": 5}, error("QMP input member 'execute' must be a string")),
        ({"execute": "fail", "x": 1}, error("QMP input member 'x' is unexpected")),
        (
            {"execute": "fail", "arguments": []},
            error("QMP input member 'arguments' must be an object"),
        ),
        ({"exec-oob": "echo"}, error("QMP input member 'exec-oob' is unexpected")),
        ({"execute": "echo"}, error("Parameter 'value' is missing")),
        (
            {"execute": "echo", "arguments": {"value": 1}},
            error("Invalid parameter type for 'value', expected: string"),
        ),
        (
            {"execute": "echo", "arguments": {"value": "x", "repeat-count": "2"}},
            error("Invalid parameter type for 'repeat-count', expected: integer"),
        ),
        (
            {"execute": "echo", "arguments": {"value": "x", "loud": 1}},
            error("Invalid parameter type for 'loud', expected: boolean"),
        ),
        (
            {"execute": "echo", "arguments": {"value": "x", "foo": 1}},
            error("Parameter 'foo' is unexpected"),
        ),
        (b"[1]", error("QMP input must be a JSON object")),
        (
            {"execute": "qmp_capabilities"},
            error(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            ),
        ),
    ],
)
def test_requests_are_answered_as_qemu_does(tmp_path: Path, request_: Any, answer: Any) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp") as one:
            return await one.ask(request_, ECHO)

    assert asyncio.run(scenario()) == [answer, {"return": ["x"]}]


def test_malformed_json_is_answered_and_the_connection_goes_on(tmp_path: Path) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp") as one:
            return await one.ask(b"{nonsense}", b" garbage\n", ECHO)

    broken, garbage, echoed = asyncio.run(scenario())
    assert broken["error"]["desc"].startswith("JSON parse error, ")
    assert garbage["error"]["desc"] == "JSON parse error, invalid keyword 'garbage'"
    assert echoed == {"return": ["x"]}


def test_before_the_negotiation_nothing_else_is_executed(tmp_path: Path) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp", negotiate=False) as one:
            return await one.ask(
                ECHO,
                {"execute": "qmp_capabilities", "arguments": {"enable": ["fly"]}},
                {"execute": "qmp_capabilities"},
                ECHO,
            )

    early, wrong, right, late = asyncio.run(scenario())
    assert early == error(
        "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
    )
    assert wrong == error("Parameter 'enable' does not accept value 'fly'")
    assert right == {"return": {}}
    assert late == {"return": ["x"]}


def test_out_of_band_commands_are_for_those_that_allow_it(tmp_path: Path) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp", oob=True) as one:
            first = await one.ask({"exec-oob": "echo", "arguments": {"value": "o"}, "id": 1})
            return first + await one.ask({"exec-oob": "fail", "id": 2})

    allowed, refused = asyncio.run(scenario())
    assert allowed == {"return": ["o"], "id": 1}
    assert refused == error("The command fail does not support OOB", id=2)


def test_answers_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp") as one:
            return await one.ask(*[ECHO | {"id": number} for number in range(50)])

    assert [answer["id"] for answer in asyncio.run(scenario())] == list(range(50))


def test_events_reach_every_client_that_has_negotiated(tmp_path: Path) -> None:
    async def scenario() -> list[Any]:
        path = tmp_path / "qmp"
        async with (
            serving(path) as server,
            client(path) as one,
            client(path) as two,
            client(path, negotiate=False) as three,
        ):
            server.emit("STOP")
            server.emit("MIGRATION", {"status": "active"})
            got = [await one.line(), await one.line(), await two.line(), await two.line()]
            return [*got, *await three.ask({"execute": "qmp_capabilities"})]

    stop, active, *others, negotiated = asyncio.run(scenario())
    assert stop["event"] == "STOP"
    assert "data" not in stop
    assert active["data"] == {"status": "active"}
    assert set(active["timestamp"]) == {"seconds", "microseconds"}
    assert [event["event"] for event in others] == ["STOP", "MIGRATION"]
    assert negotiated == {"return": {}}


def test_a_client_that_never_reads_blocks_nobody_and_loses_its_oldest_events(
    tmp_path: Path,
) -> None:
    count = EVENTS_MAX * 3

    async def scenario() -> tuple[list[Any], int]:
        path = tmp_path / "qmp"
        async with serving(path) as server, client(path) as reads, client(path):
            for number in range(count):
                server.emit("MIGRATION_PASS", {"pass": number, "filler": "x" * 1000})
                if number % 100 == 0:
                    await reads.ask(ECHO) if number == 0 else None
                    await asyncio.sleep(0)
            answers: list[Any] = []
            while not answers or answers[-1].get("data", {}).get("pass") != count - 1:
                answers.append(await reads.line())
            dropped = sum(session.dropped_events for session in server._sessions)
            return answers, dropped

    answers, dropped = asyncio.run(scenario())
    assert answers[-1]["data"]["pass"] == count - 1
    assert dropped > 0


def test_one_client_too_many_is_closed_and_the_others_go_on(tmp_path: Path) -> None:
    async def scenario() -> tuple[bytes, list[Any]]:
        path = tmp_path / "qmp"
        async with serving(path), contextlib.AsyncExitStack() as stack:
            many = [await stack.enter_async_context(client(path)) for _ in range(CLIENTS_MAX)]
            reader, writer = await asyncio.open_unix_connection(str(path))
            nothing = await reader.read()
            writer.close()
            return nothing, await many[-1].ask(ECHO)

    assert asyncio.run(scenario()) == (b"", [{"return": ["x"]}])


def test_the_socket_is_private_replaces_a_dead_one_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def scenario() -> int:
        async with serving(path), client(path):
            return stat.S_IMODE(path.stat().st_mode)

    assert asyncio.run(scenario()) == 0o600
    assert not path.exists()


def test_a_live_monitor_and_a_plain_file_are_not_taken_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "qmp"):
            with pytest.raises(UsageError, match="another process listens"):
                await QmpServer(registry()).listen(Address(path=str(tmp_path / "qmp")))

    asyncio.run(scenario())
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="not a socket"):
        asyncio.run(QmpServer(registry()).listen(Address(path=str(tmp_path / "file"))))
    assert (tmp_path / "file").read_text() == "precious"


def test_the_client_of_qemu_works_over_tcp() -> None:
    async def scenario() -> object:
        server = QmpServer(registry())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        await server.listen(Address("127.0.0.1", port))
        one = QMPClient("test")
        await one.connect(("127.0.0.1", port))
        answer = await one.execute("echo", {"value": "x", "repeat-count": 2})
        await one.disconnect()
        await server.close()
        return answer

    assert asyncio.run(scenario()) == ["x", "x"]
