"""The human monitor's sockets: listeners, one session a client.

No client can block the engine: what is read and what waits to be run is bounded for each, and more
is read only when that has been run. A command that has begun runs to its end even if its client
leaves; only what it prints is dropped then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from engine.control.hmp.console import Console
from engine.control.hmp.monitor import TOO_LONG, HumanMonitor
from engine.control.hmp.telnet import LineSplitter, Overlong
from engine.control.qmp.listener import Listeners
from engine.control.uri import Address

log = logging.getLogger("ramferry.hmp")

PROMPT: Final = b"(ramferry) "
CLIENTS_MAX: Final = 16  #: people, not programs
READ_BYTES: Final = 4096
#: Lines that wait to be run: with READ_BYTES in asyncio's buffer (twice) and in hand, and lines of
#: LINE_BYTES_MAX bytes, a client can have 76 KiB here.
LINES_MAX: Final = 16
END_WAIT_S: Final = 5.0  #: a command that has begun may go on for so long when all is closed
FLUSH_WAIT_S: Final = 1.0  #: a client that does not read for so long loses what waits for it


def banner() -> bytes:
    """The first line that a client sees."""
    try:
        number = version("ramferry")
    except PackageNotFoundError:
        number = "(not installed)"
    return f"ramferry {number} monitor - type 'help' for more information\r\n".encode()


class Session:
    """One client, from the banner to its end; owns the connection."""

    def __init__(
        self, monitor: HumanMonitor, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._monitor, self._reader, self._writer = monitor, reader, writer
        self._lines: asyncio.Queue[bytes | Overlong | None] = asyncio.Queue(LINES_MAX)
        self._is_ending = False

    async def run(self) -> None:
        """Serve until the client leaves or quits; a client that ends its input gets its answers."""
        reading = asyncio.ensure_future(self._read())
        try:
            await self._write(banner() + PROMPT)
            while not self._is_ending and (line := await self._lines.get()) is not None:
                console = await self._execute(line)
                if console.is_over:
                    await self._write(console.text.encode(errors="backslashreplace"))
                    break
                await self._write(console.text.encode(errors="backslashreplace") + PROMPT)
                await asyncio.sleep(0)  # nothing else suspends while lines wait
        except OSError:  # TCP knows more ends than ConnectionError, such as ETIMEDOUT
            log.debug("a client of the human monitor is gone")
        finally:
            reading.cancel()
            self._writer.close()
            await asyncio.gather(reading, return_exceptions=True)
            await self._closed()

    def end(self) -> None:
        """Run no more lines; what has begun goes on."""
        self._is_ending = True
        if self._lines.empty():
            self._lines.put_nowait(None)

    def abort(self) -> None:
        """Close the connection, whatever its client has not read yet."""
        self._writer.transport.abort()

    async def _closed(self) -> None:
        with contextlib.suppress(OSError):
            try:
                async with asyncio.timeout(FLUSH_WAIT_S):
                    await self._writer.wait_closed()
            except TimeoutError:  # it does not read, or its network is gone
                self.abort()
                await self._writer.wait_closed()

    async def _read(self) -> None:
        """Lines into the queue, None behind the last one; a line without an end is no line."""
        splitter = LineSplitter()
        with contextlib.suppress(OSError):
            while data := await self._reader.read(READ_BYTES):
                for line in splitter.feed(data):
                    await self._lines.put(line)
        await self._lines.put(None)

    async def _execute(self, line: bytes | Overlong) -> Console:
        console = Console(can_wait=True)
        if isinstance(line, Overlong):
            console.refuse(TOO_LONG)
            return console
        try:
            text = line.decode()
        except UnicodeDecodeError:
            console.refuse("Error: a line must be UTF-8")
            return console
        await self._monitor.run(text, console)
        return console

    async def _write(self, data: bytes) -> None:
        """:raise OSError: the client is gone."""
        self._writer.write(data)
        await self._writer.drain()


class HmpServer:
    """Listeners and sessions; owns both."""

    def __init__(self, monitor: HumanMonitor) -> None:
        self._monitor = monitor
        self._listeners = Listeners(self._accept)
        self._sessions: dict[asyncio.Task[None], Session | None] = {}  #: None: not greeted yet
        self._is_closing = False

    @property
    def clients(self) -> int:
        """How many are connected; CLIENTS_MAX at most."""
        return len(self._sessions)

    async def listen(self, address: Address) -> None:
        """Accept clients at `address` (unix sockets get mode 0600).

        :raise UsageError: something else listens there, or it cannot be used."""
        await self._listeners.open(address)

    def _accept(self, connected: socket.socket) -> None:
        if self._is_closing or len(self._sessions) >= CLIENTS_MAX:
            with contextlib.suppress(OSError):
                connected.setblocking(False)
                connected.send(f"Error: {CLIENTS_MAX} clients are connected\r\n".encode())
            connected.close()
            return
        task = asyncio.ensure_future(self._serve(connected))
        self._sessions[task] = None
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._sessions[task]

    async def _serve(self, connected: socket.socket) -> None:
        try:
            streams = await asyncio.open_connection(sock=connected, limit=READ_BYTES)
            task = asyncio.current_task()
            assert task is not None
            session = self._sessions[task] = Session(self._monitor, *streams)
            if self._is_closing:
                session.end()
            await session.run()
        except Exception:
            log.exception("internal error in a session of the human monitor; it is closed")
        finally:
            connected.close()

    async def close(self) -> None:
        """End all sessions; who waits for a migration waits no more. Idempotent.

        Takes FLUSH_WAIT_S and END_WAIT_S at most, whatever the clients do."""
        self._is_closing = True
        self._monitor.held.close()
        self._listeners.close()
        sessions = dict(self._sessions)
        for session in sessions.values():
            if session is not None:
                session.end()
        if sessions:
            await self._wait_for(set(sessions))

    async def _wait_for(self, left: set[asyncio.Task[None]]) -> None:
        """First for clients that read, then for commands that have begun, then for nobody."""
        _, left = await asyncio.wait(left, timeout=FLUSH_WAIT_S)
        for task in left:
            if (session := self._sessions[task]) is not None:
                session.abort()
        if left:
            _, left = await asyncio.wait(left, timeout=END_WAIT_S)
        for task in left:
            log.warning("a command did not end within %.0f s and is given up", END_WAIT_S)
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
