"""The QMP server on real sockets: negotiation, errors, many clients, slow clients, its files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from engine.control.qmp import session as session_module
from engine.control.qmp import works as works_module
from engine.control.qmp.server import CLIENTS_MAX, EVENTS_MAX, REQUESTS_MAX, QmpServer
from engine.control.uri import Address
from engine.errors import UsageError
from tests.control.qmp_rig import ECHO, Gate, client, error, registry, serving


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
    assert wrong == error("Parameter 'null' does not accept value 'fly'")
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
            dropped = sum(session.dropped_events_count for session in server._sessions)
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


def test_the_client_of_qemu_works_over_tcp(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> object:
        server = QmpServer(registry())
        with caplog.at_level("INFO", "ramferry.qmp"):
            await server.listen(Address("127.0.0.1", 0))
        port = int(caplog.messages[-1].rpartition(":")[2])
        one = QMPClient("test")
        await one.connect(("127.0.0.1", port))
        answer = await one.execute("echo", {"value": "x", "repeat-count": 2})
        await one.disconnect()
        await server.close()
        return answer

    assert asyncio.run(scenario()) == ["x", "x"]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (rb'{"execute":"echo","id":"\ud800"}', r"\ud800 is not a valid Unicode character"),
        (
            rb'{"execute":"echo","arguments":{"value":"\udc80"}}',
            r"\udc80 is not a valid Unicode character",
        ),
        (
            rb'{"execute":"echo","arguments":{"\ud800":1}}',
            r"\ud800 is not a valid Unicode character",
        ),
        (b'{"execute":"echo","id":"\xed\xa0\x80"}', "invalid UTF-8"),
        (b'{"execute":"echo","id":nan}', "invalid keyword 'nan'"),
        (b'{"execute":"echo","id":1e999}', "out of range"),
        (b'{"execute":"echo","id":' + b"9" * 5000 + b"}", "out of range"),
    ],
)
def test_what_could_not_be_answered_is_a_parse_error_and_the_connection_goes_on(
    tmp_path: Path, request_: bytes, says: str
) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp") as one:
            return await one.ask(request_, ECHO)

    refused, echoed = asyncio.run(scenario())
    assert refused["error"]["class"] == "GenericError"
    assert refused["error"]["desc"].startswith("JSON parse error, ")
    assert says in refused["error"]["desc"]
    assert echoed == {"return": ["x"]}


@pytest.mark.parametrize(
    "identity", ["\U0001f600", 2**64 - 1, -(2**63), 1e300, float(2**70), None, {"a": [[]]}]
)
def test_an_id_comes_back_as_it_was(tmp_path: Path, identity: Any) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp") as one:
            return await one.ask(ECHO | {"id": identity})

    assert asyncio.run(scenario()) == [{"return": ["x"], "id": identity}]


def test_an_answer_that_cannot_be_encoded_is_an_error_and_the_connection_goes_on(
    tmp_path: Path,
) -> None:
    async def scenario() -> list[Any]:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp") as one:
            return await one.ask({"execute": "unencodable", "id": 3}, ECHO)

    refused, echoed = asyncio.run(scenario())
    assert refused["error"]["desc"].startswith("internal error: UnicodeEncodeError")
    assert refused["id"] == 3
    assert echoed == {"return": ["x"]}


def test_a_session_whose_executor_dies_of_a_bug_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object, __: object, ___: object) -> bytes:
        raise KeyError("ours")

    async def scenario() -> bytes:
        async with serving(tmp_path / "qmp"), client(tmp_path / "qmp") as one:
            monkeypatch.setattr(session_module.Session, "_execute", broken)
            one.writer.write(json.dumps(ECHO).encode())
            async with asyncio.timeout(60):
                with contextlib.suppress(ConnectionError):
                    return await one.reader.read()
            return b""

    assert asyncio.run(scenario()) == b""


@pytest.mark.parametrize("verb", ["exec-oob", "execute"])
def test_requests_that_wait_for_their_answer_are_bounded_out_of_band_too(
    tmp_path: Path, verb: str
) -> None:
    count = REQUESTS_MAX * 4

    async def scenario() -> tuple[int, int]:
        gate = Gate()
        commands = registry()
        commands.add("gate", gate.pass_through, oob=True)
        path = tmp_path / "qmp"
        async with serving(path, commands) as server, client(path, oob=True) as one:
            request = json.dumps({verb: "gate"}).encode()
            one.writer.write(request * count)
            (session,) = server._sessions
            async with asyncio.timeout(60):
                while not session._room.locked():
                    await gate.begun.acquire()
            for _ in range(100):  # what could begin now, would
                await asyncio.sleep(0)
            most = max(gate.begun_count, len(session._side) + session._requests.qsize())
            gate.may_end.set()
            answers = [await one.line() for _ in range(count)]
            return most, answers.count({"return": {}})

    most, answered = asyncio.run(scenario())
    assert most <= REQUESTS_MAX
    assert answered == count


@pytest.mark.parametrize("verb", ["exec-oob", "execute"])
def test_a_client_that_asks_and_never_reads_is_not_read_any_more(tmp_path: Path, verb: str) -> None:
    async def scenario() -> bool:
        path = tmp_path / "qmp"
        async with serving(path) as server, client(path, oob=True) as one:
            one.writer.transport.pause_reading()  # type: ignore[attr-defined]
            (session,) = server._sessions
            one.writer.write(json.dumps({verb: "large"}).encode() * 10_000)
            async with asyncio.timeout(60):
                while not session._room.locked() or not session._write_lock.locked():
                    await asyncio.sleep(0)
            for _ in range(1000):  # what could go on, would
                await asyncio.sleep(0)
            waiting = len(session._side) + session._requests.qsize()
            one.writer.transport.abort()
            return waiting <= REQUESTS_MAX and session._room.locked()

    assert asyncio.run(scenario())


def test_a_command_that_has_begun_ends_though_its_client_is_gone(tmp_path: Path) -> None:
    async def scenario() -> bool:
        gate = Gate()
        commands = registry()
        commands.add("gate", gate.pass_through)
        path = tmp_path / "qmp"
        async with serving(path, commands) as server:
            async with client(path) as one:
                one.writer.write(b'{"execute":"gate"}')
                async with asyncio.timeout(60):
                    await gate.begun.acquire()
                server.emit("STOP")  # closing with something unread resets the connection
                (task,) = server._sessions.values()
                one.writer.transport.abort()
                task.cancel()
            await asyncio.wait([task], timeout=60)
            assert not server._sessions
            gate.may_end.set()
            async with asyncio.timeout(60):
                await gate.ended.wait()
            return True

    assert asyncio.run(scenario())


def test_closing_waits_for_a_command_that_has_begun(tmp_path: Path) -> None:
    async def scenario() -> bool:
        gate = Gate()
        commands = registry()
        commands.add("gate", gate.pass_through)
        path = tmp_path / "qmp"
        async with serving(path, commands) as server, client(path) as one:
            one.writer.write(b'{"execute":"gate"}')
            async with asyncio.timeout(60):
                await gate.begun.acquire()
            closing = asyncio.ensure_future(server.close())
            (task,) = server._sessions.values()
            await asyncio.wait([task], timeout=60)
            assert not closing.done()
            gate.may_end.set()
            await closing
            return gate.ended.is_set()

    assert asyncio.run(scenario())


def test_closing_gives_up_a_command_that_never_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works_module, "COMMANDS_WAIT_S", 0.1)

    async def scenario() -> bool:
        gate = Gate()
        commands = registry()
        commands.add("gate", gate.pass_through)
        path = tmp_path / "qmp"
        async with serving(path, commands) as server, client(path) as one:
            one.writer.write(b'{"execute":"gate"}')
            async with asyncio.timeout(60):
                await gate.begun.acquire()
                await server.close()
            return gate.ended.is_set()

    assert asyncio.run(scenario()) is False


@pytest.mark.parametrize("leaves", [False, True])
def test_a_client_that_never_reads_does_not_hold_up_the_end(tmp_path: Path, leaves: bool) -> None:
    async def scenario() -> None:
        path = tmp_path / "qmp"
        async with serving(path) as server, client(path) as one:
            one.writer.transport.pause_reading()  # type: ignore[attr-defined]
            one.writer.write(json.dumps({"execute": "large"}).encode() * 100)
            (session,) = server._sessions
            async with asyncio.timeout(60):
                while not session._room.locked():
                    await asyncio.sleep(0.01)
                if leaves:
                    one.writer.write_eof()
                await server.close()
            one.writer.transport.abort()

    asyncio.run(scenario())


def test_a_client_that_reads_gets_all_that_waits_for_it_before_the_end(tmp_path: Path) -> None:
    count = 7

    async def scenario() -> int:
        path = tmp_path / "qmp"
        async with serving(path) as server, client(path) as one:
            (session,) = server._sessions
            one.writer.transport.pause_reading()  # type: ignore[attr-defined]
            one.writer.write(json.dumps({"execute": "large"}).encode() * count)
            async with asyncio.timeout(60):
                while not session._write_lock.locked():
                    await asyncio.sleep(0)
            closing = asyncio.ensure_future(server.close())
            one.writer.transport.resume_reading()  # type: ignore[attr-defined]
            everything = await one.reader.read()
            await closing
            return everything.count(b"return")

    assert asyncio.run(scenario()) == count


def test_a_client_that_leaves_without_reading_its_answers_frees_its_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "qmp"
        async with serving(path) as server:
            async with client(path) as one:
                one.writer.write(json.dumps({"execute": "large"}).encode() * 100)
                await one.line()
                (task,) = server._sessions.values()
                one.writer.transport.abort()
            await asyncio.wait([task], timeout=60)
            assert not server._sessions

    asyncio.run(scenario())


def test_the_port_that_was_chosen_for_a_monitor_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> Any:
        server = QmpServer(registry())
        with caplog.at_level("INFO", "ramferry.qmp"):
            await server.listen(Address("127.0.0.1", 0))
        (line,) = caplog.messages
        host, _, port = line.removeprefix("a monitor listens at tcp:").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        greeting = json.loads(await reader.readline())
        writer.close()
        await server.close()
        return greeting

    assert "QMP" in asyncio.run(scenario())
