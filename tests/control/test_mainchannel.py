"""The main channel on real sockets: who is talked to, who is refused, what strangers cost."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine import wire
from engine.control import framestream, mainchannel
from engine.control.mainchannel import (
    BUSY,
    STRANGERS_MAX,
    ConnectionLost,
    DestinationEnd,
    SourceEnd,
)
from engine.control.uri import Address
from engine.errors import PeerRefused, UsageError, WireError

MIB = 1024 * 1024
TCP = Address("127.0.0.1", 0)
HELLO = wire.Hello(
    wire.VERSION, bytes(16), 4096, [wire.BlockShape("ram", 4096, 4096)], 2, "ram", True
)


def frame(message: wire.Message) -> bytes:
    data = wire.encode(message)
    return wire.FRAME.pack(len(data)) + data


@contextlib.asynccontextmanager
async def listening(address: Address = TCP) -> AsyncIterator[DestinationEnd[wire.Hello]]:
    """A destination that accepts."""
    destination = DestinationEnd(address, wire.Hello)
    try:
        async with asyncio.timeout(60):
            yield destination
    finally:
        destination.close()


@contextlib.asynccontextmanager
async def source_of(
    destination: DestinationEnd[wire.Hello], hello: wire.Hello = HELLO
) -> AsyncIterator[SourceEnd]:
    """A source that has said Hello."""
    source = SourceEnd(destination.address)
    try:
        await source.connect()
        await source.send(hello)
        yield source
    finally:
        source.close()


class Stranger:
    """A peer that writes bytes and reads frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answers(self) -> list[wire.ToSource]:
        """Everything that it is told before the connection ends."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while piece := await self.reader.read(MIB):
                data += piece
        decoder: wire.Decoder[wire.ToSource] = wire.Decoder(wire.ToSource, MIB, "test")
        messages = []
        while data:
            end = 4 + int.from_bytes(data[:4], "big")
            messages.append(decoder.decode(data[4:end]))
            data = data[end:]
        return messages


@contextlib.asynccontextmanager
async def stranger_at(destination: DestinationEnd[wire.Hello]) -> AsyncIterator[Stranger]:
    address = destination.address
    if address.path:
        reader, writer = await asyncio.open_unix_connection(address.path)
    else:
        reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield Stranger(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture(params=["tcp", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    return TCP if request.param == "tcp" else Address(path=str(tmp_path / "m"))


# -- the conversation ----------------------------------------------------------------------------


def test_a_conversation_goes_both_ways_in_order(address: Address) -> None:
    state = wire.DeviceState(bytes(wire.STATE_BYTES_MAX))

    async def scenario() -> None:
        async with listening(address) as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with source_of(destination) as source:
                assert await accepting == HELLO
                for message in (state, wire.Arm(3, True)):
                    await source.send(message)
                    assert await destination.receive() == message
                for index in range(5):
                    await destination.send(wire.Reopened(index, 1, "x"))
                for index in range(5):
                    assert await source.receive() == wire.Reopened(index, 1, "x")
                assert source.sent_bytes == sum(
                    len(wire.encode(message)) for message in (HELLO, state, wire.Arm(3, True))
                )

    asyncio.run(scenario())


def test_many_messages_of_many_tasks_do_not_mix(address: Address) -> None:
    async def scenario() -> None:
        async with listening(address) as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with source_of(destination) as source:
                await accepting
                told = [wire.ChannelBroken(i, 1, chr(97 + i % 26) * (i * 20)) for i in range(600)]
                telling = [asyncio.ensure_future(destination.send(message)) for message in told]
                assert [await source.receive() for _ in told] == told
                await asyncio.gather(*telling)

    asyncio.run(scenario())


def test_messages_that_come_in_one_segment_are_all_received() -> None:
    async def scenario() -> None:
        async with listening() as destination, stranger_at(destination) as peer:
            peer.writer.write(frame(HELLO) + frame(wire.Arm(1, True)) + frame(wire.Abort("x")))
            assert await destination.accept() == HELLO
            assert await destination.receive() == wire.Arm(1, True)
            assert await destination.receive() == wire.Abort("x")

    asyncio.run(scenario())


def test_a_frame_too_long_for_a_stranger_may_follow_the_hello_at_once() -> None:
    state = wire.DeviceState(bytes(2 * wire.HELLO_BYTES_MAX))

    async def scenario() -> None:
        async with listening() as destination, stranger_at(destination) as peer:
            peer.writer.write(frame(HELLO) + frame(state))
            await destination.accept()
            assert await destination.receive() == state

    asyncio.run(scenario())


def test_a_cancelled_receive_loses_no_message() -> None:
    async def scenario() -> None:
        async with listening() as destination, stranger_at(destination) as peer:
            peer.writer.write(frame(HELLO))
            await destination.accept()
            data = frame(wire.Arm(1, True))
            for cut in range(len(data)):
                receiving = asyncio.ensure_future(destination.receive())
                peer.writer.write(data[:cut])
                await asyncio.sleep(0)
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)
                peer.writer.write(data[cut:])
                assert await destination.receive() == wire.Arm(1, True)

    asyncio.run(scenario())


def test_a_cancelled_accept_loses_no_hello() -> None:
    async def scenario() -> None:
        async with listening() as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with source_of(destination), stranger_at(destination) as late:
                late.writer.write(frame(HELLO))
                assert await late.answers() == [wire.Refused(BUSY)]  # so the source's was taken
                accepting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await accepting
                assert accepting.cancelled() or accepting.result() == HELLO
                if accepting.cancelled():
                    assert await destination.accept() == HELLO

    asyncio.run(scenario())


def test_an_end_is_told_after_the_last_message(address: Address) -> None:
    async def scenario() -> None:
        async with listening(address) as destination:
            async with source_of(destination) as source:
                await destination.accept()
                await source.say_last(wire.Abort("cancelled"))
            assert await destination.receive() == wire.Abort("cancelled")
            with pytest.raises(ConnectionLost, match="the connection to the source is lost"):
                await destination.receive()
            with pytest.raises(ConnectionLost):
                await destination.send(wire.Armed())

    asyncio.run(scenario())


def test_a_last_word_reaches_a_source_that_has_said_more_than_was_read() -> None:
    async def scenario() -> list[wire.ToSource]:
        async with listening() as destination, stranger_at(destination) as peer:
            peer.writer.write(frame(HELLO))
            await destination.accept()
            peer.writer.write(bytes(MIB))
            with pytest.raises(WireError, match="frame of 0 bytes"):
                await destination.receive()
            await destination.send(wire.Failed("bad bytes"))
            destination.close()
            return await peer.answers()

    assert asyncio.run(scenario()) == [wire.Failed("bad bytes")]


def test_nobody_listening_is_told_in_the_words_of_the_system(tmp_path: Path) -> None:
    async def reason(address: Address) -> str:
        with pytest.raises(PeerRefused) as refused:
            await SourceEnd(address).connect()
        return str(refused.value)

    path = tmp_path / "none"
    assert asyncio.run(reason(Address("127.0.0.1", 1))) == (
        "Failed to connect to '127.0.0.1:1': Connection refused"
    )
    assert asyncio.run(reason(Address(path=str(path)))) == (
        f"Failed to connect to '{path}': No such file or directory"
    )


# -- who is talked to ----------------------------------------------------------------------------


def test_a_second_source_is_refused_while_the_first_is_served(address: Address) -> None:
    async def scenario() -> None:
        async with listening(address) as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with source_of(destination) as first:
                await accepting
                async with source_of(destination) as second:
                    assert await second.receive() == wire.Refused(BUSY)
                    with pytest.raises(ConnectionLost):
                        await second.receive()
                await first.send(wire.Arm(1, True))
                assert await destination.receive() == wire.Arm(1, True)

    asyncio.run(scenario())


def test_who_comes_when_nobody_is_listened_for_finds_nobody_and_the_first_stays(
    address: Address,
) -> None:
    async def scenario() -> None:
        async with listening(address) as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with source_of(destination) as first:
                await accepting
                destination.stop_listening()
                with pytest.raises(PeerRefused, match="Failed to connect"):
                    await SourceEnd(destination.address).connect()
                await first.send(wire.Arm(1, True))
                assert await destination.receive() == wire.Arm(1, True)
                await destination.send(wire.Armed())
                assert await first.receive() == wire.Armed()

    asyncio.run(scenario())


def test_after_a_source_that_does_not_fit_the_next_one_is_accepted(address: Address) -> None:
    async def scenario() -> None:
        async with listening(address) as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with source_of(destination, replace_hello(guest_kind="else")) as misfit:
                assert (await accepting).guest_kind == "else"
                await destination.send(wire.Refused("not that kind"))
                accepting = asyncio.ensure_future(destination.accept())
                assert await misfit.receive() == wire.Refused("not that kind")
                with pytest.raises(ConnectionLost):
                    await misfit.receive()
                async with source_of(destination):
                    assert await accepting == HELLO

    asyncio.run(scenario())


def replace_hello(guest_kind: str) -> wire.Hello:
    return wire.Hello(
        HELLO.version, HELLO.session, 4096, HELLO.blocks, HELLO.channels, guest_kind, True
    )


WRONG = [
    pytest.param(frame(wire.Arm(1, True)), "main channel: ", id="another-message"),
    pytest.param(frame(wire.Armed()), "main channel: ", id="another-direction"),
    pytest.param(b"\0\0\0\x01\xc1", "main channel: ", id="no-msgpack"),
    pytest.param(bytes(4), "frame of 0 bytes, 1 to ", id="empty"),
    pytest.param(wire.FRAME.pack(wire.HELLO_BYTES_MAX + 1), "are allowed", id="too-long"),
    pytest.param(wire.FRAME.pack(wire.MAIN_BYTES_MAX), "are allowed", id="as-long-as-for-a-peer"),
    pytest.param(b"GET / HTTP/1.1\r\n\r\n", "are allowed", id="http"),
    pytest.param(b"\xff\0\0\0\0\0\0\0\x01\x7f" + bytes(54), "are allowed", id="zeromq"),
]


@pytest.mark.parametrize(("data", "says"), WRONG)
def test_a_stranger_is_told_what_is_wrong_and_closed(data: bytes, says: str) -> None:
    async def scenario() -> None:
        async with listening() as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with stranger_at(destination) as stranger:
                stranger.writer.write(data)
                (answer,) = await stranger.answers()
                assert isinstance(answer, wire.Refused)
                assert says in answer.reason
            async with source_of(destination):
                assert await accepting == HELLO

    asyncio.run(scenario())


# -- what strangers cost -------------------------------------------------------------------------


def test_a_stranger_that_says_nothing_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with listening() as destination:
            accepting = asyncio.ensure_future(destination.accept())
            with monkeypatch.context() as patched:
                patched.setattr(mainchannel, "HELLO_WAIT_S", 0.02)
                async with stranger_at(destination) as silent, stranger_at(destination) as halting:
                    halting.writer.write(frame(HELLO)[:-1])
                    assert await silent.answers() == []
                    assert await halting.answers() == []
            async with source_of(destination):
                assert await accepting == HELLO

    asyncio.run(scenario())


def test_the_oldest_of_too_many_strangers_gives_way_to_the_source(address: Address) -> None:
    async def scenario() -> None:
        async with listening(address) as destination, contextlib.AsyncExitStack() as strangers:
            accepting = asyncio.ensure_future(destination.accept())
            silent = [
                await strangers.enter_async_context(stranger_at(destination))
                for _ in range(STRANGERS_MAX + 3)
            ]
            for stranger in silent[:3]:
                assert await stranger.answers() == []
            async with source_of(destination):
                assert await accepting == HELLO
            assert await silent[3].answers() == []  # it gave way to the source
            for stranger in silent[4:]:
                assert not stranger.reader.at_eof()

    asyncio.run(scenario())


def test_a_stranger_that_never_ends_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framestream, "LINGER_S", 0.3)
    piece = frame(wire.Arm(1, True)) * 5_000

    async def pour(stranger: Stranger) -> int:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not stranger.writer.is_closing():
                stranger.writer.write(piece)
                await stranger.writer.drain()
                sent += len(piece)
        return sent

    async def scenario() -> int:
        async with listening() as destination:
            accepting = asyncio.ensure_future(destination.accept())
            async with stranger_at(destination) as stranger:
                sent = await pour(stranger)
            async with source_of(destination):
                assert await accepting == HELLO
            return sent

    tracemalloc.start()
    try:
        sent = asyncio.run(scenario())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent > 0
    assert peak < 4 * MIB


def test_a_source_that_never_ends_is_not_read_further_than_its_messages_are_taken() -> None:
    async def scenario() -> None:
        async with listening() as destination, stranger_at(destination) as peer:
            peer.writer.write(frame(HELLO))
            await destination.accept()
            peer.writer.write(frame(wire.Arm(1, True)) * 300_000)  # 10 MiB
            for _ in range(10_000):
                assert await destination.receive() == wire.Arm(1, True)
            assert peer.writer.transport.get_write_buffer_size() > 0  # the rest waits over there
            peer.writer.transport.abort()
            with contextlib.suppress(ConnectionLost):
                while await destination.receive():
                    pass

    asyncio.run(scenario())


# -- where it listens ----------------------------------------------------------------------------


def test_a_file_at_the_path_survives_and_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")

    with pytest.raises(UsageError) as refused:
        DestinationEnd(Address(path=str(path)), wire.Hello)

    assert str(refused.value) == f"'{path}' exists and is not a socket; choose another path"
    assert path.read_text() == "precious"


def test_the_path_of_a_live_destination_is_not_stolen(tmp_path: Path) -> None:
    async def scenario() -> None:
        address = Address(path=str(tmp_path / "m"))
        async with listening(address) as destination:
            with pytest.raises(UsageError, match="another process listens at"):
                DestinationEnd(address, wire.Hello)
            accepting = asyncio.ensure_future(destination.accept())
            async with source_of(destination):
                assert await accepting == HELLO

    asyncio.run(scenario())


def test_a_dead_socket_is_replaced_and_the_new_one_is_private_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def scenario() -> int:
        async with listening(Address(path=str(path))):
            return stat.S_IMODE(path.stat().st_mode)

    assert asyncio.run(scenario()) == 0o600
    assert not path.exists()


def test_the_address_says_the_port_that_was_chosen() -> None:
    async def scenario() -> Address:
        async with listening() as destination:
            return destination.address

    address = asyncio.run(scenario())
    assert address.port > 0
    assert replace(address, port=0) == TCP


def test_a_name_is_told_as_the_address_that_it_has() -> None:
    """As QEMU does: the source may know the name otherwise, or not at all."""

    async def scenario() -> tuple[Address, Address]:
        named = DestinationEnd(Address("localhost"), wire.Hello)
        everywhere = DestinationEnd(Address(), wire.Hello)
        try:
            return named.address, everywhere.address
        finally:
            for one in (named, everywhere):
                one.close()

    named, everywhere = asyncio.run(scenario())
    assert named.host in ("127.0.0.1", "::1")
    assert everywhere.host == ""


def test_a_port_in_use_is_told_in_the_words_of_the_system() -> None:
    async def scenario() -> OSError:
        async with listening() as destination:
            with pytest.raises(OSError, match="in use") as refused:
                DestinationEnd(destination.address, wire.Hello)
            return refused.value

    assert asyncio.run(scenario()).strerror == "Address already in use"


def test_who_comes_for_something_else_is_told_so() -> None:
    async def scenario() -> tuple[wire.ToSource, wire.ToSource]:
        resume = wire.Resume(wire.VERSION, bytes(16), HELLO.blocks, 1, ())
        async with listening() as destination:
            first = asyncio.ensure_future(destination.accept())
            await asyncio.sleep(0)
            wrong, right = SourceEnd(destination.address), SourceEnd(destination.address)
            await wrong.connect()
            await wrong.send(resume)
            refused = await wrong.receive()
            wrong.close()
            await right.connect()
            await right.send(HELLO)
            await first
            await destination.send(wire.Armed())
            answer = await right.receive()
            right.close()
            return refused, answer

    refused, answer = asyncio.run(scenario())
    assert refused == wire.Refused("a postcopy that is resumed, where none is paused")
    assert answer == wire.Armed()
