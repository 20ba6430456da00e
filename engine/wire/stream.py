"""A stream over one descriptor: everything on it is a chunk, which its reader takes exactly.

In this order: `StreamHello`; the packets of one channel, from OPEN to CHANNEL_END; `DeviceState`,
`Arm` and `Take`. A chunk is `CHUNK` and then head and body: a message is a head alone, a packet is
its header frame and its payload. Where `StreamHello` asks for answers, messages of `StreamAnswer`
come back the other way, as chunks too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

from engine.errors import WireError
from engine.wire.main import (
    Abort,
    Arm,
    Armed,
    DeviceState,
    Failed,
    Hello,
    Refused,
    RoundReceived,
    TookOver,
)
from engine.wire.messages import Message

#: Bytes of head and of body, and the CRC-32 of these two numbers, head and body: a stream may go
#: through files and programs that no protocol of ours watches over.
CHUNK: Final = struct.Struct("<III")
_SIZES: Final = struct.Struct("<II")


class StreamHello(Message, frozen=True):
    """Source -> destination, first chunk.

    :ivar answers: the source listens on the same descriptor, and completes by the answers only."""

    hello: Hello
    answers: bool


class Take(Message, frozen=True):
    """Source -> destination, last chunk: the source has given the guest up, and it is yours."""


StreamMessage = DeviceState | Arm | Take | Abort
StreamAnswer = Refused | RoundReceived | Armed | TookOver | Failed


def chunk(head: bytes, body: Sequence[bytes | memoryview] = ()) -> bytearray:
    """One chunk; a copy, so that what changes meanwhile does not contradict its checksum."""
    data = bytearray().join((bytes(CHUNK.size), head, *body))
    body_bytes = len(data) - CHUNK.size - len(head)
    with memoryview(data) as view:
        checksum = _checksum(len(head), body_bytes, view[CHUNK.size :])
    CHUNK.pack_into(data, 0, len(head), body_bytes, checksum)
    return data


def _checksum(head_bytes: int, body_bytes: int, content: memoryview) -> int:
    return zlib.crc32(content, zlib.crc32(_SIZES.pack(head_bytes, body_bytes)))


class ChunkReader:
    """Takes chunks out of a stream as its bytes come, and never one byte more than a chunk's."""

    def __init__(self, head_bytes_max: int, body_bytes_max: int) -> None:
        self.head_bytes_max, self.body_bytes_max = head_bytes_max, body_bytes_max
        self._buffer = bytearray(CHUNK.size)  #: grows to the largest chunk, at most the two limits
        self._head_bytes = self._body_bytes = self._checksum = 0
        self._restart()

    def _restart(self) -> None:
        self._is_in_content, self._wanted_bytes, self._filled_bytes = False, CHUNK.size, 0

    @property
    def is_between(self) -> bool:
        """Nothing of the next chunk has come."""
        return not self._is_in_content and not self._filled_bytes

    @property
    def room(self) -> memoryview:
        """Where the next bytes go; say with `took` how many came."""
        return memoryview(self._buffer)[self._filled_bytes : self._wanted_bytes]

    def took(self, byte_count: int) -> tuple[memoryview, memoryview] | None:
        """Head and body of the chunk that is now whole, valid until the next `room`; or None.

        :raise WireError: a forbidden length, or bytes that were changed on their way."""
        self._filled_bytes += byte_count
        if self._filled_bytes < self._wanted_bytes:
            return None
        if not self._is_in_content:
            self._begin_content()
            return None
        content = memoryview(self._buffer)[: self._wanted_bytes]
        if _checksum(self._head_bytes, self._body_bytes, content) != self._checksum:
            raise WireError("the stream: wrong checksum, its bytes were changed on their way")
        self._restart()
        return content[: self._head_bytes], content[self._head_bytes :]

    def _begin_content(self) -> None:
        head, body, self._checksum = CHUNK.unpack_from(self._buffer)
        if not 0 < head <= self.head_bytes_max or body > self.body_bytes_max:
            raise WireError(
                f"the stream: chunk of {head} and {body} bytes, at most {self.head_bytes_max} and "
                f"{self.body_bytes_max} are allowed"
            )
        self._head_bytes, self._body_bytes = head, body
        self._is_in_content, self._wanted_bytes, self._filled_bytes = True, head + body, 0
        if len(self._buffer) < self._wanted_bytes:
            self._buffer = bytearray(self._wanted_bytes)
