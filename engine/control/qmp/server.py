"""The QMP server: listeners, one session a client, events to all of them.

No client can block the engine: what is read, what waits to be executed and what waits to be written
is bounded for each. A client that does not read loses its oldest events, and the loss is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
import time
from collections import deque
from typing import Any, Final

import msgspec

from engine.control.qmp.framing import JsonSplitter
from engine.control.qmp.registry import CommandRegistry, QmpError, parse_arguments
from engine.control.uri import Address
from engine.errors import MigrationError, UsageError, WireError

log = logging.getLogger("ramferry.qmp")

CLIENTS_MAX: Final = 64
REQUESTS_MAX: Final = 8  #: QEMU's QMP_REQ_QUEUE_LEN_MAX: then nothing more is read from the client
EVENTS_MAX: Final = 1024
READ_BYTES: Final = 64 * 1024
VERSION: Final = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "ramferry-0.1.0"}

Json = dict[str, Any]


class Session:
    """One client, from its greeting to its end; owns the connection."""

    def __init__(
        self,
        registry: CommandRegistry,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._registry, self._reader, self._writer = registry, reader, writer
        self._negotiated = False
        self._oob = False
        self._requests: asyncio.Queue[Json | WireError] = asyncio.Queue(REQUESTS_MAX)
        self._events: deque[bytes] = deque()
        self._events_waiting = asyncio.Event()
        self._write_lock = asyncio.Lock()
        self._side: set[asyncio.Task[None]] = set()
        self.dropped_events = 0

    async def run(self) -> None:
        """Serve until the client leaves."""
        helpers = [
            asyncio.ensure_future(self._execute_in_order()),
            asyncio.ensure_future(self._write_events()),
        ]
        try:
            await self._write({"QMP": {"version": VERSION, "capabilities": ["oob"]}})
            await self._read()
        except (ConnectionError, asyncio.IncompleteReadError):
            log.debug("a monitor's client is gone")
        finally:
            self._writer.close()  # first: `close` of the server may cancel what follows
            for helper in (*helpers, *self._side):
                helper.cancel()
            await asyncio.gather(*helpers, *self._side, return_exceptions=True)
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()

    def notify(self, line: bytes) -> None:
        """Queue an event; the oldest one is dropped when the client does not read."""
        if not self._negotiated:
            return
        if len(self._events) >= EVENTS_MAX:
            self._events.popleft()
            self.dropped_events += 1
        self._events.append(line)
        self._events_waiting.set()

    async def flush(self) -> None:
        """Write what waits, for a second at most."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(1.0):
                while self._events or not self._requests.empty():
                    await asyncio.sleep(0.01)
                await self._writer.drain()

    # -- reading ---------------------------------------------------------------------------------

    async def _read(self) -> None:
        splitter = JsonSplitter()
        while data := await self._reader.read(READ_BYTES):
            for value in splitter.feed(data):
                request = value if isinstance(value, WireError) else self._parse(value)
                if isinstance(request, dict) and self._oob and "exec-oob" in request:
                    task = asyncio.ensure_future(self._answer(request))
                    self._side.add(task)
                    task.add_done_callback(self._side.discard)
                else:
                    await self._requests.put(request)
        await self._requests.join()

    @staticmethod
    def _parse(value: bytes) -> Json | WireError:
        try:
            request = json.loads(value)
        except (ValueError, RecursionError) as exc:
            return WireError(str(exc))
        if not isinstance(request, dict):
            return WireError("QMP input must be a JSON object")
        return request

    # -- executing -------------------------------------------------------------------------------

    async def _execute_in_order(self) -> None:
        while True:
            request = await self._requests.get()
            try:
                await self._answer(request)
            except ConnectionError:
                return
            finally:
                self._requests.task_done()

    async def _answer(self, request: Json | WireError) -> None:
        identity = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        try:
            if isinstance(request, WireError):
                text = str(request)
                known = text.startswith("QMP input")
                raise QmpError(text if known else f"JSON parse error, {text}")
            answer: Json = {"return": await self._run(request)}
        except QmpError as exc:
            answer = {"error": {"class": exc.class_, "desc": str(exc)}}
        except MigrationError as exc:
            answer = {"error": {"class": "GenericError", "desc": str(exc)}}
        except Exception as exc:
            log.exception("internal error in a QMP command")
            answer = {"error": {"class": "GenericError", "desc": f"internal error: {exc!r}"}}
        await self._write(answer | identity)

    async def _run(self, request: Json) -> object:
        name, arguments = self._check(request)
        if not self._negotiated:
            if name != "qmp_capabilities":
                raise QmpError(
                    "Expecting capabilities negotiation with 'qmp_capabilities'",
                    "CommandNotFound",
                )
            return self._negotiate(arguments)
        if name == "qmp_capabilities":
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored",
                "CommandNotFound",
            )
        command = self._registry.find(name)
        if "exec-oob" in request and not command.oob:
            raise QmpError(f"The command {name} does not support OOB")
        answer = await command.handler(parse_arguments(command.arguments, arguments))
        return {} if answer is None else answer

    def _check(self, request: Json) -> tuple[str, Json]:
        """The members of a request.

        :raise QmpError: QEMU's text for a wrong one."""
        verb = "exec-oob" if self._oob and "exec-oob" in request else "execute"
        for member in request:
            if member not in (verb, "arguments", "id"):
                raise QmpError(f"QMP input member '{member}' is unexpected")
        if verb not in request:
            raise QmpError("QMP input lacks member 'execute'")
        name, arguments = request[verb], request.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError(f"QMP input member '{verb}' must be a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        return name, arguments

    def _negotiate(self, arguments: Json) -> Json:
        enable = arguments.get("enable", [])
        for name in arguments:
            if name != "enable":
                raise QmpError(f"Parameter '{name}' is unexpected")
        if not isinstance(enable, list):
            raise QmpError("Invalid parameter type for 'enable', expected: array")
        for name in enable:
            if name != "oob":
                raise QmpError(f"Parameter 'enable' does not accept value '{name}'")
        self._oob = "oob" in enable
        self._negotiated = True
        return {}

    # -- writing ---------------------------------------------------------------------------------

    async def _write(self, message: Json) -> None:
        async with self._write_lock:
            self._writer.write(msgspec.json.encode(message) + b"\r\n")
            await self._writer.drain()

    async def _write_events(self) -> None:
        while True:
            await self._events_waiting.wait()
            self._events_waiting.clear()
            while self._events:
                async with self._write_lock:
                    self._writer.write(self._events.popleft())
                    try:
                        await self._writer.drain()
                    except ConnectionError:
                        return


class QmpServer:
    """Listeners and sessions; owns both, and the files of unix listeners."""

    def __init__(self, registry: CommandRegistry) -> None:
        self._registry = registry
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._sessions: dict[Session, asyncio.Task[Any]] = {}

    async def listen(self, address: Address) -> None:
        """Accept clients at `address` (unix sockets get mode 0600).

        :raise UsageError: something else listens there, or it cannot be used."""
        try:
            if address.path:
                _remove_stale(address.path)
                mask = os.umask(0o177)
                try:
                    server = await asyncio.start_unix_server(self._serve, address.path)
                finally:
                    os.umask(mask)
                self._paths.append(address.path)
            else:
                server = await asyncio.start_server(self._serve, address.host, address.port)
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise UsageError(f"a monitor cannot listen at '{address.display}': {reason}") from exc
        self._servers.append(server)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._sessions) >= CLIENTS_MAX:
            writer.close()
            return
        session = Session(self._registry, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._sessions[session] = task
        try:
            await session.run()
        except asyncio.CancelledError:
            log.debug("a session was ended by close")  # asyncio takes a cancelled handler for a bug
        finally:
            del self._sessions[session]

    def emit(self, event: str, data: Json | None = None) -> None:
        """Send an event to every client; never blocks."""
        now_us = time.time_ns() // 1000
        message: Json = {"event": event}
        if data is not None:
            message["data"] = data
        stamp = {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000}
        line = msgspec.json.encode(message | {"timestamp": stamp}) + b"\r\n"
        for session in self._sessions:
            session.notify(line)

    async def close(self) -> None:
        """Let clients have what waits for them, then end everything. Idempotent."""
        for server in self._servers:
            server.close()
        sessions = dict(self._sessions)
        await asyncio.gather(*(session.flush() for session in sessions))
        for task in sessions.values():
            task.cancel()
        await asyncio.gather(*sessions.values(), return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        self._servers = []
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._paths = []


def _remove_stale(path: str) -> None:
    """Remove the socket of a monitor that died.

    :raise UsageError: somebody answers there, or it is no socket."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(f"'{path}' exists and is not a socket; choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as exc:
            raise UsageError(f"'{path}' cannot be used: {exc.strerror}") from exc
    raise UsageError(f"another process listens at '{path}'; quit it or choose another path")
