"""One connection to a human monitor: lines out, answers in."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from typing import Final

from engine.control.uri import Address, parse_listen_address
from engine.errors import MigrationError, UsageError, shown

PROMPT: Final = b"(ramferry) "  #: engine.control.hmp.server's; to import it takes 0.2 s
QEMU_PROMPT: Final = b"(qemu) "
BANNER: Final = b"ramferry "
CONNECT_WAIT_S: Final = 5.0
#: More than the server prints for one line: 64 Ki characters, 6 bytes each at most.
ANSWER_BYTES_MAX: Final = 1024 * 1024
READ_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What a line printed, without the prompt.

    :ivar is_last: the server closed the connection behind it."""

    text: str
    is_last: bool = False


def parse_address(text: str) -> Address:
    """`unix:PATH`, `tcp:HOST:PORT`, or a PATH.

    :raise UsageError: neither."""
    if not text.startswith(("unix:", "tcp:")):
        text = f"unix:{text}"
    return parse_listen_address(text)


class Connection:
    """A greeted connection; owns its socket until `close`."""

    def __init__(self, address: Address) -> None:
        """Connect and read the banner.

        :raise UsageError: nobody listens there, or it is no human monitor of ramferry."""
        self._address = address
        self._socket = _connect(address)
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        where = self._address.display
        try:
            greeting = self._receive(CONNECT_WAIT_S)
        except MigrationError as exc:
            raise UsageError(
                f"what listens at '{where}' is no human monitor of ramferry: {exc}"
            ) from exc
        if greeting.text.startswith(BANNER.decode()):
            return
        if greeting.text.startswith("Error: "):
            raise UsageError(f"'{where}': {shown(greeting.text.strip())}")
        raise UsageError(f"what listens at '{where}' is no human monitor of ramferry")

    def ask(self, line: str, wait_s: float | None = None) -> Answer:
        """Send a line and wait for what it prints; without `wait_s` as long as that takes.

        After an error or an interrupt the connection is of no more use.

        :raise UsageError: it is not one line; nothing was sent.
        :raise MigrationError: the server is gone, or did not answer in time."""
        if "\n" in line or "\r" in line:
            raise UsageError("a command is one line")
        try:
            data = line.encode() + b"\n"
        except UnicodeEncodeError as exc:
            raise UsageError("a command must be UTF-8") from exc
        try:
            self._socket.settimeout(wait_s)
            self._socket.sendall(data)
        except OSError as exc:
            raise MigrationError(f"the monitor is gone: {exc.strerror or exc}") from exc
        return self._receive(wait_s)

    def _receive(self, wait_s: float | None) -> Answer:
        """All until the prompt, or until the end."""
        self._socket.settimeout(wait_s)
        received = bytearray()
        while not _is_whole(received):
            if received.startswith(b'{"QMP"'):
                raise MigrationError("it speaks QMP; the socket of --hmp is wanted")
            if received.startswith(b"QEMU ") and received.endswith(b"\n" + QEMU_PROMPT):
                raise MigrationError("it is QEMU's own; the socket of --hmp is wanted")
            if len(received) > ANSWER_BYTES_MAX:
                raise MigrationError("the monitor's answer has no end")
            try:
                data = self._socket.recv(READ_BYTES)
            except TimeoutError as exc:
                raise MigrationError(f"the monitor did not answer within {wait_s:.0f} s") from exc
            except OSError as exc:
                raise MigrationError(f"the monitor is gone: {exc.strerror or exc}") from exc
            if not data:
                return Answer(_text(received), is_last=True)
            received += data
        return Answer(_text(received[: -len(PROMPT)]))

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


def _is_whole(received: bytearray) -> bool:
    return received == PROMPT or received.endswith(b"\n" + PROMPT)


def _text(data: bytes | bytearray) -> str:
    """As a terminal may have it: what another client has set could hold its escape codes."""
    text = data.decode(errors="replace").replace("\r\n", "\n")
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in text
    )


def _connect(address: Address) -> socket.socket:
    """:raise UsageError: says what is there, or is not."""
    where = address.display
    try:
        if not address.path:
            host = address.host or "localhost"
            return socket.create_connection((host, address.port), CONNECT_WAIT_S)
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(CONNECT_WAIT_S)
            connected.connect(address.path)
        except BaseException:
            connected.close()
            raise
        return connected
    except FileNotFoundError as exc:
        raise UsageError(f"there is no socket at '{where}'; serve makes one with --hmp") from exc
    except ConnectionRefusedError as exc:
        is_file = address.path and not _is_socket(address.path)
        reason = "it is not a socket" if is_file else "nobody listens there"
        raise UsageError(f"cannot connect to '{where}': {reason}") from exc
    except OSError as exc:
        raise UsageError(f"cannot connect to '{where}': {exc.strerror or exc}") from exc


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.stat(path).st_mode)
