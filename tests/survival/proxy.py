"""A TCP proxy that can be cut: listens on 127.0.0.2 at the ports of a destination on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Iterable

LISTEN = "127.0.0.2"
TARGET = "127.0.0.1"


class Proxy:
    """Forwards each port to the same port of the target; owns listeners and connections."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._writers: dict[int, set[asyncio.StreamWriter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0

    async def listen(self, ports: Iterable[int]) -> None:
        for port in ports:
            forward = functools.partial(self._forward, port)
            self._servers.append(await asyncio.start_server(forward, LISTEN, port))

    async def _forward(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(TARGET, port)
        except OSError:
            writer.close()
            return
        self._writers.setdefault(port, set()).update((writer, far_writer))
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(256 * 1024):
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self, ports: Iterable[int]) -> None:
        """Reset every connection of these ports, with whatever is on its way."""
        for port in ports:
            for writer in self._writers.pop(port, ()):
                writer.transport.abort()

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        self.cut(list(self._writers))
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def proxy(ports: Iterable[int]) -> AsyncIterator[Proxy]:
    proxying = Proxy()
    try:
        await proxying.listen(ports)
        yield proxying
    finally:
        await proxying.close()


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that are free on both addresses just now."""
    for base in range(21_000, 60_000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    for host in (LISTEN, TARGET):
                        probe = stack.enter_context(socket.socket())
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind((host, port))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")
