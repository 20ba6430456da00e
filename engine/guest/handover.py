"""Where the token comes in and goes out: the destination's listener, the source's connection.

The protocol and its decisions are in token.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from engine import unixsocket
from engine.dialing import dial, listen_tcp
from engine.errors import ChannelError, GuestError, UsageError, WireError
from engine.guest.base import Handover
from engine.guest.token import MESSAGE, DestinationToken, Kind, SourceToken, decode, encode

CONNECTIONS_MAX: Final = 4  #: the oldest gives way, so nobody can keep the right source out
MESSAGE_WAIT_S: Final = 5.0  #: from a message's first byte, or the connection, to its last
ANSWER_WAIT_S: Final = 1.0  #: for one answer; then the source asks again on a new connection
REFUSED_WAIT_S: Final = 1.0  #: a far host that refuses for so long has no answer
RETRY_WAIT_S: Final = 0.02
CONNECT_WAIT_S: Final = 10.0  #: for the greeting during setup
ASK_WAIT_NS: Final = 2_000_000_000  #: for what became of a token, before anybody decides alone
ARRIVED_JUST_NOW: Final = (
    "the guest has just arrived, and its source has not confirmed that it knows; try again later"
)
CHANNEL_INDEX: Final = -1  #: the handover connection in `ChannelError`


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
    """Every address of the endpoint said so; `is_proof` when it is this host that said it."""

    def __init__(self, is_proof: bool) -> None:
        super().__init__(is_proof)
        self.is_proof = is_proof


async def _bind_tcp(endpoint: Endpoint) -> socket.socket:
    """An empty host means every address."""
    only = (await _addresses(endpoint))[0] if endpoint.host else None
    return listen_tcp(endpoint.port, only)


async def _addresses(endpoint: Endpoint) -> list[tuple[int, Any]]:
    if endpoint.path:
        return [(socket.AF_UNIX, endpoint.path)]
    found = await asyncio.get_running_loop().getaddrinfo(
        endpoint.host or None, endpoint.port, type=socket.SOCK_STREAM
    )
    return [(family, address) for family, _, _, _, address in found]


async def _connect_any(addresses: list[tuple[int, Any]]) -> socket.socket:
    """:raise NobodyListens: all refuse. :raise OSError: none answers, and one did not refuse.

    A missing socket file is no refusal: anybody may have removed it."""
    failure: OSError | None = None
    for family, address in addresses:
        try:
            return await dial(family, address)
        except ConnectionRefusedError:
            continue
        except OSError as exc:
            failure = exc
    if failure is not None:
        raise failure
    raise NobodyListens(all(_is_this_host(family, address) for family, address in addresses))


def _is_this_host(family: int, address: Any) -> bool:
    """Whether no other host, and nothing between, can answer for the address."""
    if family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback


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
                listener = unixsocket.bind(endpoint.path)
                self._server = await asyncio.start_unix_server(self._accept, sock=listener)
                self._path = endpoint.path
            else:
                listener = await _bind_tcp(endpoint)
                self._server = await asyncio.start_server(self._accept, sock=listener)
        except (OSError, UsageError) as exc:
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
        message = b""
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
        except asyncio.CancelledError:
            if self._server is None and message:
                self._say_goodbye(writer, decode(message)[1])
            raise
        finally:
            writer.close()

    def _say_goodbye(self, writer: asyncio.StreamWriter, session: bytes) -> None:
        """Who asks later finds nobody: tell it now that the session is void, if it is."""
        if self._token.void(session):
            writer.write(encode(Kind.VOID, session))

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

    def take_over(self, session: bytes) -> None:
        """The token has come with a stream: nobody will ask for it here.

        :raise GuestError: the session is void, or a token was taken already."""
        self.token.arm(session)
        self.token.answer(Kind.TAKE, session)
        self.token.answer(Kind.CONFIRM, session)
        self._on_taken()

    def disarm(self) -> bool:
        return self.token.disarm()

    async def close(self) -> None:
        """Disarm and stop listening; a token that was taken is answered for until confirmed."""
        self.token.disarm()
        self._is_close_due = True
        if self.is_settled:
            await self._give_up_listener()

    @property
    def is_settled(self) -> bool:
        """Nobody will ask for a token that was taken here: the guest may be handed on."""
        return self.token.taken is None or self.token.confirmed

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

    def __init__(self, session: bytes, *, dies_with_taker: bool = True) -> None:
        """
        :param dies_with_taker: a guest has no life beside the process that takes its token, so that
            this host's kernel can prove that it runs nowhere."""
        self._session, self._dies_with_taker = session, dies_with_taker
        self._addresses: list[tuple[int, Any]] = []
        self._connection: socket.socket | None = None
        self._token = SourceToken()
        self.is_busy = False  #: a token is under way: do not close, and do not run

    @property
    def is_sent(self) -> bool:
        """The destination may have the token, or have had it."""
        return self._token.is_sent

    async def connect(self, endpoint: str) -> None:
        """Connect and exchange greetings.

        :raise ChannelError: nobody answers there; closed again."""
        try:
            async with asyncio.timeout(CONNECT_WAIT_S):
                for family, address in await _addresses(parse_endpoint(endpoint)):
                    self._addresses.append((family, address))
                await self._greet()
        except (NobodyListens, OSError, EOFError, WireError) as exc:
            self.close()
            raise ChannelError(CHANNEL_INDEX, f"connecting the handover to {endpoint}") from exc

    async def check(self) -> None:
        """Greet again before the guest stops: a connection that idled for hours may be dead.

        :raise ChannelError: nobody answers, on a new connection either; closed again."""
        try:
            async with asyncio.timeout(CONNECT_WAIT_S):
                try:
                    await self._hello()
                except (OSError, EOFError, WireError):
                    await self._greet()
        except (NobodyListens, OSError, EOFError, WireError) as exc:
            self.close()
            raise ChannelError(CHANNEL_INDEX, "greeting the destination guest again") from exc

    async def _greet(self) -> None:
        await self._reconnect()
        await self._hello()

    async def _hello(self) -> None:
        if await self._exchange(Kind.HELLO) is not Kind.WAITING:
            raise WireError("not the answer to a greeting")

    async def _reconnect(self) -> None:
        self.close()
        self._connection = connection = await _connect_any(self._addresses)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        #: What worked once is the destination; its other addresses may be somebody else's.
        self._addresses = [(connection.family, connection.getpeername())]

    async def _exchange(self, kind: Kind) -> Kind:
        """Send one message and await its answer; any failure leaves the connection useless."""
        if self._connection is None:
            raise EOFError("not connected")
        with contextlib.suppress(OSError):  # a peer that has gone may have left its last word
            self._connection.send(encode(kind, self._session), socket.MSG_NOSIGNAL)
        reading = asyncio.ensure_future(self._read(self._connection))
        try:  # an answer that has come counts, however late this process looks at the clock
            await asyncio.wait({reading}, timeout=ANSWER_WAIT_S)
            if not reading.done():
                raise TimeoutError
            answer, session = decode(reading.result())
        finally:  # nothing reads any more when the connection is closed
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if session != self._session:
            raise WireError("handover answer of another session")
        return answer

    @staticmethod
    async def _read(connection: socket.socket) -> bytes:
        """:raise EOFError: it ended in the middle."""
        message = b""
        while len(message) < MESSAGE.size:
            rest = MESSAGE.size - len(message)
            piece = await asyncio.get_running_loop().sock_recv(connection, rest)
            if not piece:
                raise EOFError("the connection ended")
            message += piece
        return message

    async def hand_over(self, wait_ns: int) -> Handover:
        """Pass the token; the caller has stopped for good unless this returns REFUSED.

        After UNKNOWN it may be called again: it then asks what became of the token."""
        self.is_busy = True
        loop = asyncio.get_running_loop()
        refused_until = loop.time() + REFUSED_WAIT_S
        try:
            async with asyncio.timeout(wait_ns / 1e9):
                while True:
                    try:
                        outcome = await self._try_once()
                    except NobodyListens as exc:
                        if exc.is_proof and self._dies_with_taker:
                            return self._token.nobody_listens()
                        if loop.time() > refused_until:
                            return self._token.gave_up()
                        outcome = None
                    if outcome is not None:
                        return outcome
                    self.close()
                    await asyncio.sleep(RETRY_WAIT_S)
        except TimeoutError:
            return self._token.gave_up()
        finally:
            self.is_busy = False

    async def ask(self) -> Handover:
        """What became of a token that was sent; UNKNOWN without an answer in two seconds."""
        return await self.hand_over(ASK_WAIT_NS)

    async def _try_once(self) -> Handover | None:
        try:
            if self._connection is None:
                await self._reconnect()
            outcome = self._token.answered(await self._exchange(self._token.next_message()))
        except (OSError, EOFError, WireError):
            return None
        if outcome is Handover.TAKEN and self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(encode(Kind.CONFIRM, self._session), socket.MSG_NOSIGNAL)
        return outcome

    def close(self) -> None:
        """Forget the connection. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
