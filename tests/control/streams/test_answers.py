"""A stream with a return path whose far end is played here: who runs, whatever it says or not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

import engine
from engine import wire
from engine.control.framestream import ConnectionLost
from engine.control.streams.line import ChunkWriter
from tests.control.streams.rig import check_nothing_came, runs, until_status

pytestmark = pytest.mark.process

GUEST = "workload:size=1M"


@dataclass
class Played:
    """A destination that reads everything and answers what the test says."""

    source: engine.Control
    connection: socket.socket
    writer: ChunkWriter

    async def chunk(self) -> bytes:
        """The head of the next chunk; the body is read away."""
        loop = asyncio.get_running_loop()

        async def exactly(size: int) -> bytes:
            data = b""
            while len(data) < size:
                piece = await loop.sock_recv(self.connection, size - len(data))
                assert piece, "the source ended the stream"
                data += piece
            return data

        head, body, _ = wire.CHUNK.unpack(await exactly(wire.CHUNK.size))
        content = await exactly(head + body)
        return content[:head]


@contextlib.asynccontextmanager
async def played() -> AsyncIterator[Played]:
    async with engine.Control.start(f"{GUEST},rate=1M", settings=["return-path=on"]) as source:
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            await source.give("way", theirs.fileno())
            theirs.close()
            yield Played(source, ours, ChunkWriter(ours.fileno()))


async def messages_until(far: Played, kind: type[wire.Message], *, skew: int = 0) -> None:
    """Read packets and messages up to one of this kind; rounds are acknowledged as they end, with
    so many pages too many."""
    decoder: wire.Decoder[Any] = wire.Decoder(wire.StreamHello | wire.StreamMessage, 65536, "test")
    packets = pages = zeros = payload = 0
    async with asyncio.timeout(60):
        while True:
            head = await far.chunk()
            if head[:4] != wire.MAGIC:
                if isinstance(decoder.decode(head), kind):
                    return
                continue
            packet = wire.decode_packet(head)
            if packet.kind is wire.PacketKind.PAGES:
                packets, pages = packets + 1, pages + packet.pages
                zeros, payload = zeros + packet.zero_pages, payload + packet.payload_bytes
            elif packet.kind is wire.PacketKind.ROUND_END:
                counts = (packet.round_number, packets, pages + skew, zeros, payload)
                await far.writer.send(wire.RoundReceived(0, packet.incarnation, *counts))
                packets = pages = zeros = payload = 0


async def ended(migration: engine.Migration) -> Exception:
    with pytest.raises(engine.MigrationError) as failed:
        await asyncio.wait_for(migration.result(), 90)
    return failed.value


@pytest.mark.parametrize("last", ["nothing", "junk", "failed"])
def test_before_take_whatever_happens_the_guest_runs_on(last: str) -> None:
    async def scenario() -> str:
        async with played() as far:
            migration = await far.source.migrate("fd:way")
            await messages_until(far, wire.Arm)
            match last:
                case "junk":
                    far.connection.send(b"x" * 64)
                case "failed":
                    await far.writer.send(wire.Failed("no room"))
                case "nothing":
                    far.connection.shutdown(socket.SHUT_RDWR)
            failure = await ended(migration)
            await runs(far.source)
            assert isinstance(failure, engine.MigrationFailed)
            return str(failure)

    says = {"nothing": "stream", "junk": "the stream: chunk of", "failed": "no room"}
    assert says[last] in asyncio.run(scenario())


@pytest.mark.parametrize("times", [1, 2])
def test_armed_is_an_answer_to_arm_alone(times: int) -> None:
    """Who says so before it was asked, or twice, has promised nothing: the guest stays here."""

    async def scenario() -> str:
        async with played() as far:
            migration = await far.source.migrate("fd:way")
            await messages_until(far, wire.StreamHello if times == 1 else wire.Arm)
            for _ in range(times):
                await far.writer.send(wire.Armed())
            with contextlib.suppress(AssertionError):
                await messages_until(far, wire.Take)
            failure = await ended(migration)
            if times == 1:
                assert isinstance(failure, engine.MigrationFailed)
                await runs(far.source)
            return str(failure)

    assert "unexpected Armed" in asyncio.run(scenario())


@pytest.mark.parametrize("last", ["end", "junk"])
def test_after_take_without_an_answer_the_outcome_is_unknown(last: str) -> None:
    """It may run there: here it stands until its user says otherwise."""

    async def scenario() -> None:
        async with played() as far:
            migration = await far.source.migrate("fd:way")
            await messages_until(far, wire.Arm)
            await far.writer.send(wire.Armed())
            await messages_until(far, wire.Take)
            if last == "end":
                far.connection.shutdown(socket.SHUT_RDWR)
            else:
                far.connection.send(b"x" * 64)
            assert isinstance(await ended(migration), engine.OutcomeUnknown)
            assert (await far.source.execute("query-status"))["status"] == "paused"
            assert not (await far.source.query_guest())["running"]
            await far.source.execute("cont")
            await runs(far.source)

    asyncio.run(scenario())


def test_after_take_a_refusal_gives_the_guest_back() -> None:
    async def scenario() -> None:
        async with played() as far:
            migration = await far.source.migrate("fd:way")
            await messages_until(far, wire.Arm)
            await far.writer.send(wire.Armed())
            await messages_until(far, wire.Take)
            await far.writer.send(wire.Failed("it died"))
            assert isinstance(await ended(migration), engine.MigrationFailed)
            await runs(far.source)

    asyncio.run(scenario())


def test_nobody_takes_over_what_was_not_given() -> None:
    """Before `Take` the answer is a lie, or a mistake: the guest runs on."""

    async def scenario() -> str:
        async with played() as far:
            migration = await far.source.migrate("fd:way")
            await messages_until(far, wire.Arm)
            await far.writer.send(wire.TookOver())
            with contextlib.suppress(ConnectionLost):  # it may have heard enough
                await far.writer.send(wire.Armed())
            failure = await ended(migration)
            await runs(far.source)
            return str(failure)

    assert "unexpected TookOver" in asyncio.run(scenario())


def test_a_count_that_differs_ends_the_stream() -> None:
    async def scenario() -> str:
        async with played() as far:
            migration = await far.source.migrate("fd:way")
            with pytest.raises((AssertionError, ConnectionError)):
                await messages_until(far, wire.Take, skew=1)
            failure = await ended(migration)
            await runs(far.source)
            return str(failure)

    assert "the two ends counted a round differently" in asyncio.run(scenario())


@pytest.mark.parametrize("messages", [[wire.Take()], [wire.Arm(1, True)]], ids=["take", "arm"])
def test_a_source_that_skips_the_memory_starts_no_guest(messages: list[wire.Message]) -> None:
    async def scenario() -> str:
        async with engine.Control.start(GUEST, "defer") as destination:
            ours, theirs = socket.socketpair()
            with ours:
                await destination.give("way", theirs.fileno())
                theirs.close()
                uri = "fd:way"
                await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
                block = wire.BlockShape("ram", 1 << 20, 4096)
                hello = wire.Hello(wire.VERSION, b"s" * 16, 4096, [block], 1, "workload", True)
                ours.sendall(wire.chunk(wire.encode(wire.StreamHello(hello, False))))
                for kind, sequence in ((wire.PacketKind.OPEN, 1), (wire.PacketKind.CHANNEL_END, 2)):
                    packet = wire.Packet(kind, b"s" * 16, 1, 1, sequence)
                    ours.sendall(wire.chunk(packet.encode()))
                for message in messages:
                    ours.sendall(wire.chunk(wire.encode(message)))
                return await check_nothing_came(destination)

    error = asyncio.run(scenario())
    assert "promised" in error or "have not placed round 1" in error


def test_a_human_monitor_migrates_to_a_program() -> None:
    async def scenario() -> None:
        async with engine.Control.start(GUEST) as source:
            line = 'migrate -d "exec:cat >/dev/null"'
            printed = await source.execute("human-monitor-command", command_line=line)
            assert printed == ""
            assert await until_status(source, "completed", "failed") == "completed"

    asyncio.run(scenario())
