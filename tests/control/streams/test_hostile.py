"""A stream that was cut or changed anywhere: the destination fails, and nothing runs there."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from pathlib import Path
from typing import Final

import pytest

import engine
from engine import wire
from engine.control.streams import vsock
from engine.control.streams.destination import StreamDestination
from engine.control.streams.opening import Sources
from engine.control.uri import VsockAddress
from tests.control.streams.rig import check_nothing_came, chunks_of, until_status

pytestmark = pytest.mark.process

GUEST: Final = "ram:size=2M"
ONE: Final = ["multifd-channels=1"]  #: no more workers wait than are wanted
#: The chunks of a stream, by what they are: the guest stood, so there are two rounds.
NAMES: Final = ("hello", "open", "pages", "channel-end", "device-state", "arm", "take")


def content() -> bytes:
    """Of the guest's RAM: half of it are zero pages."""
    return random.Random(1).randbytes(1 << 20) + bytes(1 << 20)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole stream of a guest that stood."""
    file = tmp_path_factory.mktemp("stream") / "f"
    ram = file.with_name("ram")
    ram.write_bytes(content())

    async def scenario() -> None:
        async with engine.Control.start(f"{GUEST},path={ram}", settings=ONE) as source:
            await source.execute("stop")
            await (await source.migrate(f"file:{file}")).result()

    asyncio.run(scenario())
    return file.read_bytes()


def place_of(stream: bytes, name: str) -> tuple[int, int, int]:
    """Where a chunk begins, where its body does (or would), and where it ends."""
    chunks = chunks_of(stream)
    index = {"hello": 0, "open": 1, "pages": 2}.get(name, NAMES.index(name) - len(NAMES))
    return chunks[index]


async def load(file: Path) -> str:
    """What a destination says of it."""
    async with engine.Control.start(GUEST, "defer", ONE) as destination:
        await destination.execute("migrate-incoming", uri=f"file:{file}", exit_on_error=False)
        return await check_nothing_came(destination)


def test_the_stream_is_what_the_other_tests_take_it_for(stream: bytes, tmp_path: Path) -> None:
    file, ram = tmp_path / "f", tmp_path / "ram"
    file.write_bytes(stream + b"what follows is somebody else's")

    async def scenario() -> None:
        async with engine.Control.start(f"{GUEST},path={ram}", "defer", ONE) as destination:
            await destination.execute("migrate-incoming", uri=f"file:{file}")
            assert await until_status(destination, "completed", "failed") == "completed"
            assert ram.read_bytes() == content()

    asyncio.run(scenario())
    assert len(chunks_of(stream)) >= len(NAMES) + 2


@pytest.mark.parametrize("where", ["before", "in-length", "in-content"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_stream_starts_no_guest(name: str, where: str, stream: bytes, tmp_path: Path) -> None:
    begin, _, end = place_of(stream, name)
    cut = {"before": begin, "in-length": begin + 5, "in-content": end - 1}[where]
    file = tmp_path / "f"
    file.write_bytes(stream[:cut])

    assert "the stream ended" in asyncio.run(load(file))


@pytest.mark.parametrize("part", ["length", "head", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_bit_starts_no_guest(name: str, part: str, stream: bytes, tmp_path: Path) -> None:
    begin, _, end = place_of(stream, name)
    at = {"length": begin, "head": begin + 12, "last": end - 1}[part]
    file, changed = tmp_path / "f", bytearray(stream)
    changed[at] ^= 0x10
    file.write_bytes(changed)

    error = asyncio.run(load(file))
    assert error.startswith("load of migration failed: ")
    assert "\n" not in error


@pytest.mark.parametrize(
    "left_out", ["pages", "channel-end", "device-state", "arm"], ids=lambda name: f"no-{name}"
)
def test_a_stream_without_a_part_starts_no_guest(
    left_out: str, stream: bytes, tmp_path: Path
) -> None:
    begin, _, end = place_of(stream, left_out)
    file = tmp_path / "f"
    file.write_bytes(stream[:begin] + stream[end:])

    asyncio.run(load(file))


@pytest.mark.parametrize("twice", ["hello", "open", "pages"])
def test_a_stream_with_a_part_twice_starts_no_guest(
    twice: str, stream: bytes, tmp_path: Path
) -> None:
    begin, _, end = place_of(stream, twice)
    file = tmp_path / "f"
    file.write_bytes(stream[:end] + stream[begin:end] + stream[end:])

    asyncio.run(load(file))


# -- vsock, played over TCP: this host may have none --------------------------------------------


def test_a_listener_drops_strangers_and_waits_for_a_right_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    where = listener.getsockname()
    monkeypatch.setattr(vsock, "listen", lambda _address: listener)
    hello = wire.Hello(wire.VERSION, bytes(16), 4096, [], 1, "ram", True)

    async def scenario() -> None:
        destination = StreamDestination(VsockAddress("1", "2"), Sources())
        accepting = asyncio.create_task(destination.accept())
        for junk in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(64)):
            reader, writer = await asyncio.open_connection(*where)
            writer.write(junk)
            writer.write_eof()
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(reader.readexactly(1), 60)
            writer.close()
        reader, writer = await asyncio.open_connection(*where)
        writer.write(wire.chunk(wire.encode(wire.StreamHello(hello, True))))
        assert await asyncio.wait_for(accepting, 60) == hello
        await destination.send(wire.Failed("no"))
        ending = asyncio.create_task(destination.end(has_failed=True))
        answer = await asyncio.wait_for(reader.read(-1), 60)
        assert b"no" in answer
        writer.close()
        await writer.wait_closed()
        await ending
        await destination.end(has_failed=True)

    asyncio.run(scenario())


def test_a_stranger_that_says_nothing_keeps_no_source_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    monkeypatch.setattr(vsock, "listen", lambda _address: listener)
    monkeypatch.setattr("engine.control.streams.destination.HELLO_WAIT_S", 1.0)
    hello = wire.Hello(wire.VERSION, bytes(16), 4096, [], 1, "ram", True)

    async def scenario() -> None:
        destination = StreamDestination(VsockAddress("1", "2"), Sources())
        accepting = asyncio.create_task(destination.accept())
        with (
            socket.create_connection(listener.getsockname()),
            socket.create_connection(listener.getsockname()) as source,
        ):
            source.sendall(wire.chunk(wire.encode(wire.StreamHello(hello, False))))
            assert await asyncio.wait_for(accepting, 60) == hello
            await destination.end(has_failed=True)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("cid", "port", "says"), [("x", "1", "Failed to parse cid 'x'"), ("1", "y", "port 'y'")]
)
def test_numbers_of_vsock_are_read_when_it_connects(cid: str, port: str, says: str) -> None:
    async def scenario() -> str:
        async with engine.Control.start("ram:size=1M") as source:
            with pytest.raises(engine.MigrationFailed) as failed:
                await (await source.migrate(f"vsock:{cid}:{port}")).result()
            return str(failed.value)

    assert says in asyncio.run(scenario())


def test_a_reader_that_is_given_a_body_refuses_it(tmp_path: Path, stream: bytes) -> None:
    """A message of control's is a head alone."""
    begin, _, end = place_of(stream, "hello")
    head = stream[begin + wire.CHUNK.size : end]
    file = tmp_path / "f"
    file.write_bytes(wire.chunk(head, [b"x"]) + stream[end:])

    assert "chunk of" in asyncio.run(load(file))
