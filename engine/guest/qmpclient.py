"""A QMP client that waits: for the agent of a QEMU, which sends some commands from its event loop's
steps (`order`, which only writes) and the others from threads of its own (`execute`).

QEMU serves one connection of a QMP server at a time, and leaves others without a greeting.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from typing import Any, Final

from engine.errors import GuestError, shown

LINE_BYTES_MAX: Final = 64 * 1024 * 1024  #: the longest answer is that of qom-list or query-block
GREETING_WAIT_S: Final = 5.0
ANSWER_WAIT_S: Final = 10.0
KEPT_ANSWERS_MAX: Final = 64


class QmpRefused(GuestError):
    """QEMU answered with an error; `kind` is its class."""

    def __init__(self, command: str, kind: str, reason: str) -> None:
        super().__init__(command, kind, reason)
        self.command, self.kind, self.reason = command, kind, reason

    def __str__(self) -> str:
        return f"QEMU refused '{self.command}': {self.reason}"


class QmpClient:
    """One connection; owns it."""

    def __init__(self, path: str) -> None:
        """Connect to a unix socket and leave negotiation.

        :raise GuestError: nobody listens, or another client is connected."""
        self._path = path
        self.version = (0, 0)  #: of QEMU: major, minor
        self._ids = itertools.count(1)
        self._buffer = bytearray()
        self._answers: dict[int, dict[str, Any]] = {}
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise
        self.execute("qmp_capabilities")

    def _connect(self) -> None:
        self._socket.settimeout(GREETING_WAIT_S)
        try:
            self._socket.connect(self._path)
        except OSError as exc:
            raise GuestError(
                f"no QEMU answers at '{shown(self._path)}': {exc.strerror or exc}; start it with "
                "-qmp unix:PATH,server=on,wait=off"
            ) from exc
        try:
            greeting = self._next(time.monotonic() + GREETING_WAIT_S)
        except TimeoutError as exc:
            raise GuestError(
                f"the QEMU at '{shown(self._path)}' does not greet: another client is connected; "
                "give QEMU one more -qmp socket for ramferry"
            ) from exc
        try:
            found = greeting["QMP"]["version"]["qemu"]
            self.version = (int(found["major"]), int(found["minor"]))
        except (KeyError, TypeError, ValueError) as exc:
            raise GuestError(f"'{shown(self._path)}' is not the socket of a QEMU's QMP") from exc

    @property
    def peer_pid(self) -> int:
        """The process that listens (0: in another pid namespace)."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", credentials)[0])

    def order(self, command: str, arguments: dict[str, Any] | None = None, fd: int = -1) -> int:
        """Send a command and do not wait; return what `answer` takes. The descriptor is lent.

        :raise GuestError: QEMU is gone, or does not read."""
        number = next(self._ids)
        text = json.dumps({"execute": command, "arguments": arguments or {}, "id": number})
        line = text.encode() + b"\n"
        try:
            with self._writing:
                sent = socket.send_fds(self._socket, [line], [fd] if fd >= 0 else [])
                self._socket.sendall(line[sent:])
        except OSError as exc:
            raise GuestError(f"QEMU takes no commands: {exc.strerror or exc}") from exc
        return number

    def answer(self, number: int, command: str, wait_s: float = ANSWER_WAIT_S) -> Any:
        """Wait for what became of an order.

        :raise QmpRefused: QEMU said no.
        :raise GuestError: QEMU is gone, or hangs."""
        deadline = time.monotonic() + wait_s
        with self._reading:
            while number not in self._answers:
                try:
                    self._take(self._next(deadline))
                except TimeoutError as exc:
                    raise GuestError(f"QEMU did not answer '{command}' in {wait_s:g} s") from exc
            answer = self._answers.pop(number)
        if (error := answer.get("error")) is not None:
            kind, reason = str(error.get("class")), shown(error.get("desc"))
            raise QmpRefused(command, kind, reason)
        return answer.get("return")

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        fd: int = -1,
        wait_s: float = ANSWER_WAIT_S,
    ) -> Any:
        """`order` and `answer`."""
        return self.answer(self.order(command, arguments, fd), command, wait_s)

    def _take(self, message: dict[str, Any]) -> None:
        """Events are of no use here; answers that nobody fetches are forgotten one day."""
        number = message.get("id")
        if isinstance(number, int) and ("return" in message or "error" in message):
            self._answers[number] = message
            while len(self._answers) > KEPT_ANSWERS_MAX:
                del self._answers[next(iter(self._answers))]

    def _next(self, deadline: float) -> dict[str, Any]:
        """The next message.

        :raise TimeoutError: none came in time."""
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            try:
                piece = self._socket.recv(65536)
            except TimeoutError:
                raise
            except OSError as exc:
                raise GuestError(f"QEMU has hung up: {exc.strerror}") from exc
            if not piece:
                raise GuestError("QEMU has hung up")
            self._buffer += piece
            if len(self._buffer) > LINE_BYTES_MAX:
                raise GuestError("QEMU says too much at once")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as exc:
            raise GuestError("QEMU says something that is not QMP") from exc
        if not isinstance(message, dict):
            raise GuestError("QEMU says something that is not QMP")
        return message

    def close(self) -> None:
        """Hang up. QEMU forgets what it has not begun by then (10.0 sometimes, 7.2 always): who
        needs an order done waits for its answer first. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
