"""Every codec: what goes in comes out, and nothing else passes for it."""

from __future__ import annotations

import random
import resource
import zlib
from collections.abc import Callable
from functools import partial

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.compress.codecs import CODEC_IDS, CODECS, Codec, Lz4, Zlib, Zstd, decoders
from engine.errors import CodecError
from engine.memory.blocks import PAGE_SIZE

MAKERS: dict[str, Callable[[], Codec]] = {
    **{f"zlib {level}": partial(Zlib, level) for level in range(10)},
    **{f"zstd {level}": partial(Zstd, level) for level in (-7, -1, 0, 1, 3, 20)},
    **{f"lz4 {value}": partial(Lz4, value) for value in (1, 8, 65537)},
}
#: What pages hold: one word over and over, text, noise, and mixtures of them.
pieces = st.one_of(
    st.binary(min_size=1, max_size=64).map(lambda word: word * 64),
    st.binary(min_size=256, max_size=256),
    st.integers(0, 255).map(lambda byte: bytes([byte]) * 1024),
)
pages = st.tuples(st.lists(pieces, min_size=1, max_size=12), st.integers(1, 6)).map(
    lambda drawn: (b"".join(drawn[0]) * drawn[1] * 8)[: drawn[1] * PAGE_SIZE].ljust(PAGE_SIZE)
)
any_codec = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
each_kind = pytest.mark.parametrize("kind", CODECS.values(), ids=CODECS)
PLAIN = b"".join(index.to_bytes(8, "little") * 3 for index in range(4 * PAGE_SIZE // 24 + 1))
PLAIN = PLAIN[: 4 * PAGE_SIZE]


@any_codec
@given(plain=pages)
def test_what_goes_in_comes_out(make: Callable[[], Codec], plain: bytes) -> None:
    codec = make()

    encoded = codec.encode(memoryview(plain))

    if encoded is not None:
        assert len(encoded) < len(plain)
        assert decoders()[codec.wire_id].decode(memoryview(encoded), len(plain)) == plain


@any_codec
def test_a_whole_batch_shrinks(make: Callable[[], Codec]) -> None:
    codec, plain = make(), PLAIN * (wire.PAYLOAD_BYTES_MAX // len(PLAIN))
    encoded = codec.encode(plain)

    if isinstance(codec, Zlib) and codec.encode(PLAIN) is None:  # level 0 stores
        return
    assert encoded is not None
    assert codec.decode(encoded, len(plain)) == plain


@each_kind
def test_noise_does_not_shrink(kind: type[Zlib | Zstd | Lz4]) -> None:
    noise = random.Random(1).randbytes(PAGE_SIZE)
    assert kind().encode(noise) is None


@each_kind
@given(at=st.integers(0, 2**16), size=st.integers(0, 5 * PAGE_SIZE))
def test_a_cut_payload_or_another_size_is_refused(
    kind: type[Zlib | Zstd | Lz4], at: int, size: int
) -> None:
    codec = kind()
    encoded = codec.encode(PLAIN)
    assert encoded is not None

    with pytest.raises(CodecError):
        codec.decode(encoded[: at % len(encoded)], len(PLAIN))
    with pytest.raises(CodecError):
        codec.decode(encoded + b"\0", len(PLAIN))
    if size != len(PLAIN):
        with pytest.raises(CodecError):
            codec.decode(encoded, size)


@each_kind
@given(data=st.data())
def test_corrupted_payloads_give_the_right_size_or_an_error(
    kind: type[Zlib | Zstd | Lz4], data: st.DataObject
) -> None:
    codec = kind()
    encoded = bytearray(codec.encode(PLAIN) or b"")
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))

    try:
        plain = codec.decode(encoded, len(PLAIN))
    except CodecError:
        return
    assert len(plain) == len(PLAIN)
    assert kind is not Zlib or plain == PLAIN  # it carries a check value


@each_kind
@given(noise=st.binary(max_size=300))
def test_noise_is_refused(kind: type[Zlib | Zstd | Lz4], noise: bytes) -> None:
    try:
        plain = kind().decode(noise, PAGE_SIZE)
    except CodecError:
        return
    assert len(plain) == PAGE_SIZE


def _bombs() -> dict[str, tuple[Codec, bytes]]:
    """Each decodes to 256 MiB of zeros, and a header says that it is a page."""
    zeros = bytes(2**28)
    told = zstandard.ZstdCompressor().compress(zeros)
    untold = zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
    return {
        "zlib": (Zlib(), zlib.compress(zeros, 9)),
        "zstd": (Zstd(), told),
        "zstd that does not tell": (Zstd(), untold),
        "lz4": (Lz4(), MAKERS["lz4 1"]().encode(zeros) or b""),
    }


def test_a_bomb_takes_no_memory() -> None:
    bombs = _bombs()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for codec, bomb in bombs.values():
        with pytest.raises(CodecError):
            codec.decode(bomb, PAGE_SIZE)

    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 16 * 1024


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    """It tells a page and holds four."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, write_content_size=True)
    frame = bytearray(zstandard.ZstdCompressor(compression_params=parameters).compress(PLAIN))
    told = (len(PLAIN) - 256).to_bytes(2, "little")
    position = frame.index(told)
    frame[position : position + 2] = (PAGE_SIZE - 256).to_bytes(2, "little")

    with pytest.raises(CodecError):
        Zstd().decode(frame, PAGE_SIZE)


def test_names_and_ids_are_those_of_the_wire() -> None:
    assert CODEC_IDS == {"zlib": 2, "zstd": 3, "lz4": 4}
    assert set(CODEC_IDS.values()) | {wire.CodecId.RAW} == set(wire.CodecId)
