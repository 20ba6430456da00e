"""What all msgpack-encoded messages have in common: their root, their shapes, how they are read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from engine.errors import WireError
from engine.memory.blocks import BLOCK_SIZE_MAX, PAGE_SIZE, RamBlock

VERSION: Final = 4
SESSION_BYTES: Final = 16
#: A QEMU's is 0.3 to 0.9 MiB, and the memory of its display (16 MiB) with it.
STATE_BYTES_MAX: Final = 32 * 1024 * 1024
MAIN_BYTES_MAX: Final = (
    STATE_BYTES_MAX + 1024 * 1024
)  #: device state and room for what is around it
FRAME: Final = struct.Struct(">I")  #: length of the message that follows; 0 is invalid
ORDER_BYTES_MAX: Final = 64 * 1024
CHANNELS_MAX: Final = 255
#: One datagram carries no more (Linux: SCM_MAX_FD).
DESCRIPTORS_MAX: Final = 253
#: Beside the RAM blocks' descriptors in `PrepareSender`.
SENDER_FDS: Final = ("dirty", "in_flight", "candidates", "hashes", "progress", "budget")
#: RAM, and a bitmap of it, of every block go beside one order: 6 + 2 x 123 = 252. Pagemaps are
#: fewer: one for each tracked process.
BLOCKS_MAX: Final = (DESCRIPTORS_MAX - len(SENDER_FDS)) // 2
#: A block is at most 17 (map, tag) + 263 (name) + 14 (size) + 27 (backing_page_size) = 321 bytes;
#: the rest (tag, version, session, page size, channels, kind, runs, list) fits in 1 KiB.
HELLO_BYTES_MAX: Final = 1024 + BLOCKS_MAX * 321
REASON_CHARACTERS_MAX: Final = 1000


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Root of everything msgpack-encoded; the tag is the class name."""


class BlockShape(Message, frozen=True):
    """A RAM block as a peer or a worker needs to know it."""

    name: str
    size: int
    backing_page_size: int

    @classmethod
    def of(cls, block: RamBlock) -> BlockShape:
        return cls(block.name, block.size, block.backing_page_size)

    def check(self) -> None:
        """:raise WireError: a size that no block can have."""
        sizes = (PAGE_SIZE, 2 * 1024**2, 1024**3)
        if self.backing_page_size not in sizes or not 0 < self.size <= BLOCK_SIZE_MAX:
            raise WireError(f"RAM block '{self.name[:64]}' of {self.size} bytes is impossible")
        if self.size % self.backing_page_size or not 0 < len(self.name.encode()) <= 255:
            raise WireError(f"RAM block '{self.name[:64]}' is not whole pages or has a bad name")


def check_blocks(shapes: Sequence[BlockShape]) -> None:
    """Check a guest's RAM blocks, before a migration starts and when a Hello came.

    :raise WireError: too many or none, impossible ones, or two of one name."""
    if not 0 < len(shapes) <= BLOCKS_MAX:
        raise WireError(f"a guest of {len(shapes)} RAM blocks; 1 to {BLOCKS_MAX} can be migrated")
    for shape in shapes:
        shape.check()
    if len({shape.name for shape in shapes}) < len(shapes):
        raise WireError("two RAM blocks of one name")


_ENCODER: Final = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode(message: Message) -> bytes:
    """The bytes of a main-channel message, an order or a report."""
    return _ENCODER.encode(message)


class Decoder(Generic[T]):
    """Decodes the messages of one border, and names the border in its errors."""

    def __init__(self, types: Any, bytes_max: int, where: str) -> None:
        self._decoder = msgspec.msgpack.Decoder(types)
        self._bytes_max, self._where = bytes_max, where

    def decode(self, data: bytes | memoryview) -> T:
        """:raise WireError: too long, not msgpack, or not a message of this border."""
        if len(data) > self._bytes_max:
            raise WireError(
                f"{self._where}: message of {len(data)} bytes, {self._bytes_max} allowed"
            )
        try:
            message: T = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            if (version := _version_of(data)) != VERSION:
                raise WireError(
                    f"{self._where}: the peer speaks version {version}, this build {VERSION}"
                ) from exc
            raise WireError(f"{self._where}: {exc}") from exc
        return message


class _Versioned(msgspec.Struct):
    """The one thing that messages of all versions have where they have it: Hello, Welcome, and the
    Hello in a stream's first message."""

    version: int = VERSION
    hello: _Versioned | None = None


_VERSIONED: Final = msgspec.msgpack.Decoder(_Versioned)


def _version_of(data: bytes | memoryview) -> int:
    """The version that a message names, whatever else it says; ours if it names none."""
    try:
        message = _VERSIONED.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return VERSION
    return message.version if message.hello is None else message.hello.version


def cut(reason: str) -> str:
    """A reason in one line that fits a message."""
    return " ".join(reason.split())[:REASON_CHARACTERS_MAX]
