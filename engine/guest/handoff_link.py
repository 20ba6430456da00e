"""The connection of a VMM that has handed its memory over: orders go, answers come.

One JSON object a line in both directions; docs/handoff.md lists them. A thread reads, so the end of
the connection is noticed at once.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import msgspec

from engine.errors import GuestError, WireError, shown

ANSWER_WAIT_S: Final = 10.0
LINE_BYTES_MAX: Final = 4096  #: of an answer
PIECE_BYTES: Final = 4096
ID_MAX: Final = 2**62


class Reply(msgspec.Struct, frozen=True):
    """What a VMM answers. `error`: it did not do it, and why.

    :ivar running: as of `status`.
    :ivar size: bytes of the device state that it has saved."""

    id: int
    error: str | None = None
    running: bool | None = None
    size: int | None = None


_REPLY: Final = msgspec.json.Decoder(Reply)


def encode_line(message: dict[str, Any]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def parse_reply(line: bytes) -> Reply:
    """:raise WireError: no answer."""
    try:
        return _REPLY.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise WireError(f"it answers with something else than the protocol has: {exc}") from exc


class VmmLink:
    """One connection; owns it and its thread. Orders may come from several threads."""

    def __init__(self, connection: socket.socket, what: str, on_end: Callable[[], None]) -> None:
        """Take the connection over.

        :param what: the VMM, for people.
        :param on_end: called once by the thread when the VMM hangs up or talks nonsense."""
        self._what, self._on_end = what, on_end
        self._socket = connection
        self._socket.setblocking(True)
        self._ids = itertools.count(1)
        self._replies: dict[int, Reply | None] = {}  #: by the ids of orders that are waited for
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._end = ""  #: why there is no connection any more
        self._thread = threading.Thread(target=self._read, name="handoff", daemon=True)
        self._thread.start()

    # -- orders ----------------------------------------------------------------------------------

    def order(self, command: str, fd: int = -1, **arguments: Any) -> int:
        """Send an order and do not wait; return what `answer` or `forget` takes. The descriptor is
        lent.

        :raise GuestError: the VMM is gone, or does not read."""
        with self._changed:
            number = next(self._ids)
            self._replies[number] = None
        try:
            self._send({"id": number, "execute": command, **arguments}, fd)
        except GuestError:
            self.forget(number)
            raise
        return number

    def tell(self, command: str) -> None:
        """`order`, whose answer nobody wants."""
        with self._changed:
            number = next(self._ids)
        self._send({"id": number, "execute": command}, -1)

    def _send(self, order: dict[str, Any], fd: int) -> None:
        line = encode_line(order)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
        beside = [rights] if fd >= 0 else []
        try:
            with self._writing:  # `socket.send_fds` forgets its flags
                sent = self._socket.sendmsg([line], beside, socket.MSG_DONTWAIT)
            if sent < len(line):
                raise BlockingIOError
        except OSError as exc:
            raise GuestError(f"{self._what} takes no orders: {self._end or exc.strerror}") from exc

    def answer(self, number: int, command: str, wait_s: float = ANSWER_WAIT_S) -> Reply:
        """Wait for what became of an order.

        :raise GuestError: it was not done, or nobody says so."""
        with self._changed:
            self._changed.wait_for(lambda: self._end or self._replies[number], wait_s)
            reply = self._replies.pop(number)
            end = self._end
        if reply is None:
            reason = end or f"no answer in {wait_s:g} s"
            raise GuestError(f"{self._what} did not do '{command}': {reason}")
        if reply.error is not None:
            raise GuestError(f"{self._what} refused '{command}': {shown(reply.error)}")
        return reply

    def execute(
        self, command: str, fd: int = -1, wait_s: float = ANSWER_WAIT_S, **arguments: Any
    ) -> Reply:
        """`order` and `answer`."""
        return self.answer(self.order(command, fd, **arguments), command, wait_s)

    def forget(self, number: int) -> None:
        """Nobody will ask what became of an order."""
        with self._changed:
            self._replies.pop(number, None)

    # -- answers ---------------------------------------------------------------------------------

    def _read(self) -> None:
        buffer = bytearray()
        try:
            while piece := self._socket.recv(PIECE_BYTES):
                buffer += piece
                while (end := buffer.find(b"\n")) >= 0:
                    self._take(parse_reply(bytes(buffer[:end])))
                    del buffer[: end + 1]
                if len(buffer) > LINE_BYTES_MAX:
                    raise WireError(f"it says more than {LINE_BYTES_MAX} bytes in a line")
            reason = "it has hung up"
        except (OSError, WireError) as exc:
            reason = str(exc)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._changed:
            self._end = self._end or reason
            self._changed.notify_all()
        self._on_end()

    def _take(self, reply: Reply) -> None:
        """Answers that nobody waits for any more are dropped."""
        with self._changed:
            if reply.id in self._replies and self._replies[reply.id] is None:
                self._replies[reply.id] = reply
                self._changed.notify_all()

    def give_up(self) -> None:
        """Nobody waits any more; orders are still taken. Idempotent."""
        with self._changed:
            self._end = self._end or "the connection is given up"
            self._changed.notify_all()

    def close(self) -> None:
        """Hang up; what was ordered is still read. Idempotent."""
        self.give_up()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
