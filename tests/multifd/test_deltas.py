"""XBZRLE on a live channel: what a destination makes of the packets is the sender's RAM, always."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import _native, wire
from engine.compress.codecs import decoders
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.deltas import Deltas
from engine.multifd.progress import Progress
from tests.multifd.rig import SenderRig, memory, receiver, sender
from tests.multifd.test_receiver import opened, packet, pages, round_end

pytestmark = pytest.mark.process

PAGE_COUNT = 64
CACHE_BYTES = PAGE_COUNT * PAGE_SIZE

#: What a sender may keep of the pages that it sent.
any_memory = pytest.mark.parametrize(
    "how",
    [{"xbzrle_cache_bytes": CACHE_BYTES}, {"elide": "on"}, {"elide": "auto"}],
    ids=["xbzrle", "elide", "elide auto"],
)


class Destination:
    """RAM as the packets make it; counts pages by the kind of packet."""

    def __init__(self, page_count: int = PAGE_COUNT) -> None:
        self.page_count = page_count
        self.ram = memoryview(mmap.mmap(-1, page_count * PAGE_SIZE))
        self.placed = bytearray(page_count // 8)
        self.pages = dict.fromkeys(wire.PacketKind, 0)
        self._decoders = decoders()

    def take(self, header: wire.Packet, frames: bytes) -> None:
        self.pages[header.kind] += header.pages
        for first, count in _runs(header.zero_runs):
            self.ram[first * PAGE_SIZE : (first + count) * PAGE_SIZE] = bytes(count * PAGE_SIZE)
        sizes = header.frame_sizes()
        if header.codec is not wire.CodecId.RAW:
            plain = self._decoders[header.codec].decode(frames[: sizes[0]], header.plain_bytes)
            frames = plain + frames[sizes[0] :]
        runs = _runs(header.data_runs)
        if header.kind is wire.PacketKind.DELTAS:
            _native.delta_apply(
                self.ram, self.placed, frames, header.data_runs, len(runs), self.page_count
            )
            return
        for first, count in runs:
            end = count * PAGE_SIZE
            self.ram[first * PAGE_SIZE : first * PAGE_SIZE + end] = frames[:end]
            frames = frames[end:]


def _runs(table: bytes) -> list[tuple[int, int]]:
    return list(wire.RUN.iter_unpack(table))


async def round_of(rig: SenderRig, number: int, there: Destination) -> None:
    """Order a round and take all its packets."""
    rig.worker.order(wire.SendRound(number))
    while True:
        header, frames = await rig.packet()
        if header.kind is wire.PacketKind.OPEN:
            continue
        if header.kind is wire.PacketKind.ROUND_END:
            return
        there.take(header, frames)


def write(rig: SenderRig, page: int, offset: int, data: bytes) -> None:
    os.pwrite(rig.block.fd, data, page * PAGE_SIZE + offset)
    _native.bitmap_set_range(rig.dirty[0], page, 1)


def content(rig: SenderRig) -> bytes:
    return os.pread(rig.block.fd, rig.block.size, 0)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd", "zlib", "auto"])
@any_memory
def test_after_every_round_the_destination_has_the_senders_ram(
    codec: str, how: dict[str, Any]
) -> None:
    chance = random.Random(codec)

    async def scenario() -> dict[wire.PacketKind, int]:
        block, there = memory(PAGE_COUNT, chance.randbytes(PAGE_COUNT * PAGE_SIZE)), Destination()
        async with sender(block) as rig:
            rig.worker.order(wire.Compress(codec, **how))
            _native.bitmap_set_range(rig.dirty[0], 0, PAGE_COUNT)
            for number in range(1, 16):
                await round_of(rig, number, there)
                assert bytes(there.ram) == content(rig), f"round {number}"
                for _ in range(20):
                    page, kind = chance.randrange(PAGE_COUNT), chance.randrange(4)
                    data = [b"changed.", bytes(PAGE_SIZE), b"", chance.randbytes(PAGE_SIZE)][kind]
                    offset = chance.randrange(PAGE_SIZE - 8) if len(data) == 8 else 0
                    write(rig, page, offset, data)
        os.close(block.fd)
        return there.pages

    sent = asyncio.run(scenario())
    assert (sent[wire.PacketKind.DELTAS] > 10) is ("xbzrle_cache_bytes" in how)
    assert sent[wire.PacketKind.PAGES] > PAGE_COUNT


@any_memory
def test_a_page_that_is_dirty_and_unchanged_is_not_sent_again(how: dict[str, Any]) -> None:
    async def scenario() -> dict[wire.PacketKind, int]:
        block, there = memory(PAGE_COUNT, b"x" * PAGE_COUNT * PAGE_SIZE), Destination()
        async with sender(block) as rig:
            rig.worker.order(wire.Compress("none", **how))
            for number in (1, 2, 3, 4):
                _native.bitmap_set_range(rig.dirty[0], 0, PAGE_COUNT)
                await round_of(rig, number, there)
        os.close(block.fd)
        return there.pages

    sent = asyncio.run(scenario())
    assert sent[wire.PacketKind.PAGES] == 2 * PAGE_COUNT  # the first keeps none, the second all
    assert sent[wire.PacketKind.DELTAS] == 0


def test_the_first_round_fills_a_cache_that_holds_all_pages_and_no_other() -> None:
    """What is kept in the first round is not stale in the second, whatever size it has then."""
    all_pages, fewer = 512 * PAGE_SIZE, 256 * PAGE_SIZE

    def due(*sizes_and_rounds: tuple[int, int]) -> list[bool]:
        words = Progress.create()
        deltas = Deltas([(512, 512, 0, 1)], words)
        told = []
        for size, number in sizes_and_rounds:
            deltas.resize(size)
            told.append(deltas.are_due(number))
        words.close()
        return told

    assert due((all_pages, 1)) == [True]
    assert due((fewer, 1), (fewer, 2)) == [False, True]
    assert due((fewer, 1), (all_pages, 1), (fewer, 1)) == [False, True, True]
    assert due((0, 1), (0, 2), (fewer, 2)) == [False, False, True]


@any_memory
def test_a_new_incarnation_gets_whole_pages(how: dict[str, Any]) -> None:
    """What the old one was sent may never have arrived: the destination begins with noise here."""

    async def scenario() -> tuple[bytes, bytes, int]:
        block, there = memory(PAGE_COUNT, b"x" * PAGE_COUNT * PAGE_SIZE), Destination()
        async with sender(block) as rig:
            rig.worker.order(wire.Compress("none", **how))
            for number in (1, 2, 3):
                _native.bitmap_set_range(rig.dirty[0], 0, PAGE_COUNT)
                await round_of(rig, number, there)
            there = Destination()
            there.ram[:] = os.urandom(len(there.ram))
            rig.worker.order(wire.OpenChannel(rig.endpoint, 2))
            await rig.heard.next(wire.Opened, 2)
            _native.bitmap_set_range(rig.dirty[0], 0, PAGE_COUNT)
            await round_of(rig, 4, there)
            result = bytes(there.ram), content(rig), there.pages[wire.PacketKind.DELTAS]
        os.close(block.fd)
        return result

    ours, theirs, deltas = asyncio.run(scenario())
    assert ours == theirs
    assert deltas == 0


def test_a_cache_that_changes_its_size_or_goes_away_loses_nothing() -> None:
    chance = random.Random(7)

    async def scenario() -> None:
        block, there = memory(PAGE_COUNT, chance.randbytes(PAGE_COUNT * PAGE_SIZE)), Destination()
        async with sender(block) as rig:
            _native.bitmap_set_range(rig.dirty[0], 0, PAGE_COUNT)
            for number, pages_kept in enumerate([64, 64, 64, 1, 16, 0, 0, 64, 64, 8, 128, 64], 1):
                rig.worker.order(wire.Compress("lz4", xbzrle_cache_bytes=pages_kept * PAGE_SIZE))
                await round_of(rig, number, there)
                assert bytes(there.ram) == content(rig), f"round {number}"
                for page in range(PAGE_COUNT):
                    write(rig, page, chance.randrange(PAGE_SIZE - 8), b"changed.")
        os.close(block.fd)

    asyncio.run(scenario())


def deltas_packet(sequence: int, deltas: bytes, **fields: object) -> list[bytes]:
    merged: dict[str, object] = {
        "pages": 1, "payload_bytes": len(deltas), "encoded_runs": 1, "plain_bytes": len(deltas),
        "data_runs": wire.RUN.pack(0, 1), "round_number": 2,
    }  # fmt: skip
    head = packet(wire.PacketKind.DELTAS, sequence, **merged | fields)
    return [head.encode(), deltas]


def test_a_right_delta_changes_what_it_says() -> None:
    old = os.urandom(PAGE_SIZE)

    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            await socket.send_multipart(pages(2, 0, old))
            await socket.send(round_end(3, 1))
            delta = bytes([10, 3]) + b"new"  # ten bytes as they are, three new
            await socket.send_multipart(deltas_packet(4, b"\x05\x00" + delta))
            end = packet(wire.PacketKind.ROUND_END, 5, round_number=2, pages=1, payload_bytes=7)
            await socket.send(end.encode())
            await rig.heard.next(wire.RoundReceived, 2)
            return rig.ram()[:PAGE_SIZE]

    assert asyncio.run(scenario()) == old[:10] + b"new" + old[13:]


@pytest.mark.parametrize(
    ("deltas", "fields"),
    [
        (b"\x05\x00\x0a\x03ne", {}),  # longer than what there is
        (b"\x04\x00\x0a\x03ne", {}),  # cut
        (b"\x00\x00\x00", {}),  # an empty delta
        (b"\x05\x00\xff\x1f\x03new", {}),  # behind the page
        (b"\x05\x00\x0a\x03new!", {}),  # something behind it
        (b"\x05\x00\x0a\x03new", {"data_runs": wire.RUN.pack(64, 1)}),  # behind the block
        (b"\x05\x00\x0a\x03new", {"data_runs": wire.RUN.pack(0, 2), "pages": 2}),
    ],
)
def test_a_wrong_delta_costs_the_channel_and_changes_nothing(
    deltas: bytes, fields: dict[str, object]
) -> None:
    old = os.urandom(64 * PAGE_SIZE)

    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            await socket.send_multipart(pages(2, 0, old))
            await socket.send(round_end(3, 64))
            await rig.heard.next(wire.RoundReceived)
            await socket.send_multipart(deltas_packet(4, deltas, **fields))
            await rig.heard.next(wire.ChannelBroken)
            return rig.ram()

    assert asyncio.run(scenario()) == old


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=15)
@given(streams=st.lists(st.binary(min_size=3, max_size=64), min_size=1, max_size=20))
def test_noise_as_deltas_never_reaches_other_pages(streams: list[bytes]) -> None:
    old = bytes(range(256)) * (64 * 16)

    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as socket:
            for incarnation, deltas in enumerate(streams, 1):
                await opened(rig, socket, incarnation)
                fields = {"incarnation": incarnation, "round_number": 2 * incarnation}
                await socket.send_multipart(
                    pages(2, 0, old, **fields | {"round_number": 2 * incarnation - 1})
                )
                end = round_end(3, 64, **fields | {"round_number": 2 * incarnation - 1})
                await socket.send(end)
                await socket.send_multipart(deltas_packet(4, deltas, **fields))
                await rig.heard.next(wire.RoundReceived, incarnation)
            return rig.ram()

    assert asyncio.run(scenario())[PAGE_SIZE:] == old[PAGE_SIZE:]
