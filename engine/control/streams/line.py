"""Control's turn on a stream: whole messages, exactly as many bytes as they have."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any, Final

from engine import wire
from engine.control.framestream import ConnectionLost
from engine.control.waiting import until_readable, until_writable
from engine.errors import WireError

#: A peer that takes nothing for so long is gone; the guest may stand meanwhile.
WRITE_WAIT_S: Final = 20.0


class ChunkWriter:
    """Messages out, one after the other; the descriptor is its caller's."""

    def __init__(self, fd: int, *, is_file: bool = False) -> None:
        """:param is_file: a write may take as long as a disk does, whatever the descriptor says."""
        self._fd, self._is_file = fd, is_file
        self._turn = asyncio.Lock()
        self._writing: asyncio.Future[int] | None = None  #: in a thread, to a file
        self.sent_bytes = 0

    async def send(self, message: wire.Message) -> None:
        """Write a message; when this returns, whoever reads may have all of it, and when it raises,
        nobody ever has the last of it.

        :raise ConnectionLost: nobody reads, or there is no room."""
        async with self._turn:
            rest = memoryview(wire.chunk(wire.encode(message)))
            try:
                async with asyncio.timeout(None if self._is_file else WRITE_WAIT_S):
                    while rest:
                        rest = rest[await self._write(rest) :]
            except TimeoutError as exc:
                raise ConnectionLost("the stream is lost: nobody reads it") from exc
            except OSError as exc:
                reason = f"Unable to write: {exc.strerror}"
                raise ConnectionLost(f"the stream is lost: {reason}") from None

    async def _write(self, data: memoryview) -> int:
        if self._is_file:
            loop = asyncio.get_running_loop()
            self._writing = loop.run_in_executor(None, os.write, self._fd, data)
            count = await asyncio.shield(self._writing)
        else:
            try:
                count = os.write(self._fd, data)
            except BlockingIOError:
                await until_writable(self._fd)
                return 0
        self.sent_bytes += count
        return count

    async def settle(self) -> None:
        """Wait for a write that was cancelled: its descriptor can be closed after this."""
        if self._writing is not None:
            with contextlib.suppress(OSError):
                await self._writing


class MessageReader:
    """Messages in; the descriptor is its caller's."""

    def __init__(self, fd: int, types: Any, bytes_max: int) -> None:
        self._fd = fd
        self._chunks = wire.ChunkReader(bytes_max, 0)
        self._decoder: wire.Decoder[Any] = wire.Decoder(types, bytes_max, "the stream")

    async def receive(self) -> Any:
        """The next message; cancelling this loses nothing.

        :raise ConnectionLost: the stream has ended.
        :raise WireError: it is not of our language, or was changed on its way."""
        while True:
            try:
                byte_count = os.readv(self._fd, [self._chunks.room])
            except BlockingIOError:
                await until_readable(self._fd)
                continue
            except OSError as exc:
                raise ConnectionLost(
                    f"the stream is lost: Unable to read: {exc.strerror}"
                ) from None
            if not byte_count:
                raise ConnectionLost(
                    "the stream ended" + ("" if self._chunks.is_between else " early")
                )
            taken = self._chunks.took(byte_count)
            if taken is not None:
                if taken[1]:
                    raise WireError("the stream: a message with a body")
                return self._decoder.decode(bytes(taken[0]))
