"""Codecs: how a batch of pages is made shorter, and whole again.

Each call stands by itself: a packet decodes without any other. A codec never decides whether to
compress; it says when that was in vain.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Final, Protocol

import lz4.block
import zstandard
from isal import isal_zlib

from engine.errors import CodecError
from engine.wire import CodecId

#: ISA-L's deflate has four levels only. Its second takes a fifth of the time of zlib's level 1 and
#: leaves as much (2 MiB batches of file contents and pointers: 400 MB/s and 40.0 % against 84 MB/s
#: and 40.2 %).
ISAL_LEVEL: Final = 2


#: The stub calls the class an instance.
_ISAL_ERROR: Final[type[Exception]] = isal_zlib.error  # type: ignore[assignment]

Data = bytes | bytearray | memoryview


class Codec(Protocol):
    """One way to encode; an instance has its level and its scratch memory, and one user."""

    @property
    def wire_id(self) -> CodecId:
        """How packets call it."""

    def encode(self, plain: Data) -> bytes | None:
        """Encode; None when that would not be shorter."""

    def decode(self, encoded: Data, size: int) -> bytes:
        """What was encoded, exactly `size` bytes; never more memory than that is taken.

        :raise CodecError: it is not this codec's, cut, or of another size."""


def _shorter(encoded: bytes, plain: Data) -> bytes | None:
    return encoded if len(encoded) < memoryview(plain).nbytes else None


def _whole(plain: bytes, size: int, wire_id: CodecId) -> bytes:
    """:raise CodecError: it is of another size."""
    if len(plain) != size:
        raise CodecError(f"{wire_id.name} payload decodes to {len(plain)} bytes, not {size}")
    return plain


class Zlib:
    """RFC 1950 streams. Level 1 is made by ISA-L, others by zlib; both decode both."""

    wire_id: Final = CodecId.ZLIB

    def __init__(self, level: int = 1) -> None:
        """:param level: 0 (stored) to 9."""
        self._level = level

    def encode(self, plain: Data) -> bytes | None:
        if self._level == 1:
            return _shorter(isal_zlib.compress(plain, ISAL_LEVEL), plain)
        return _shorter(zlib.compress(plain, self._level), plain)

    def decode(self, encoded: Data, size: int) -> bytes:
        decoder = isal_zlib.decompressobj()
        try:
            plain = decoder.decompress(encoded, size)
            rest = decoder.decompress(decoder.unconsumed_tail, 1)  # the check value, and no more
        except _ISAL_ERROR as exc:
            raise CodecError(f"ZLIB payload is wrong: {exc}") from exc
        if rest or not decoder.eof or decoder.unused_data:
            raise CodecError(f"ZLIB payload is cut, or does not end after {size} bytes")
        return _whole(plain, size, self.wire_id)


class Zstd:
    """RFC 8878 frames that tell their size."""

    wire_id: Final = CodecId.ZSTD

    def __init__(self, level: int = 1) -> None:
        """:param level: 1 to 22; 0 is the library's default (3), negative ones are faster."""
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, plain: Data) -> bytes | None:
        return _shorter(self._compressor.compress(plain), plain)

    def decode(self, encoded: Data, size: int) -> bytes:
        try:
            told = zstandard.get_frame_parameters(encoded).content_size
            if told != size:  # the library allocates what the frame tells
                raise CodecError(f"ZSTD payload tells {told} bytes, not {size}")
            plain = self._decompressor.decompress(encoded, allow_extra_data=False)
        except zstandard.ZstdError as exc:
            raise CodecError(f"ZSTD payload is wrong: {exc}") from exc
        return _whole(plain, size, self.wire_id)


class Lz4:
    """LZ4 blocks without a size before them."""

    wire_id: Final = CodecId.LZ4

    def __init__(self, acceleration: int = 1) -> None:
        """:param acceleration: 1 to 65537; larger is faster and leaves more."""
        self._acceleration = acceleration

    def encode(self, plain: Data) -> bytes | None:
        encoded: bytes = lz4.block.compress(
            plain, mode="fast", acceleration=self._acceleration, store_size=False
        )
        return _shorter(encoded, plain)

    def decode(self, encoded: Data, size: int) -> bytes:
        try:
            plain: bytes = lz4.block.decompress(encoded, uncompressed_size=size)
        except lz4.block.LZ4BlockError as exc:
            raise CodecError(f"LZ4 payload is wrong: {exc}") from exc
        return _whole(plain, size, self.wire_id)


#: Every codec of this build, by the name that `multifd-compression` gives it. "none" is no codec.
CODECS: Final[Mapping[str, type[Zlib | Zstd | Lz4]]] = {"zlib": Zlib, "zstd": Zstd, "lz4": Lz4}
CODEC_IDS: Final = {name: kind.wire_id for name, kind in CODECS.items()}


def decoders() -> Mapping[CodecId, Codec]:
    """A decoder of each codec, for one user."""
    return {kind.wire_id: kind() for kind in CODECS.values()}
