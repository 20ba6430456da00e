"""The token: how the right to run goes from one guest to the other, whichever process dies.

The destination listens, the source connects during setup. Each message is 24 bytes: magic, version,
kind, session. The source's side of the conversation:

    HELLO -> WAITING               during setup: somebody is there
    TAKE  -> TAKEN | REFUSED       the source has already given up its right when it sends this
    ASK   -> TAKEN | VOID          after a TAKE whose answer was lost, on a new connection
    CONFIRM                        TAKEN has arrived: nobody will ask again

A session is void for ever once the destination has said so, or was disarmed. So an answer other
than TAKEN, or nobody listening any more, means that this session's token was not and never will be
taken. To keep that true the destination goes on listening after TAKEN until CONFIRM has come. With
no answer at all before the deadline the outcome is unknown, and the source stays stopped.

Decisions are in `DestinationToken` and `SourceToken`, which know no sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from engine.errors import ChannelError, GuestError, UsageError, WireError
from engine.guest.base import Handover

MAGIC: Final = b"rfho"
VERSION: Final = 1
MESSAGE: Final = struct.Struct("<4sHH16s")
SESSION_BYTES: Final = 16
CONNECTIONS_MAX: Final = 4  #: the oldest gives way, so nobody can keep the right source out
VOIDED_MAX: Final = 1024  #: sessions that strangers may have voided; past it they get no answer
MESSAGE_WAIT_S: Final = 5.0  #: from a message's first byte, or the connection, to its last
ANSWER_WAIT_S: Final = 1.0  #: for one answer; then the source asks again on a new connection
RETRY_WAIT_S: Final = 0.02
CONNECT_WAIT_S: Final = 10.0  #: for the greeting during setup
CHANNEL_INDEX: Final = -1  #: the handover connection in `ChannelError`


class Kind(enum.IntEnum):
    """What a message says; 0 says nothing."""

    HELLO = 1
    WAITING = 2
    TAKE = 3
    TAKEN = 4
    REFUSED = 5
    ASK = 6
    VOID = 7
    CONFIRM = 8


def encode(kind: Kind, session: bytes) -> bytes:
    """One message."""
    return MESSAGE.pack(MAGIC, VERSION, kind, session)


def decode(message: bytes) -> tuple[Kind, bytes]:
    """:raise WireError: not a message of this protocol; names what was wrong."""
    if len(message) != MESSAGE.size:
        raise WireError(f"handover message of {len(message)} bytes, {MESSAGE.size} expected")
    magic, version, kind, session = MESSAGE.unpack(message)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"handover magic {magic!r} version {version}, {MAGIC!r} {VERSION} expected")
    if kind not in Kind.__members__.values() or session == bytes(SESSION_BYTES):
        raise WireError(f"handover message kind {kind} or session is not allowed")
    return Kind(kind), session


# -- decisions -----------------------------------------------------------------------------------


@dataclass(slots=True)
class DestinationToken:
    """The destination's half. `taken` is the session that made this guest the one that runs."""

    armed: bytes | None = None
    taken: bytes | None = None
    confirmed: bool = False  #: the source knows that it was taken
    voided: set[bytes] = field(default_factory=set)

    def arm(self, session: bytes) -> None:
        """Take the token of `session` when it comes.

        :raise GuestError: another was taken, or this one was voided; nothing changes."""
        if self.taken is not None:
            raise GuestError("this guest has taken over already; it cannot be armed again")
        if session in self.voided:
            raise GuestError("the source was told that this session is void; begin a new migration")
        if len(session) != SESSION_BYTES or session == bytes(SESSION_BYTES):
            raise GuestError(f"a session is {SESSION_BYTES} bytes and not zero")
        self.armed = session

    def disarm(self) -> bool:
        """Void the armed session; False when the token was taken before."""
        if self.taken is not None:
            return False
        if self.armed is not None:
            self.voided.add(self.armed)
            self.armed = None
        return True

    def answer(self, kind: Kind, session: bytes) -> Kind | None:
        """Take a message in; None: no answer, the connection ends (or goes on after CONFIRM)."""
        match kind:
            case Kind.HELLO:
                return Kind.WAITING
            case Kind.TAKE if self.armed == session and session not in self.voided:
                self.armed, self.taken = None, session
                return Kind.TAKEN
            case Kind.TAKE | Kind.ASK if self.taken == session:
                return Kind.TAKEN
            case Kind.TAKE | Kind.ASK if self._void(session):
                return Kind.REFUSED if kind is Kind.TAKE else Kind.VOID
            case Kind.CONFIRM if self.taken == session:
                self.confirmed = True
        return None

    def _void(self, session: bytes) -> bool:
        """Promise never to take `session`; False when there is no room to remember the promise."""
        if session != self.armed and len(self.voided) >= VOIDED_MAX:
            return session in self.voided
        self.voided.add(session)
        if session == self.armed:
            self.armed = None
        return True


@dataclass(slots=True)
class SourceToken:
    """The source's half, for one session."""

    is_sent: bool = False  #: TAKE may have left: only an answer tells who has the token

    def next_message(self) -> Kind:
        """What to send on a fresh or idle connection; the answer may be lost from here on."""
        kind = Kind.ASK if self.is_sent else Kind.TAKE
        self.is_sent = True
        return kind

    def answered(self, kind: Kind) -> Handover:
        """:raise WireError: no answer to what was sent; ask again."""
        if kind is Kind.TAKEN:
            return Handover.TAKEN
        if kind in (Kind.REFUSED, Kind.VOID):
            return Handover.REFUSED
        raise WireError(f"handover answered with {kind.name}")

    def nobody_listens(self) -> Handover:
        """The destination guest is gone; it listens for as long as it could have an answer."""
        return Handover.REFUSED

    def gave_up(self) -> Handover:
        """The deadline has passed."""
        return Handover.UNKNOWN if self.is_sent else Handover.REFUSED


# -- endpoints -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`tcp:HOST:PORT` or `unix:PATH`; `path` is empty for tcp."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """:raise UsageError: says what is allowed."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and 0 < len(os.fsencode(rest)) <= 107 and "\0" not in rest:
        return Endpoint(path=rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and port.isascii() and port.isdigit() and int(port) <= 65535:
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        return Endpoint(host=host, port=int(port))
    raise UsageError(
        f"handover endpoint '{text}' is neither tcp:HOST:PORT nor unix:PATH (at most 107 bytes)"
    )


class NobodyListens(Exception):
    """Every address of the endpoint said so."""


def _bind_unix(path: str) -> socket.socket:
    """Bind a socket that only this user can reach; a dead one in its place is removed."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not _is_alive(path):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    return listener


async def _bind_tcp(endpoint: Endpoint) -> socket.socket:
    """Bind one address, so that one port says it all; an empty host means every address."""
    if not endpoint.host:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", endpoint.port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", endpoint.port))
    family, address = (await _addresses(endpoint))[0]
    return socket.create_server(address[:2], family=socket.AddressFamily(family))


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path) != errno.ECONNREFUSED


async def _addresses(endpoint: Endpoint) -> list[tuple[int, Any]]:
    if endpoint.path:
        return [(socket.AF_UNIX, endpoint.path)]
    found = await asyncio.get_running_loop().getaddrinfo(
        endpoint.host or None, endpoint.port, type=socket.SOCK_STREAM
    )
    return [(family, address) for family, _, _, _, address in found]


async def _connect_any(addresses: list[tuple[int, Any]]) -> socket.socket:
    """:raise NobodyListens: all refuse. :raise OSError: none answers, and one did not refuse."""
    failure: OSError | None = None
    for family, address in addresses:
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(connection, address)
        except OSError as exc:
            connection.close()
            if not isinstance(exc, (ConnectionRefusedError, FileNotFoundError)):
                failure = exc
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    if failure is not None:
        raise failure
    raise NobodyListens


# -- the destination's end -----------------------------------------------------------------------


class HandoverListener:
    """Where the token may come in; owns the listener and its connections.

    `on_taken` is called, once, in the same step that makes this guest the owner; `on_confirmed`
    when nobody will ask again.
    """

    def __init__(
        self,
        token: DestinationToken,
        on_taken: Callable[[], None],
        on_confirmed: Callable[[], None],
    ) -> None:
        self._token, self._on_taken, self._on_confirmed = token, on_taken, on_confirmed
        self._server: asyncio.Server | None = None
        self._path = ""
        self._connections: list[asyncio.Task[None]] = []

    async def listen(self, uri: str) -> str:
        """Listen at `uri`; return the endpoint with the port that was chosen.

        :raise GuestError: cannot listen there."""
        endpoint = parse_endpoint(uri)
        try:
            if endpoint.path:
                listener = _bind_unix(endpoint.path)
                self._server = await asyncio.start_unix_server(self._accept, sock=listener)
                self._path = endpoint.path
            else:
                listener = await _bind_tcp(endpoint)
                self._server = await asyncio.start_server(self._accept, sock=listener)
        except OSError as exc:
            raise GuestError(f"cannot listen for the handover at {uri}") from exc
        if endpoint.path:
            return str(endpoint)
        return str(Endpoint(endpoint.host, self._server.sockets[0].getsockname()[1]))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            self._connections.pop(0).cancel()
        task = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        self._connections.append(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        if task in self._connections:
            self._connections.remove(task)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends or says something that is not allowed."""
        try:
            async with asyncio.timeout(MESSAGE_WAIT_S):
                message = await reader.readexactly(MESSAGE.size)
            while self._reply(writer, message):
                await writer.drain()
                begun = await reader.readexactly(1)
                async with asyncio.timeout(MESSAGE_WAIT_S):
                    message = begun + await reader.readexactly(MESSAGE.size - 1)
        except (OSError, EOFError, WireError):
            pass  # the connection is worth nothing; the source will make another
        finally:
            writer.close()

    def _reply(self, writer: asyncio.StreamWriter, message: bytes) -> bool:
        kind, session = decode(message)
        was_taken = self._token.taken is not None
        answer = self._token.answer(kind, session)
        if self._token.taken is not None and not was_taken:
            self._on_taken()
        if answer is None:
            if self._token.confirmed:
                self._on_confirmed()
            return False
        writer.write(encode(answer, session))
        return True

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        connections, self._connections = self._connections, []
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()


class DestinationEnd:
    """A guest's whole destination half: token and listener, from `listen` to `close`."""

    def __init__(self, on_taken: Callable[[], None]) -> None:
        self._on_taken = on_taken
        self.token = DestinationToken()
        self._listener: HandoverListener | None = None
        self._is_close_due = False  #: closed by our side, but the source may still ask
        self._closing: asyncio.Task[None] | None = None

    async def listen(self, uri: str) -> str:
        """:raise GuestError: cannot listen there, or this guest has taken over."""
        if self.token.taken is not None:
            raise GuestError("this guest has taken over already; it cannot listen for another")
        await self._give_up_listener()
        listener = HandoverListener(self.token, self._on_taken, self._confirmed)
        endpoint = await listener.listen(uri)
        self._listener = listener
        return endpoint

    def arm(self, session: bytes) -> None:
        """:raise GuestError: not listening, or the session is void."""
        if self._listener is None:
            raise GuestError("this guest does not listen for a handover; it cannot be armed")
        self.token.arm(session)

    def disarm(self) -> bool:
        return self.token.disarm()

    async def close(self) -> None:
        """Disarm and stop listening; a token that was taken is answered for until confirmed."""
        self.token.disarm()
        self._is_close_due = True
        if self.token.taken is None or self.token.confirmed:
            await self._give_up_listener()

    def _confirmed(self) -> None:
        if self._is_close_due and self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._give_up_listener())

    async def end(self) -> None:
        """Stop listening, whatever the source knows: the guest ends. Idempotent."""
        self.token.disarm()
        await self._give_up_listener()
        if self._closing is not None:
            await self._closing

    async def _give_up_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.close()


# -- the source's end ----------------------------------------------------------------------------


class SourceEnd:
    """A source guest's connection to the destination guest, for one session; owns it."""

    def __init__(self, session: bytes) -> None:
        self._session = session
        self._addresses: list[tuple[int, Any]] = []
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._token = SourceToken()
        self.is_busy = False  #: a token is under way: do not close, and do not run

    async def connect(self, endpoint: str) -> None:
        """Connect and exchange greetings.

        :raise ChannelError: nobody answers there; closed again."""
        try:
            async with asyncio.timeout(CONNECT_WAIT_S):
                for family, address in await _addresses(parse_endpoint(endpoint)):
                    self._addresses.append((family, address))
                await self._reconnect()
                if await self._exchange(Kind.HELLO) is not Kind.WAITING:
                    raise WireError("not the answer to a greeting")
        except (NobodyListens, OSError, EOFError, WireError) as exc:
            self.close()
            raise ChannelError(CHANNEL_INDEX, f"connecting the handover to {endpoint}") from exc

    async def _reconnect(self) -> None:
        self.close()
        connection = await _connect_any(self._addresses)
        #: What worked once is the destination; its other addresses may be somebody else's.
        self._addresses = [(connection.family, connection.getpeername())]
        self._reader, self._writer = await asyncio.open_connection(sock=connection)

    async def _exchange(self, kind: Kind) -> Kind:
        """Send one message and await its answer; any failure leaves the connection useless."""
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(encode(kind, self._session))
        await self._writer.drain()
        async with asyncio.timeout(ANSWER_WAIT_S):
            answer, session = decode(await self._reader.readexactly(MESSAGE.size))
        if session != self._session:
            raise WireError("handover answer of another session")
        return answer

    async def hand_over(self, wait_ns: int) -> Handover:
        """Pass the token; the caller has stopped for good unless this returns REFUSED."""
        self.is_busy = True
        try:
            async with asyncio.timeout(wait_ns / 1e9):
                while True:
                    outcome = await self._try_once()
                    if outcome is not None:
                        return outcome
                    self.close()
                    await asyncio.sleep(RETRY_WAIT_S)
        except TimeoutError:
            return self._token.gave_up()
        finally:
            self.is_busy = False

    async def _try_once(self) -> Handover | None:
        try:
            if self._reader is None or self._reader.at_eof():
                await self._reconnect()
            outcome = self._token.answered(await self._exchange(self._token.next_message()))
        except NobodyListens:
            return self._token.nobody_listens()
        except (OSError, EOFError, WireError):
            return None
        if outcome is Handover.TAKEN and self._writer is not None:
            self._writer.write(encode(Kind.CONFIRM, self._session))
        return outcome

    def close(self) -> None:
        """Forget the connection. Idempotent."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
