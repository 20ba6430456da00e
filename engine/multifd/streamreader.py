"""A receiver's end of a stream: whole chunks from a descriptor, and never a byte beyond them."""

from __future__ import annotations

import os

from engine import wire


class StreamReader:
    """Owns its descriptor, which control has made non-blocking; -1 when it is closed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._chunks = wire.ChunkReader(wire.HEADER_BYTES_MAX, wire.PAYLOAD_BYTES_MAX)

    def read(self) -> tuple[memoryview, memoryview] | None:
        """Header and payload of the next packet, valid until the next call; None: more must come.

        :raise ConnectionError: the stream has ended, or cannot be read.
        :raise WireError: what came is no chunk."""
        while True:
            try:
                byte_count = os.readv(self.fd, [self._chunks.room])
            except BlockingIOError:
                return None
            except OSError as exc:
                raise ConnectionError(f"Unable to read: {exc.strerror}") from None
            if not byte_count:
                raise ConnectionError("the stream ended early")
            if (taken := self._chunks.took(byte_count)) is not None:
                return taken

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def frames_of(packet: wire.Packet, payload: memoryview) -> list[memoryview]:
    """The payload as the frames that the header speaks of; one frame where their sizes differ."""
    sizes = packet.frame_sizes()
    if sum(sizes) != len(payload) or not sizes:
        return [payload] if payload else []
    frames, at = [], 0
    for size in sizes:
        frames.append(payload[at : at + size])
        at += size
    return frames
