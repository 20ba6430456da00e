"""A TCP proxy that can be cut: listens on 127.0.0.2 at the ports of a destination on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import socket
from collections.abc import AsyncIterator, Collection, Iterable

LISTEN = "127.0.0.2"
TARGET = "127.0.0.1"


class Hold:
    """Bytes of one connection that are kept back; `reached` tells that they came.

    :ivar before: what goes to the same side before them."""

    def __init__(self, port: int, word: bytes) -> None:
        self.port, self.word, self.before = port, word, b""
        self.reached, self.released = asyncio.Event(), asyncio.Event()


class Proxy:
    """Forwards each port to the same port of the target; owns listeners and connections."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._writers: dict[int, set[asyncio.StreamWriter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._holds: list[Hold] = []
        self._connected = asyncio.Condition()
        self._dead: set[int] = set()

    async def listen(self, offsets: Collection[int]) -> int:
        """Listen at ports so far from the first one, which are free at the target; return the first
        one. Who listens here has those of the target too: others look for theirs in the same way,
        each from another place on."""
        bases = range(21_000, 32_000, max(offsets) + 1)
        begin = os.getpid() % len(bases)
        for base in itertools.chain(bases[begin:], bases[:begin]):
            servers: list[asyncio.Server] = []
            ports = [base + offset for offset in offsets]
            try:
                for port in ports:
                    forward = functools.partial(self._forward, port)
                    servers.append(await asyncio.start_server(forward, LISTEN, port))
                _check_free(ports)
            except OSError:
                for server in servers:
                    server.close()
                continue
            self._servers += servers
            return base
        raise AssertionError("no free ports")

    async def _forward(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if port in self._dead:
            writer.close()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(TARGET, port)
        except OSError:
            writer.close()
            return
        self._writers.setdefault(port, set()).update((writer, far_writer))
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(port, source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        async with self._connected:
            self._connected.notify_all()

    async def _pump(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(256 * 1024):
                for hold in self._holds:
                    if port == hold.port and hold.word in data and not hold.reached.is_set():
                        hold.reached.set()
                        await hold.released.wait()
                        writer.write(hold.before)
                writer.write(data)
                await writer.drain()
        writer.close()

    def hold(self, port: int, word: bytes) -> Hold:
        """From the first bytes with this word on, let nothing through until it is released."""
        self._holds.append(Hold(port, word))
        return self._holds[-1]

    def release(self) -> None:
        """Let everything through that is held back."""
        for hold in self._holds:
            hold.released.set()

    async def connected(self, ports: Collection[int]) -> None:
        """Wait until there is a connection to each of these ports."""
        async with self._connected:
            await self._connected.wait_for(lambda: all(self._writers.get(port) for port in ports))

    def cut(self, ports: Collection[int], *, for_good: bool = False) -> int:
        """Reset every connection of these ports, with whatever is on its way; return how many.
        `for_good`: whoever connects again reaches nobody."""
        count = 0
        if for_good:
            self._dead.update(ports)
        for port in ports:
            writers = self._writers.pop(port, set())
            count += sum(not writer.is_closing() for writer in writers) // 2
            for writer in writers:
                writer.transport.abort()
        return count

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        self.cut(list(self._writers))
        for hold in self._holds:
            hold.released.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def proxy(offsets: Collection[int]) -> AsyncIterator[tuple[Proxy, int]]:
    """A proxy of the ports so far from the first of them, and that one."""
    proxying = Proxy()
    try:
        yield proxying, await proxying.listen(offsets)
    finally:
        await proxying.close()


def _check_free(ports: Iterable[int]) -> None:
    """:raise OSError: somebody listens at one of these ports of the target."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((TARGET, port))
