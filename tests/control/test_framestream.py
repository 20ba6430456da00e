"""One connection's frames: cut anywhere, bounded both ways, never lost and never mixed."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.control import framestream
from engine.control.framestream import READ_AHEAD_BYTES, SENDS_MAX, ConnectionLost, FrameStream
from engine.errors import WireError

BYTES_MAX = 100_000


class FakeTransport(asyncio.Transport):
    """A connection whose other side the test plays; `is_slow` is a peer that does not read."""

    def __init__(self, stream: FrameStream) -> None:
        super().__init__()
        self._stream = stream
        self.written: list[bytes] = []
        self.is_reading_now = True
        self.is_slow = False
        self.is_ended = False
        stream.connection_made(self)

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))
        if self.is_slow:
            self._stream.pause_writing()

    def take(self) -> None:
        """The peer reads what was written."""
        self.is_slow = False
        self._stream.resume_writing()

    def pause_reading(self) -> None:
        self.is_reading_now = False

    def resume_reading(self) -> None:
        self.is_reading_now = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == framestream.WRITE_BYTES

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return NoSocket()

    def write_eof(self) -> None:
        self.written.append(b"")

    def abort(self) -> None:
        if not self.is_ended:
            self.is_ended = True
            self._stream.connection_lost(None)


class NoSocket:
    family = socket.AF_UNIX


def connected() -> tuple[FrameStream, FakeTransport]:
    stream = FrameStream("peer")
    return stream, FakeTransport(stream)


def frame(data: bytes) -> bytes:
    return wire.FRAME.pack(len(data)) + data


async def soon(stream: FrameStream, bytes_max: int = BYTES_MAX) -> bytes:
    async with asyncio.timeout(60):
        return await stream.receive(bytes_max)


def test_frames_that_are_cut_at_any_byte_are_whole_again() -> None:
    data = frame(b"hello") + frame(b"world!")

    async def scenario() -> None:
        for cut in range(len(data) + 1):
            stream, _ = connected()
            receiving = asyncio.ensure_future(soon(stream))
            await asyncio.sleep(0)
            stream.data_received(data[:cut])
            await asyncio.sleep(0)
            stream.data_received(data[cut:])
            assert [await receiving, await soon(stream)] == [b"hello", b"world!"]

    asyncio.run(scenario())


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.data())
def test_any_frames_in_any_pieces_come_out_as_they_went_in(
    messages: list[bytes], draw: st.DataObject
) -> None:
    data = b"".join(frame(message) for message in messages)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=20)))

    async def scenario() -> list[bytes]:
        stream, _ = connected()
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            stream.data_received(data[start:end])
        return [await soon(stream) for _ in messages]

    assert asyncio.run(scenario()) == messages


@pytest.mark.parametrize("size", [0, BYTES_MAX + 1, 2**32 - 1])
def test_a_forbidden_length_is_refused_before_its_body_comes(size: int) -> None:
    async def scenario() -> None:
        stream, _ = connected()
        stream.data_received(wire.FRAME.pack(size))
        with pytest.raises(WireError, match=f"frame of {size} bytes, 1 to {BYTES_MAX} are allowed"):
            await soon(stream)

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [1, BYTES_MAX])
def test_both_ends_of_the_allowed_lengths_are_allowed(size: int) -> None:
    async def scenario() -> bytes:
        stream, _ = connected()
        stream.data_received(frame(bytes(size)))
        return await soon(stream)

    assert asyncio.run(scenario()) == bytes(size)


def test_nothing_more_is_read_from_a_peer_whose_frames_nobody_takes() -> None:
    async def scenario() -> None:
        stream, transport = connected()
        taken = 0
        while transport.is_reading_now:
            stream.data_received(frame(bytes(1000)))
            taken += 1004
        assert taken <= READ_AHEAD_BYTES + 1004
        receiving = asyncio.ensure_future(soon(stream, 10))
        with pytest.raises(WireError):
            await receiving
        assert not transport.is_reading_now

    asyncio.run(scenario())


def test_reading_goes_on_until_the_frame_that_is_wanted_is_whole() -> None:
    async def scenario() -> bytes:
        stream, transport = connected()
        stream.data_received(frame(bytes(BYTES_MAX))[: READ_AHEAD_BYTES + 1])
        assert not transport.is_reading_now
        receiving = asyncio.ensure_future(soon(stream))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert transport.is_reading_now
        stream.data_received(bytes(BYTES_MAX + 4 - READ_AHEAD_BYTES - 1))
        assert not transport.is_reading_now
        return await receiving

    assert asyncio.run(scenario()) == bytes(BYTES_MAX)


@pytest.mark.parametrize("cut", [0, 2, 7, 9])
def test_a_cancelled_receive_loses_nothing(cut: int) -> None:
    data = frame(b"hello")

    async def scenario() -> bytes:
        stream, _ = connected()
        receiving = asyncio.ensure_future(stream.receive(BYTES_MAX))
        await asyncio.sleep(0)
        stream.data_received(data[:cut])
        receiving.cancel()  # a whole frame is there in the last case, and the wait was told so
        with pytest.raises(asyncio.CancelledError):
            await receiving
        stream.data_received(data[cut:])
        return await soon(stream)

    assert asyncio.run(scenario()) == b"hello"


def test_what_has_come_is_received_before_the_end_is_told() -> None:
    async def scenario() -> None:
        stream, _ = connected()
        stream.data_received(frame(b"last word") + b"\0\0")
        stream.connection_lost(ConnectionResetError())
        assert await soon(stream) == b"last word"
        with pytest.raises(ConnectionLost, match="the connection to the peer is lost"):
            await soon(stream)
        with pytest.raises(ConnectionLost):
            await stream.send(b"x")

    asyncio.run(scenario())


def test_many_sends_to_a_slow_peer_go_out_in_turn_and_whole() -> None:
    messages = [bytes([index % 256]) * (index + 1) for index in range(500)]

    async def scenario() -> list[bytes]:
        stream, transport = connected()
        transport.is_slow = True
        sending = [asyncio.ensure_future(stream.send(message)) for message in messages]
        for _ in messages:
            await asyncio.sleep(0)
        assert len(transport.written) == 1  # the others wait: nothing else is buffered
        sending[7].cancel()
        transport.take()
        await asyncio.gather(*sending, return_exceptions=True)
        return transport.written

    wanted = [frame(message) for message in messages]
    assert asyncio.run(scenario()) == wanted[:7] + wanted[8:]


def test_a_peer_for_which_too_many_messages_wait_is_given_up() -> None:
    async def scenario() -> list[Any]:
        stream, transport = connected()
        transport.is_slow = True
        await stream.send(b"first")
        sending = [asyncio.ensure_future(stream.send(b"x")) for _ in range(SENDS_MAX)]
        await asyncio.sleep(0)
        assert not transport.is_ended
        with pytest.raises(ConnectionLost, match="1024 messages wait to be read there"):
            await stream.send(b"one too many")
        assert transport.is_ended
        return await asyncio.gather(*sending, return_exceptions=True)

    assert all(isinstance(outcome, ConnectionLost) for outcome in asyncio.run(scenario()))


def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framestream, "SEND_WAIT_S", 0.01)

    async def scenario() -> None:
        stream, transport = connected()
        transport.is_slow = True
        await stream.send(b"first")
        with pytest.raises(ConnectionLost, match="nothing is read there"):
            await stream.send(b"second")
        assert transport.is_ended

    asyncio.run(scenario())
