"""Packets with a codec, as tests read and make them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from engine import _native, wire
from engine.compress.codecs import CODECS, decoders
from engine.memory.blocks import PAGE_SIZE
from tests.multifd.rig import SESSION

CODEC_NAMES: Final = tuple(CODECS)
Run = tuple[int, int]


def noise(page_count: int, seed: int = 1) -> bytes:
    """Pages that no codec makes shorter."""
    return random.Random(seed).randbytes(page_count * PAGE_SIZE)


def text(page_count: int, seed: int = 1) -> bytes:
    """Pages that every codec makes shorter, each another."""
    words = random.Random(seed)
    pages = (b"%016x page %08d " % (words.getrandbits(64), page) for page in range(page_count))
    return b"".join((line * (PAGE_SIZE // len(line) + 1))[:PAGE_SIZE] for line in pages)


def numbers(page_count: int, seed: int = 1) -> bytes:
    """Pages of words, which are encoded as bit planes."""
    source = random.Random(seed)
    return b"".join(
        (0x5A00 << 32 | source.randrange(2**18)).to_bytes(8, "little")
        for _ in range(page_count * PAGE_SIZE // 8)
    )


def table(runs: Sequence[Run]) -> bytes:
    return b"".join(wire.RUN.pack(*run) for run in runs)


def runs_of(packet: wire.Packet) -> list[Run]:
    return list(wire.RUN.iter_unpack(packet.data_runs))


def pages_of(packet: wire.Packet, payload: bytes) -> dict[int, bytes]:
    """Every page that a packet carries, zero pages as zeros; the payload is checked to be of the
    sizes that the header says."""
    sizes = packet.frame_sizes()
    assert len(payload) == packet.payload_bytes == sum(sizes)
    plain = payload
    if packet.encoded_runs:
        codec = decoders()[packet.codec]
        plain = codec.decode(payload[: sizes[0]], packet.plain_bytes)
        restored = _native.restore_planes(plain, packet.plane_pages)
        plain = restored + plain[len(restored) :] + payload[sizes[0] :]
    pages: dict[int, bytes] = {}
    position = 0
    for first, count in runs_of(packet):
        for page in range(first, first + count):
            assert page not in pages
            pages[page] = plain[position : position + PAGE_SIZE]
            position += PAGE_SIZE
    assert position == len(plain)
    for first, count in wire.RUN.iter_unpack(packet.zero_runs):
        pages.update(dict.fromkeys(range(first, first + count), bytes(PAGE_SIZE)))
    return pages


def page_numbers(runs: Sequence[Run]) -> set[int]:
    return {page for first, count in runs for page in range(first, first + count)}


def encoded_packet(
    codec: str,
    encoded_runs: Sequence[Run],
    payload: bytes,
    *,
    raw: bytes = b"",
    raw_runs: Sequence[Run] = (),
    sequence: int = 2,
    header: Mapping[str, Any] = MappingProxyType({}),
) -> list[bytes]:
    """A packet whose header fits its frames, with whatever `payload` for the encoded runs.

    :param raw: the pages of `raw_runs`, which are gathered."""
    pages = sum(count for _, count in encoded_runs)
    raw_pages = sum(count for _, count in raw_runs)
    given: dict[str, Any] = {
        "session": SESSION,
        "channel_id": 1,
        "incarnation": 1,
        "codec": CODECS[codec].wire_id,
        "pages": pages + raw_pages,
        "payload_bytes": len(payload) + len(raw),
        "encoded_runs": len(encoded_runs),
        "gathered_runs": len(raw_runs),
        "plain_bytes": pages * PAGE_SIZE,
        "data_runs": table([*encoded_runs, *raw_runs]),
    }
    packet = wire.Packet(wire.PacketKind.PAGES, sequence=sequence, **{**given, **header})
    return [packet.encode(), payload, *([raw] if raw else [])]
