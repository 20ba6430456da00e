"""Ten thousand wrong streams into a QMP server on a real socket: it answers, and does not grow."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any, Final

import pytest

from engine.control.qmp.connection import READ_BYTES
from engine.control.qmp.events import EVENTS_MAX
from engine.control.qmp.framing import TOKENS_MAX, VALUE_BYTES_MAX, JsonStream
from engine.control.qmp.registry import Arguments, CommandRegistry
from engine.control.qmp.server import CLIENTS_MAX, REQUESTS_MAX, QmpServer
from engine.control.uri import Address
from tests.support import open_descriptors

STREAMS_COUNT: Final = 10_000
STREAMS_PER_CLIENT: Final = 50
SEED: Final = 20
WAIT_S: Final = 60.0
PROBE: Final = b'\xff\n{"execute":"echo","arguments":{"value":"probe"},"id":"probe"}'
ANSWERED: Final = {"return": {"value": "probe"}, "id": "probe"}

CORPUS: Final = (
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}',
    b'{"execute":"echo","arguments":{"value":"x","count":2,"names":["a"]},"id":{"a":[null,1.5]}}',
    b"{'exec-oob':'echo','arguments':{'value':'\\ud83d\\ude00'},'id':'\xc3\xa9'}",
    b'{"execute":"later","id":-18446744073709551616}\r\n{"execute":"fail"}',
    b'{"execute":"tell","id":[[[]]]}{"execute":"nobody-has-this"}',
    b'[{"execute":1}] "text" -0.5e-3 true null {"return":{}}',
)
PIECES: Final = (
    *(bytes([byte]) for byte in range(256)),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b",", b":", b"0", b"-", b"e", b".") * 8,
    *(b"\\u", b"\\ud800", b"\xc0\x80", b"\xed\xa0\x80", b"null", b'"id":', b"execute") * 4,
    *(b"{" * 300, b"[" * 1100, b'{"a":' * 200, b"9" * 400, b"x" * 3000, b" " * 5000),
)


class Echo(Arguments, frozen=True):
    value: str
    count: int = 1
    names: list[str] | None = None


class Commands:
    """Some of each kind."""

    def __init__(self) -> None:
        self.server: QmpServer

    async def echo(self, arguments: Echo) -> object:
        return {"value": arguments.value}

    async def later(self, _: object) -> None:
        await asyncio.sleep(0)

    async def tell(self, _: object) -> None:
        self.server.emit("STOP", {"half": 0.5})

    async def fail(self, _: object) -> None:
        raise KeyError("a bug")

    def registry(self) -> CommandRegistry:
        commands = CommandRegistry()
        commands.add("echo", self.echo, Echo, oob=True)
        commands.add("later", self.later, is_asynchronous=True, is_cancellable=True)
        commands.add("tell", self.tell)
        commands.add("fail", self.fail)
        return commands


def mutated(luck: random.Random) -> bytes:
    """Something near to a few requests, or nothing like them."""
    if luck.random() < 0.05:
        return luck.randbytes(luck.randint(1, 200))
    stream = bytearray(b"".join(luck.choices(CORPUS, k=luck.randint(1, 3))))
    for _ in range(luck.randint(0, 6)):
        position = luck.randrange(len(stream) + 1)
        taken = luck.choice((0, 0, 1, 2, 10, 50))
        stream[position : position + taken] = luck.choice(PIECES)
    return bytes(stream)


class Client:
    """Sends streams in pieces of any size, and takes exactly the answers that they must have."""

    def __init__(self, luck: random.Random, path: Path) -> None:
        self._luck, self._path = luck, path

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        assert "QMP" in await self._message()
        if self._luck.random() < 0.9:
            self._writer.write(CORPUS[0])
            assert await self._message() == {"return": {}, "id": 1}
        else:
            self._writer.write(b'{"execute":"qmp_capabilities"}')
            assert await self._message() == {"return": {}}
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()

    async def _message(self) -> Any:
        async with asyncio.timeout(WAIT_S):
            return json.loads(await self._reader.readline())

    async def try_stream(self, stream: bytes) -> None:
        """:raise AssertionError: an answer is missing, wrong or one too many."""
        whole = stream + PROBE
        position = 0
        while position < len(whole):
            size = self._luck.choice((1, 10, 1000, len(whole)))
            self._writer.write(whole[position : position + size])
            position += size
        expected_count = len(list(JsonStream().feed(whole)))
        answers: list[Any] = []
        while len(answers) < expected_count:
            message = await self._message()
            if "event" not in message:
                answers.append(message)
        assert ANSWERED in answers[-REQUESTS_MAX:], stream  # asynchronous ones may end after it
        assert all(is_answer(answer) for answer in answers), (stream, answers)

    async def leave_with(self, stream: bytes) -> None:
        """Be gone in the middle of it."""
        self._writer.write(stream[: self._luck.randint(0, len(stream))])


def is_answer(message: Any) -> bool:
    match message:
        case {"return": _}:
            return set(message) <= {"return", "id"}
        case {"error": {"class": "GenericError" | "CommandNotFound", "desc": str()}}:
            return set(message) <= {"error", "id"} and len(message["error"]) == 2
    return False


def check_bounds(server: QmpServer) -> None:
    assert len(server._sessions) <= CLIENTS_MAX
    for session in server._sessions:
        assert session._requests.qsize() + len(session._side) <= REQUESTS_MAX
        assert len(session._events) <= EVENTS_MAX


def test_wrong_streams_are_answered_one_by_one_and_leave_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "ramferry.qmp")  # the bug of `fail` is on purpose
    luck = random.Random(SEED)

    async def scenario() -> tuple[set[str], set[str]]:
        commands = Commands()
        commands.server = server = QmpServer(commands.registry())
        await server.listen(Address(path=str(tmp_path / "qmp")))
        before, tasks = open_descriptors(), asyncio.all_tasks()
        for _ in range(STREAMS_COUNT // STREAMS_PER_CLIENT):
            async with Client(luck, tmp_path / "qmp") as one:
                for _ in range(STREAMS_PER_CLIENT):
                    await one.try_stream(mutated(luck))
                    check_bounds(server)
                await one.leave_with(mutated(luck))
        async with asyncio.timeout(WAIT_S):
            while server._sessions or asyncio.all_tasks() != tasks:
                await asyncio.sleep(0)
        after = open_descriptors()
        await server.close()
        return before, after

    before, after = asyncio.run(scenario())
    assert after <= before


def largest(data: bytes) -> tuple[int, int]:
    """Most bytes and most tokens that the stream held at any time."""
    stream = JsonStream()
    held_bytes = held_tokens = 0
    for position in range(0, len(data), READ_BYTES):
        for _ in stream.feed(data[position : position + READ_BYTES]):
            pass
        held_bytes = max(held_bytes, stream._lexer.held_bytes + stream._value.tokens_bytes)
        held_tokens = max(held_tokens, stream._value.tokens_count)
    return held_bytes, held_tokens


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'{"a":"' + b"x" * 8_000_000, id="string"),
        pytest.param(b"[" + b"9" * 8_000_000, id="number"),
        pytest.param(b"[" + b"a" * 8_000_000, id="word"),
        pytest.param(b" " * 8_000_000, id="spaces"),
        pytest.param(b"@" * 8_000_000, id="mistake"),
        pytest.param(b"[" + b"[]," * 200_000, id="elements"),
        pytest.param(b"[" * 300_000, id="depth"),
        pytest.param(b'[{"a":"' + b"\\u0041" * 300_000, id="escapes"),
    ],
)
def test_whatever_never_ends_is_held_within_the_bounds(data: bytes) -> None:
    held_bytes, held_tokens = largest(data)

    assert held_bytes <= 2 * VALUE_BYTES_MAX
    assert held_tokens <= TOKENS_MAX
