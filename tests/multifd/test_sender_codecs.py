"""A live sender with a codec: what it sends decodes to exactly the pages, whatever is ordered."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from engine import _native, wire
from engine.compress.codecs import CODECS
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.multifd.payload import DIRECT_RUN_PAGES_MIN
from engine.multifd.progress import Count
from tests.multifd.encoded import CODEC_NAMES, noise, page_numbers, pages_of, runs_of, text
from tests.multifd.rig import SenderRig, memory, sender

pytestmark = pytest.mark.process
any_codec = pytest.mark.parametrize("codec", CODEC_NAMES)

Round = tuple[list[wire.Packet], dict[int, bytes]]


async def one_round(rig: SenderRig, number: int = 1) -> Round:
    """Order a round; return its packets and every page that was sent, the newest of each."""
    rig.worker.order(wire.SendRound(number))
    packets, sent = await rest_of_round(rig)
    end = packets[-1]
    assert end.pages == sum(packet.pages for packet in packets[:-1])
    assert end.zero_pages == sum(packet.zero_pages for packet in packets[:-1])
    assert end.payload_bytes == sum(packet.payload_bytes for packet in packets[:-1])
    return packets, sent


async def rest_of_round(rig: SenderRig) -> Round:
    packets: list[wire.Packet] = []
    sent: dict[int, bytes] = {}
    while not packets or packets[-1].kind is not wire.PacketKind.ROUND_END:
        packet, payload = await rig.packet()
        if packet.kind is wire.PacketKind.OPEN:
            continue
        packets.append(packet)
        if packet.kind is wire.PacketKind.PAGES:
            sent.update(pages_of(packet, payload))
    return packets, sent


def in_pages(content: bytes) -> dict[int, bytes]:
    return {
        page: content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        for page in range(len(content) // PAGE_SIZE)
    }


def sent_with(
    content: bytes, wanted: wire.Compress, tracker: str = "none"
) -> tuple[list[wire.Packet], dict[int, bytes], dict[str, int]]:
    """One round of memory with `content`, and what the sender counted."""
    block = memory(max(64, len(content) // PAGE_SIZE), content)

    async def scenario() -> tuple[list[wire.Packet], dict[int, bytes], dict[str, int]]:
        async with sender(block, tracker=tracker) as rig:
            rig.worker.order(wanted)
            rig.dirty.set_data()
            packets, sent = await one_round(rig)
            counted = {count.name: rig.progress[count] for count in Count}
            return packets, sent, counted

    packets, sent, counted = asyncio.run(scenario())
    os.close(block.fd)
    return packets, sent, counted


@any_codec
def test_every_page_arrives_and_noise_goes_as_it_is(codec: str) -> None:
    """Text and noise in short runs, a long stretch of noise, zero pages, a long stretch of
    text."""
    pieces = [bytes(PAGE_SIZE), text(3), noise(5), text(1, 2), noise(1, 2), text(40, 3)] * 8
    long = DIRECT_RUN_PAGES_MIN + 6
    pieces += [noise(long, 4), text(2 * wire.BATCH_PAGES_MAX, 5), noise(long, 6)]
    content = b"".join(pieces)
    pages = in_pages(content)
    shrinks = {page for page, one in pages.items() if one == text_again(one) and any(one)}

    packets, sent, counted = sent_with(content, wire.Compress(codec))

    assert sent == pages
    encoded, direct = set(), set()
    for packet in packets[:-1]:
        runs = runs_of(packet)
        encoded |= page_numbers(runs[: packet.encoded_runs])
        direct |= page_numbers(runs[packet.encoded_runs + packet.gathered_runs :])
    assert encoded == shrinks
    assert direct
    assert {packet.codec for packet in packets if packet.encoded_runs} == {CODECS[codec].wire_id}
    assert counted["PLAIN_BYTES"] == counted["TRIED_BYTES"] == len(encoded) * PAGE_SIZE
    assert 0 < counted["ENCODED_BYTES"] < counted["PLAIN_BYTES"] // 4
    raw_bytes = (len(pages) - len(encoded) - packets[-1].zero_pages) * PAGE_SIZE
    assert packets[-1].payload_bytes == counted["ENCODED_BYTES"] + raw_bytes


def text_again(page: bytes) -> bytes:
    """The same page if it is one line over and over."""
    line = page[:31]
    return (line * (PAGE_SIZE // len(line) + 1))[:PAGE_SIZE]


@any_codec
def test_pages_that_are_all_noise_cost_the_codec_nothing(codec: str) -> None:
    content = noise(700)

    packets, sent, counted = sent_with(content, wire.Compress(codec))

    assert sent == in_pages(content)
    assert {packet.codec for packet in packets} == {wire.CodecId.RAW}
    assert (counted["TRIED_BYTES"], counted["PLAIN_BYTES"], counted["ENCODED_BYTES"]) == (0, 0, 0)


def test_a_batch_that_is_encoded_in_vain_goes_as_it_is() -> None:
    """zlib's level 0 stores, which is never shorter."""
    content = text(100) + noise(100) + text(7, 2)

    packets, sent, counted = sent_with(content, wire.Compress("zlib", zlib_level=0))

    assert sent == in_pages(content)
    assert {packet.codec for packet in packets} == {wire.CodecId.RAW}
    assert counted["TRIED_BYTES"] == 107 * PAGE_SIZE
    assert (counted["PLAIN_BYTES"], counted["ENCODED_BYTES"]) == (0, 0)


@any_codec
@pytest.mark.parametrize("content", [text(1), noise(1), bytes(PAGE_SIZE)])
def test_a_batch_of_one_page(codec: str, content: bytes) -> None:
    packets, sent, _ = sent_with(content, wire.Compress(codec))

    assert sent == {0: content}
    assert packets[0].encoded_runs == (content == text(1))


def test_auto_sends_every_page() -> None:
    content = (text(300) + noise(300, 2)) * 8

    packets, sent, counted = sent_with(content, wire.Compress("auto"))

    assert sent == in_pages(content)
    assert counted["PAGES"] == packets[-1].pages == 4800


@any_codec
def test_levels_are_obeyed(codec: str) -> None:
    """The slow end leaves less than the fast end."""
    words = [one.hex().encode() for one in noise(1)[:1024].split(b"a")]
    content = b" ".join(random.Random(2).choices(words, k=200_000))[: 256 * PAGE_SIZE]
    fast, slow = {
        "zlib": (wire.Compress("zlib", zlib_level=1), wire.Compress("zlib", zlib_level=9)),
        "zstd": (wire.Compress("zstd", zstd_level=-50), wire.Compress("zstd", zstd_level=19)),
        "lz4": (wire.Compress("lz4", lz4_acceleration=65535), wire.Compress("lz4")),
    }[codec]

    sizes = []
    for wanted in (slow, fast):
        _, sent, counted = sent_with(content, wanted)
        assert sent == in_pages(content)
        sizes.append(counted["PAYLOAD_BYTES"])

    assert sizes[0] < sizes[1]


@any_codec
def test_private_copies_are_encoded_and_their_hashes_are_of_what_was_sent(codec: str) -> None:
    """A is sent, B is found, A is back before it is sent; then noise, which goes raw."""
    a, b, raw = text(1, 1), text(1, 2), noise(1)
    block = memory(8, a + raw)

    async def scenario() -> list[int]:
        async with sender(block, tracker="content-hash") as rig:
            rig.worker.order(wire.Compress(codec))
            rig.dirty.set_data()
            rig.delivered.set_data()
            packets, sent = await one_round(rig)
            assert sent == {0: a, 1: raw}
            found = [(await rig.harvest(1)).dirty_pages]
            os.pwrite(block.fd, b, 0)
            found.append((await rig.harvest(2)).dirty_pages)
            os.pwrite(block.fd, a, 0)
            packets, sent = await one_round(rig, 2)
            assert sent == {0: a}
            assert packets[0].codec is CODECS[codec].wire_id
            found.append((await rig.harvest(3)).dirty_pages)
            os.pwrite(block.fd, raw, 0)
            found.append((await rig.harvest(4)).dirty_pages)
            packets, sent = await one_round(rig, 3)
            assert sent == {0: raw}
            assert packets[0].codec is wire.CodecId.RAW
            found.append((await rig.harvest(5)).dirty_pages)
            return found

    assert asyncio.run(scenario()) == [0, 1, 0, 1, 0]
    os.close(block.fd)


@any_codec
def test_private_copies_in_short_runs_are_sorted_like_lent_pages(codec: str) -> None:
    content = (text(3) + noise(1)) * 150

    packets, sent, counted = sent_with(content, wire.Compress(codec), "content-hash")

    assert sent == in_pages(content)
    assert {len(packet.frame_sizes()) for packet in packets[:-1]} == {2}
    assert counted["TRIED_BYTES"] == counted["PLAIN_BYTES"] == 450 * PAGE_SIZE


async def until_codec(
    rig: SenderRig, wanted: wire.CodecId, packets: list[wire.Packet], sent: dict[int, bytes]
) -> None:
    """Take packets up to the first one with this codec."""
    while True:
        packet, payload = await rig.packet()
        if packet.kind is wire.PacketKind.OPEN:
            continue
        assert packet.kind is wire.PacketKind.PAGES, "the round ended before"
        packets.append(packet)
        sent.update(pages_of(packet, payload))
        if packet.codec is wanted:
            return


def test_a_codec_that_changes_in_a_round_takes_effect_at_the_next_batch() -> None:
    """Four orders and back to none, in one round that goes on; no page is lost between two."""
    content = text(8192)
    block = memory(8192, content)
    orders = ["zstd", "lz4", "zlib", "none", "lz4"]
    ids = [CODECS[name].wire_id if name in CODECS else wire.CodecId.RAW for name in orders]

    async def scenario() -> tuple[list[wire.Packet], dict[int, bytes], dict[str, int]]:
        async with sender(block) as rig:
            rig.dirty.set_data()
            rig.budget.rate_bytes_per_s = 200_000  # seconds more than all orders take
            rig.worker.order(wire.Compress(orders[0]))
            rig.worker.order(wire.SendRound(1))
            packets: list[wire.Packet] = []
            sent: dict[int, bytes] = {}
            await until_codec(rig, ids[0], packets, sent)
            for name, wire_id in zip(orders[1:], ids[1:], strict=True):
                rig.worker.order(wire.Compress(name))
                await until_codec(rig, wire_id, packets, sent)
            rig.budget.rate_bytes_per_s = 0
            rest, more = await rest_of_round(rig)
            assert not sent.keys() & more.keys()
            counted = {one.name: rig.progress.batches(one) for one in wire.CodecId}
            return [*packets, *rest], sent | more, counted

    packets, sent, counted = asyncio.run(scenario())
    os.close(block.fd)
    assert sent == in_pages(content)
    codecs = [packet.codec for packet in packets[:-1]]
    changes = [one for at, one in enumerate(codecs) if at == 0 or codecs[at - 1] is not one]
    assert changes == ids
    assert [packet.sequence for packet in packets] == list(range(2, 2 + len(packets)))
    assert packets[-1].pages == 8192
    assert counted == {one.name: codecs.count(one) for one in wire.CodecId}


@any_codec
def test_a_channel_made_anew_goes_on_with_the_codec(codec: str) -> None:
    """Taken batches come again, encoded by themselves."""
    content = text(600) + noise(64)
    block = memory(1024, content)

    async def scenario() -> tuple[list[wire.Packet], dict[int, bytes]]:
        async with sender(block) as rig:
            rig.worker.order(wire.Compress(codec))
            rig.dirty.set_data()
            _native.bitmap_set_range(rig.dirty[0], 0, 664)
            rig.budget.rate_bytes_per_s = 1000
            rig.worker.order(wire.SendRound(1))
            while (await rig.packet())[0].kind is not wire.PacketKind.PAGES:
                pass
            rig.worker.order(wire.OpenChannel(rig.endpoint, 2))
            await rig.heard.next(wire.Opened, 2)
            rig.budget.rate_bytes_per_s = 0
            rig.in_flight.move_to(rig.dirty)
            while (await rig.packet())[0].incarnation != 2:
                pass
            return await one_round(rig)

    packets, sent = asyncio.run(scenario())
    assert sent == in_pages(content)
    assert {packet.codec for packet in packets if packet.encoded_runs} == {CODECS[codec].wire_id}
    os.close(block.fd)


def test_the_block_is_never_touched() -> None:
    """Encoding and lending only read."""
    content = text(64) + noise(64)
    block: RamBlock = memory(128, content)

    async def scenario() -> None:
        async with sender(block) as rig:
            for number, name in enumerate(("zstd", "lz4", "zlib", "auto"), 1):
                rig.worker.order(wire.Compress(name))
                rig.dirty.set_data()
                await one_round(rig, number)

    asyncio.run(scenario())
    assert os.pread(block.fd, block.size, 0) == content
    os.close(block.fd)


@pytest.mark.parametrize("kept_bytes", [3, 4, 5, 8])
def test_a_packet_of_deltas_is_never_longer_than_one_of_pages(kept_bytes: int) -> None:
    """Nearly all of every page is written; what is longer, the receiver's socket would refuse."""
    old = noise(wire.BATCH_PAGES_MAX)
    new = bytearray(byte ^ 0x55 for byte in old)
    for start in range(0, len(old), PAGE_SIZE):
        new[start : start + kept_bytes] = old[start : start + kept_bytes]
    block = memory(wire.BATCH_PAGES_MAX, old)

    async def scenario() -> list[wire.Packet]:
        async with sender(block) as rig:
            rig.worker.order(wire.Compress("none", xbzrle_cache_bytes=len(old)))
            for number in (1, 2):
                rig.dirty.set_data()
                await one_round(rig, number)
            os.pwrite(block.fd, new, 0)
            rig.dirty.set_data()
            rig.worker.order(wire.SendRound(3))
            packets: list[wire.Packet] = []
            while not packets or packets[-1].kind is not wire.PacketKind.ROUND_END:
                packet, payload = await rig.packet()
                assert len(payload) <= wire.PAYLOAD_BYTES_MAX
                packets.append(packet)
            return packets[:-1]

    packets = asyncio.run(scenario())
    os.close(block.fd)
    assert sum(packet.pages for packet in packets) == wire.BATCH_PAGES_MAX
    kind = wire.PacketKind.PAGES if kept_bytes < 5 else wire.PacketKind.DELTAS
    assert [packet.kind for packet in packets] == [kind]
