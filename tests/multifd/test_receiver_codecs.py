"""A live receiver against encoded payloads: right ones land, hostile ones break the incarnation in
one line, before a byte of the packet is written and without more memory than a batch takes."""

from __future__ import annotations

import asyncio
import itertools
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lz4.block
import pytest
import zmq.asyncio
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import wire
from engine.compress.codecs import CODECS
from engine.memory.blocks import PAGE_SIZE
from tests.multifd.encoded import CODEC_NAMES, encoded_packet, noise, table, text
from tests.multifd.rig import ReceiverRig, receiver
from tests.multifd.test_receiver import opened, opening, packet, pages

pytestmark = pytest.mark.process
any_codec = pytest.mark.parametrize("codec", CODEC_NAMES)

#: What each hostile packet also carries, and none of it may be written: raw pages at 20, and pages
#: 0 to 3, which have data already, as zero pages.
RAW, RAW_RUNS = noise(2, 7), [(20, 2)]
ZEROS: dict[str, Any] = {"zero_pages": 4, "zero_runs": table([(0, 4)])}
OLD = noise(4, 8)
RUNS = [(8, 3), (12, 1)]
PLAIN = text(4)
#: A worker needs a decoded batch, a batch from the socket, and what ZeroMQ reads ahead.
GROWTH_MAX_KIB = 48 * 1024


def encode(codec: str, plain: bytes) -> bytes:
    encoded = CODECS[codec]().encode(plain)
    assert encoded is not None
    return encoded


def hostile(name: str, payload: bytes, **header: Any) -> list[bytes]:
    """`payload` for the four pages of RUNS, and things beside it that are right.

    :param header: its members that are otherwise."""
    return encoded_packet(
        name, RUNS, payload, raw=RAW, raw_runs=RAW_RUNS, sequence=3, header=ZEROS | header
    )


async def established(rig: ReceiverRig, socket: zmq.asyncio.Socket, incarnation: int = 1) -> None:
    """An open channel that has brought the pages OLD."""
    await opened(rig, socket, incarnation)
    await socket.send_multipart(pages(2, 0, OLD, incarnation=incarnation))


def refused(messages: list[bytes], page_count: int = 64) -> tuple[str, int]:
    """The reason for which the incarnation breaks, and how much the worker grew (KiB); nothing of
    the packet was written and the next incarnation works."""

    async def scenario() -> tuple[str, int]:
        async with receiver(page_count) as rig, rig.channel() as first, rig.channel() as second:
            await established(rig, first)
            before = peak_kib(rig.worker.pid)
            await first.send_multipart(messages)
            broken = await rig.heard.next(wire.ChannelBroken)
            grown = peak_kib(rig.worker.pid) - before
            assert rig.ram() == OLD + bytes(page_count * PAGE_SIZE - len(OLD))
            await established(rig, second, 2)
            right = encoded_packet(
                "zstd", [(9, 4)], encode("zstd", PLAIN), sequence=3, header={"incarnation": 2}
            )
            await second.send_multipart(right)
            await second.send(round_end_of(4, [len(OLD), len(right[1])], 8, incarnation=2))
            await rig.heard.next(wire.RoundReceived)
            assert rig.ram()[9 * PAGE_SIZE : 13 * PAGE_SIZE] == PLAIN
            assert rig.heard.lost == []
            reason: str = broken.reason
            return reason, grown

    return asyncio.run(scenario())


def round_end_of(sequence: int, payload_bytes: list[int], count: int, **fields: Any) -> bytes:
    return packet(
        wire.PacketKind.ROUND_END, sequence, pages=count, payload_bytes=sum(payload_bytes), **fields
    ).encode()


def peak_kib(pid: int) -> int:
    """The most memory that the process ever had in use."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@any_codec
def test_encoded_raw_and_zero_pages_land_where_the_runs_say(codec: str) -> None:
    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as socket:
            await established(rig, socket)
            payload = encode(codec, PLAIN)
            await socket.send_multipart(hostile(codec, payload))  # which is not, this time
            sizes = [len(OLD), len(payload), len(RAW)]
            await socket.send(round_end_of(4, sizes, 10, zero_pages=4))
            await rig.heard.next(wire.RoundReceived)
            return rig.ram()

    expected = bytearray(64 * PAGE_SIZE)
    expected[8 * PAGE_SIZE : 11 * PAGE_SIZE] = PLAIN[: 3 * PAGE_SIZE]
    expected[12 * PAGE_SIZE : 13 * PAGE_SIZE] = PLAIN[3 * PAGE_SIZE :]
    expected[20 * PAGE_SIZE : 22 * PAGE_SIZE] = RAW
    assert asyncio.run(scenario()) == expected


@any_codec
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda codec: encode(codec, PLAIN)[:-1], "payload", id="cut-by-a-byte"),
        pytest.param(lambda codec: encode(codec, PLAIN)[:1], "payload", id="one-byte"),
        pytest.param(lambda codec: encode(codec, PLAIN) + b"\0", "payload", id="with-a-tail"),
        pytest.param(lambda codec: encode(codec, PLAIN) * 2, "payload", id="twice"),
        pytest.param(lambda codec: encode(codec, text(3)), "bytes", id="a-page-short"),
        pytest.param(lambda codec: encode(codec, text(5)), "payload", id="a-page-more"),
        pytest.param(lambda codec: noise(3), "payload", id="noise"),
        pytest.param(lambda codec: bytes(500), "payload", id="zeros"),
    ],
)
def test_a_wrong_payload_breaks_the_incarnation_and_nothing_is_written(
    codec: str, damage: Callable[[str], bytes], reason: str
) -> None:
    said, grown = refused(hostile(codec, damage(codec)))

    assert said.startswith(f"{codec.upper()} payload")
    assert reason in said
    assert "\n" not in said
    assert grown < GROWTH_MAX_KIB


@pytest.mark.parametrize("told", CODEC_NAMES)
@pytest.mark.parametrize("used", CODEC_NAMES)
def test_another_codec_than_the_header_says_is_refused(told: str, used: str) -> None:
    if told == used:
        return
    said, _ = refused(hostile(told, encode(used, PLAIN)))
    assert said.startswith(f"{told.upper()} payload")


def zstd_that_tells(size: int) -> bytes:
    """A frame header (RFC 8878, 3.1.1.1) with the content's size in 8 bytes, and an empty block."""
    return struct.pack("<IBQ", 0xFD2FB528, 0xE0, size) + b"\1\0\0"


def zstd_with_window(log: int) -> bytes:
    """A frame that tells the right size (4 bytes) but wants a window of 2**log bytes, and is
    cut."""
    descriptor = (log - 10) << 3
    return struct.pack("<IBBI", 0xFD2FB528, 0x80, descriptor, len(PLAIN)) + b"\0\1\0"


BIG = bytes(2**28)
BOMBS: dict[str, Callable[[], list[bytes]]] = {
    "zstd-tells-1-tib": lambda: hostile("zstd", zstd_that_tells(2**40)),
    "zstd-tells-2**64-1": lambda: hostile("zstd", zstd_that_tells(2**64 - 1)),
    "zstd-wants-a-window-of-2-tib": lambda: hostile("zstd", zstd_with_window(41)),
    "zstd-wants-a-window-of-64-mib": lambda: hostile("zstd", zstd_with_window(26)),
    "zstd-holds-256-mib": lambda: _big("zstd", zstandard.ZstdCompressor().compress(BIG)),
    "zstd-holds-256-mib-untold": lambda: _big(
        "zstd", zstandard.ZstdCompressor(write_content_size=False).compress(BIG)
    ),
    "zlib-holds-256-mib": lambda: _big("zlib", zlib.compress(BIG, 9)),
    "lz4-grows-to-256-mib": lambda: _big("lz4", lz4.block.compress(BIG, store_size=False)),
}


def _big(codec: str, payload: bytes) -> list[bytes]:
    """Said to be a whole batch."""
    runs = [(8, wire.BATCH_PAGES_MAX)]
    return encoded_packet(codec, runs, payload, sequence=3, header=ZEROS)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_breaks_the_incarnation_and_takes_no_memory(bomb: str) -> None:
    said, grown = refused(BOMBS[bomb](), page_count=1024)

    assert said.startswith(f"{bomb.partition('-')[0].upper()} payload")
    assert grown < GROWTH_MAX_KIB


def swapped(codec: str) -> list[bytes]:
    header, first, second = hostile(codec, encode(codec, PLAIN))
    return [header, second, first]


def moved(codec: str, by: int) -> list[bytes]:
    """The border between the two frames is elsewhere than the header says."""
    header, first, second = hostile(codec, encode(codec, PLAIN))
    both = first + second
    return [header, both[: len(first) + by], both[len(first) + by :]]


FRAMES: dict[str, Callable[[str], list[bytes]]] = {
    "frames-swapped": swapped,
    "border-one-byte-late": lambda codec: moved(codec, 1),
    "border-one-byte-early": lambda codec: moved(codec, -1),
    "encoded-frame-of-a-page": lambda codec: [
        hostile(codec, encode(codec, PLAIN))[0], noise(1), RAW
    ],
    "encoded-frame-missing": lambda codec: [hostile(codec, encode(codec, PLAIN))[0], RAW],
    "one-frame-of-both": lambda codec: [
        hostile(codec, encode(codec, PLAIN))[0], encode(codec, PLAIN) + RAW
    ],
}  # fmt: skip


@any_codec
@pytest.mark.parametrize("case", FRAMES)
def test_frames_of_other_sizes_than_the_header_says_are_refused(codec: str, case: str) -> None:
    said, _ = refused(FRAMES[case](codec))
    assert said == "packet whose payload frames are not of the sizes that its runs say"


@any_codec
@pytest.mark.parametrize(
    "lie",
    [
        pytest.param({"plain_bytes": 5 * PAGE_SIZE}, id="more-plain-bytes"),
        pytest.param({"plain_bytes": 3 * PAGE_SIZE}, id="fewer-plain-bytes"),
        pytest.param({"plain_bytes": 4 * PAGE_SIZE - 1}, id="a-byte-fewer"),
        pytest.param({"plain_bytes": 0}, id="no-plain-bytes"),
        pytest.param({"plain_bytes": 2**32 - 1}, id="4-gib"),
        pytest.param({"codec": wire.CodecId.RAW}, id="encoded-with-nothing"),
        pytest.param({"encoded_runs": 0, "gathered_runs": 3}, id="no-encoded-runs"),
        pytest.param({"encoded_runs": 1, "gathered_runs": 2}, id="fewer-encoded-runs"),
        pytest.param({"encoded_runs": 3, "gathered_runs": 0}, id="more-encoded-runs"),
        pytest.param({"payload_bytes": 4 * PAGE_SIZE + len(RAW)}, id="not-shorter"),
        pytest.param({"payload_bytes": len(RAW)}, id="no-encoded-bytes"),
        pytest.param({"payload_bytes": 2**63}, id="a-payload-of-exbibytes"),
    ],
)
def test_a_header_that_lies_about_the_codec_is_refused(codec: str, lie: dict[str, int]) -> None:
    said, _ = refused(hostile(codec, encode(codec, PLAIN), **lie))
    assert "pages encoded from" in said
    assert "\n" not in said


def test_an_unknown_codec_id_is_refused() -> None:
    header, *frames = hostile("zstd", encode("zstd", PLAIN))
    for wrong in (0, 5, 255):
        said, _ = refused([header[:7] + bytes([wrong]) + header[8:], *frames])
        assert said == f"packet kind 2 with codec {wrong}; neither 0 nor unknown is allowed"


@any_codec
def test_encoded_pages_outside_the_block_are_refused_before_they_are_decoded(codec: str) -> None:
    payload = encode(codec, PLAIN)
    for runs in ([(62, 4)], [(64, 4)], [(2**32 - 4, 4)], [(5, 2), (4, 2)], [(18, 4)]):
        said, _ = refused(
            encoded_packet(codec, runs, payload, raw=RAW, raw_runs=RAW_RUNS, sequence=3)
        )
        assert said.startswith("pages for RAM block 'ram'")


# -- Hypothesis ----------------------------------------------------------------------------------

GOOD = {codec: encode(codec, PLAIN) for codec in CODEC_NAMES}
cuts = st.tuples(st.just("cut"), st.integers(0, 2**16), st.just(b""))
changes = st.tuples(st.just("change"), st.integers(0, 2**16), st.binary(min_size=1, max_size=8))
additions = st.tuples(st.just("add"), st.integers(0, 2**16), st.binary(min_size=1, max_size=64))
damages = st.lists(st.one_of(cuts, changes, additions), min_size=1, max_size=3)


def damaged(payload: bytes, damages: list[tuple[str, int, bytes]]) -> bytes:
    """Never empty, and never as long as the pages: the header would be refused for that."""
    for kind, where, piece in damages:
        at = where % len(payload)
        match kind:
            case "cut":
                payload = payload[: max(1, at)]
            case "change":
                payload = payload[:at] + piece + payload[at + len(piece) :]
            case "add":
                payload = payload[:at] + piece + payload[at:]
    return payload[: len(PLAIN) - 1]


@any_codec
def test_whatever_is_damaged_nothing_is_written_outside_the_pages_that_were_named(
    codec: str,
) -> None:
    """Damage breaks the incarnation and writes nothing, or else it decodes to the right size: lz4
    and zstd have no check values here, TCP has. One receiver takes it all."""
    with asyncio.Runner() as runner:
        connected = receiver()
        rig = runner.run(connected.__aenter__())

        async def take(payload: bytes, incarnation: int) -> bool:
            """Whether it was placed."""
            placed = len(rig.heard.of(wire.RoundReceived))
            async with rig.channel() as socket:
                await established(rig, socket, incarnation)
                await socket.send_multipart(hostile(codec, payload, incarnation=incarnation))
                sizes = [len(OLD), len(payload), len(RAW)]
                await socket.send(round_end_of(4, sizes, 10, incarnation=incarnation, zero_pages=4))
                await rig.heard.until(lambda: ended(rig) == incarnation)
            return len(rig.heard.of(wire.RoundReceived)) > placed

        incarnations = itertools.count(1)

        @settings(max_examples=60)
        @given(damages=damages)
        def damage(damages: list[tuple[str, int, bytes]]) -> None:
            before = rig.ram()
            is_placed = runner.run(take(damaged(GOOD[codec], damages), next(incarnations)))
            ram = rig.ram()
            assert not any(unnamed(ram))
            if is_placed:
                assert ram[20 * PAGE_SIZE : 22 * PAGE_SIZE] == RAW
            else:  # OLD came before it, and of the packet nothing
                assert ram == OLD + before[len(OLD) :]
                reason = rig.heard.of(wire.ChannelBroken)[-1].reason
                assert reason.startswith(f"{codec.upper()} payload")

        try:
            before = peak_kib(rig.worker.pid)
            damage()
            assert rig.heard.lost == []
            assert peak_kib(rig.worker.pid) - before < GROWTH_MAX_KIB
        finally:
            runner.run(connected.__aexit__(None, None, None))


def ended(rig: ReceiverRig) -> int:
    """Incarnations that came to an end, one way or the other."""
    return len(rig.heard.of(wire.RoundReceived)) + len(rig.heard.of(wire.ChannelBroken))


def unnamed(ram: bytes) -> bytes:
    """The pages that no packet names."""
    named = {0, 1, 2, 3, 8, 9, 10, 12, 20, 21}
    pages = (page for page in range(64) if page not in named)
    return b"".join(ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] for page in pages)


def test_deltas_that_nobody_can_apply_never_end_the_worker() -> None:
    """A hostile packet of the other kind: refused, or applied within its pages; never a crash."""
    body = struct.pack("<H", 3) + b"\0\1x"
    head = packet(
        wire.PacketKind.DELTAS, 2, pages=1, payload_bytes=len(body), plain_bytes=len(body),
        encoded_runs=1, data_runs=table([(9, 1)]),
    )  # fmt: skip

    async def scenario() -> tuple[list[str], bytes]:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            await socket.send_multipart([head.encode(), body])
            await socket.send(opening(1))  # refused, and so an answer in any case
            await rig.heard.until(lambda: rig.heard.lost or rig.heard.of(wire.ChannelBroken))
            return rig.heard.lost, rig.ram()

    lost, ram = asyncio.run(scenario())
    assert lost == []
    assert not any(ram[: 9 * PAGE_SIZE] + ram[10 * PAGE_SIZE :])
