"""The QMP server: listeners, one session a client, events to all of them.

No client can block the engine: what is read, what waits to be executed and what waits to be written
is bounded for each. A client that does not read loses its oldest events, and the loss is counted.
A command that has begun runs to its end even if its client leaves; only its answer is dropped then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Final

import msgspec

from engine import unixsocket
from engine.control.qmp.framing import JsonSplitter
from engine.control.qmp.registry import CommandRegistry, QmpError, parse_arguments
from engine.control.uri import Address
from engine.errors import MigrationError, UsageError, WireError, shown

log = logging.getLogger("ramferry.qmp")

CLIENTS_MAX: Final = 64
#: QEMU's QMP_REQ_QUEUE_LEN_MAX: so many, out-of-band ones too, wait for their answer; then nothing
#: more is read from the client.
REQUESTS_MAX: Final = 8
EVENTS_MAX: Final = 1024
READ_BYTES: Final = 64 * 1024
FLUSH_WAIT_S: Final = 1.0  #: a client that does not read for so long loses what waits for it
COMMANDS_WAIT_S: Final = 5.0  #: a command that has begun may go on for so long when all is closed
VERSION: Final = {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "ramferry-0.1.0"}

Json = dict[str, Any]


class Works:
    """Commands that have begun; they outlive the session that asked for them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, bytes]) -> asyncio.Future[bytes]:
        """Start it; whoever awaits what is returned may be cancelled, the work goes on."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def close(self) -> None:
        """Let all come to their end, for COMMANDS_WAIT_S at most, and cancel what is left."""
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=COMMANDS_WAIT_S)
            for task in late:
                log.warning("a command did not end within %.0f s and is given up", COMMANDS_WAIT_S)
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


class Session:
    """One client, from its greeting to its end; owns the connection."""

    def __init__(
        self,
        registry: CommandRegistry,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        works: Works,
    ) -> None:
        self._registry, self._reader, self._writer = registry, reader, writer
        self._works = works
        self._negotiated = False
        self._oob = False
        self._room = asyncio.Semaphore(REQUESTS_MAX)
        self._in_flight = 0  #: read and not answered, in order and out of band; <= REQUESTS_MAX
        self._requests: asyncio.Queue[Json | WireError] = asyncio.Queue()  #: bounded by `_room`
        self._events: deque[bytes] = deque()
        self._events_waiting = asyncio.Event()
        self._write_lock = asyncio.Lock()
        self._side: set[asyncio.Task[None]] = set()
        self.dropped_events = 0

    async def run(self) -> None:
        """Serve until the client leaves, or until a bug here makes that impossible."""
        helpers = [
            asyncio.ensure_future(self._read()),
            asyncio.ensure_future(self._execute_in_order()),
            asyncio.ensure_future(self._write_events()),
        ]
        is_cut = True
        try:
            await self._write(_line({"QMP": {"version": VERSION, "capabilities": ["oob"]}}))
            ended, _ = await asyncio.wait(helpers, return_when=asyncio.FIRST_COMPLETED)
            for helper in ended:
                helper.result()
            is_cut = False
        except ConnectionError:
            log.debug("a monitor's client is gone")
        finally:
            if is_cut:
                self.abort()  # first: `close` of the server may cancel what follows
            self._writer.close()
            for helper in (*helpers, *self._side):
                helper.cancel()
            await asyncio.gather(*helpers, *self._side, return_exceptions=True)
            await self._closed()

    def abort(self) -> None:
        """Close the connection, whatever its client has not read yet."""
        self._writer.transport.abort()

    async def _closed(self) -> None:
        """Wait for the end of the connection; a client that does not read ends after a bound."""
        with contextlib.suppress(ConnectionError):
            try:
                async with asyncio.timeout(FLUSH_WAIT_S):
                    await self._writer.wait_closed()
            except TimeoutError:
                self.abort()
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
        """Write what waits, for FLUSH_WAIT_S at most."""
        transport = self._writer.transport
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_WAIT_S):
                while self._events or self._in_flight or transport.get_write_buffer_size():
                    await asyncio.sleep(0.01)

    # -- reading ---------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Take requests until the client says no more, and wait until all are answered."""
        splitter = JsonSplitter()
        while data := await self._reader.read(READ_BYTES):
            for value in splitter.feed(data):
                request = value if isinstance(value, WireError) else _parse(value)
                await self._room.acquire()
                self._in_flight += 1
                if isinstance(request, dict) and self._oob and "exec-oob" in request:
                    task = asyncio.ensure_future(self._answer_aside(request))
                    self._side.add(task)
                    task.add_done_callback(self._side.discard)
                else:
                    self._requests.put_nowait(request)
        await self._requests.join()
        await asyncio.gather(*self._side)

    # -- executing -------------------------------------------------------------------------------

    async def _execute_in_order(self) -> None:
        while True:
            request = await self._requests.get()
            await self._answer(request)
            self._requests.task_done()

    async def _answer_aside(self, request: Json) -> None:
        with contextlib.suppress(ConnectionError):
            await self._answer(request)

    async def _answer(self, request: Json | WireError) -> None:
        """Execute one request and write its answer.

        :raise ConnectionError: the client is gone; the command was executed all the same."""
        try:
            await self._write(await self._works.begin(self._execute(request)))
        finally:
            self._in_flight -= 1
            self._room.release()

    async def _execute(self, request: Json | WireError) -> bytes:
        """The answer as a line; every request has one, whatever happens."""
        identity = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        try:
            if isinstance(request, WireError):
                text = str(request)
                known = text.startswith("QMP input")
                raise QmpError(text if known else f"JSON parse error, {text}")
            return _line({"return": await self._run(request)} | identity)
        except QmpError as exc:
            class_, text = exc.class_, str(exc)
        except MigrationError as exc:
            class_, text = "GenericError", str(exc)
        except Exception as exc:
            log.exception("internal error in a QMP command")
            class_, text = "GenericError", f"internal error: {exc!r}"
        text = text.encode(errors="backslashreplace").decode()  # a name of a file may be no UTF-8
        return _line({"error": {"class": class_, "desc": text}} | identity)

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
                raise QmpError(f"QMP input member '{shown(member)}' is unexpected")
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
                raise QmpError(f"Parameter '{shown(name)}' is unexpected")
        if not isinstance(enable, list):
            raise QmpError("Invalid parameter type for 'enable', expected: array")
        for name in enable:
            if name != "oob":
                raise QmpError(f"Parameter 'enable' does not accept value '{shown(name)}'")
        self._oob = "oob" in enable
        self._negotiated = True
        return {}

    # -- writing ---------------------------------------------------------------------------------

    async def _write(self, line: bytes) -> None:
        async with self._write_lock:
            self._writer.write(line)
            await self._writer.drain()

    async def _write_events(self) -> None:
        while True:
            await self._events_waiting.wait()
            self._events_waiting.clear()
            while self._events:
                async with self._write_lock:
                    self._writer.write(self._events.popleft())
                    await self._writer.drain()


def _parse(value: bytes) -> Json | WireError:
    """One JSON object, of strings without surrogates and numbers of 64 bits."""
    try:
        request = json.loads(
            value.decode(), parse_int=_integer, parse_float=_number, parse_constant=_no_constant
        )
        msgspec.json.encode(request)  # so that an answer can hold whatever a request held
    except UnicodeError:
        return WireError("invalid UTF-8 or surrogate in a string")
    except (ValueError, RecursionError) as exc:
        return WireError(str(exc))
    if not isinstance(request, dict):
        return WireError("QMP input must be a JSON object")
    return request


def _integer(text: str) -> int | float:
    """An integer if it has 64 bits, else a float, as in QEMU."""
    if len(text) <= len(str(-(2**63))) and -(2**63) <= int(text) < 2**64:
        return int(text)
    return _number(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"invalid keyword '{text}'")


def _line(message: Json) -> bytes:
    return msgspec.json.encode(message) + b"\r\n"


class QmpServer:
    """Listeners and sessions; owns both, and the files of unix listeners."""

    def __init__(self, registry: CommandRegistry) -> None:
        self._registry = registry
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._sessions: dict[Session, asyncio.Task[Any]] = {}
        self._works = Works()
        self._is_closing = False

    async def listen(self, address: Address) -> None:
        """Accept clients at `address` (unix sockets get mode 0600).

        :raise UsageError: something else listens there, or it cannot be used."""
        try:
            if address.path:
                bound = unixsocket.bind(address.path)
                server = await asyncio.start_unix_server(self._serve, sock=bound)
                self._paths.append(address.path)
            else:
                server = await asyncio.start_server(self._serve, address.host, address.port)
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise UsageError(f"a monitor cannot listen at '{address.display}': {reason}") from exc
        self._servers.append(server)
        if not address.path and not address.port:
            for listener in server.sockets:
                port = listener.getsockname()[1]
                log.info("a monitor listens at tcp:%s", replace(address, port=port).display)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_closing or len(self._sessions) >= CLIENTS_MAX:
            writer.close()
            return
        session = Session(self._registry, reader, writer, self._works)
        task = asyncio.current_task()
        assert task is not None
        self._sessions[session] = task
        try:
            await session.run()
        except asyncio.CancelledError:
            log.debug("a session was ended by close")  # asyncio takes a cancelled handler for a bug
        except Exception:
            log.exception("internal error in a QMP session; it is closed")
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
        """Let clients have what waits for them, then end everything. Idempotent.

        Takes FLUSH_WAIT_S and COMMANDS_WAIT_S at most, whatever the clients do."""
        self._is_closing = True
        for server in self._servers:
            server.close()
        sessions = dict(self._sessions)
        await asyncio.gather(*(session.flush() for session in sessions))
        for session, task in sessions.items():
            session.abort()  # `wait_closed` below waits for every connection (Python >= 3.12)
            task.cancel()
        await asyncio.gather(*sessions.values(), return_exceptions=True)
        await self._works.close()
        for server in self._servers:
            await server.wait_closed()
        self._servers = []
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._paths = []
