"""A real QEMU and a ramferry, each with a paused guest of 64 MiB and a raw monitor socket."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import eventually

QEMU: Final = "qemu-system-x86_64"
WAIT_S: Final = 60.0
RAM_BYTES: Final = 64 * 1024 * 1024


class Client:
    """One connection to a monitor; raw bytes out, JSON lines in."""

    def __init__(self, path: Path, *, negotiate: bool = True, oob: bool = False) -> None:
        deadline = time.monotonic() + WAIT_S
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(WAIT_S)
            try:
                self.socket.connect(str(path))
                break
            except OSError:  # it has not begun to listen
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self.greeting = self.read()
        if negotiate:
            arguments = {"enable": ["oob"]} if oob else {}
            assert self.ask({"execute": "qmp_capabilities", "arguments": arguments}) == {
                "return": {}
            }

    def read(self) -> Any:
        """The next message, whatever it is."""
        while b"\n" not in self._buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the monitor closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def answer(self) -> Any:
        """The next answer; events before it go to `events`."""
        while "event" in (message := self.read()):
            self.events.append(message)
        return message

    def send(self, request: object) -> None:
        """Bytes as they are, anything else as one JSON line."""
        data = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
        self.socket.sendall(data)

    def ask(self, request: object) -> Any:
        self.send(request)
        return self.answer()

    def execute(self, name: str, **arguments: object) -> Any:
        """The answer of a command; `max_bandwidth=1` is `"max-bandwidth": 1`."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.ask({"execute": name, "arguments": given})

    def wait_event(self, name: str, **data: object) -> dict[str, Any]:
        """The first event of that name and data, among those that came and those to come."""
        position = 0
        while True:
            while position < len(self.events):
                event = self.events[position]
                position += 1
                have = event.get("data", {})
                if event["event"] == name and data.items() <= have.items():
                    return event
            message = self.read()
            assert "event" in message, f"an answer that nobody waits for: {message}"
            self.events.append(message)

    def converse(self, stream: bytes) -> list[Any]:
        """Everything that a stream of bytes is answered with, whatever is wrong with it.

        Two commands that nobody has follow it: one is read if the stream leaves nothing open, the
        other in any case, and its answer is the last one."""
        unknown = b'\n{"execute": "no-such-command", "id": "%s"}\n'
        self.send(stream + unknown % b"first" + b"\xff" + unknown % b"last")
        messages: list[Any] = []
        while not messages or not _is_last(messages[-1]):
            try:
                messages.append(self.read())
            except json.JSONDecodeError as exc:
                messages.append(exc.doc)
        return messages

    def close(self) -> None:
        self.socket.close()


def settled_status(client: Client) -> dict[str, Any]:
    """`query-status` once the migration's end has reached the run state: QEMU tells `completed`
    first, and goes from `finish-migrate` to `postmigrate` a moment later, with no event."""
    seen: dict[str, Any] = {}

    def has_settled() -> bool:
        seen.update(client.execute("query-status")["return"])
        if seen["status"] == "inmigrate":  # a destination that waits on, or one that has failed
            return bool(client.execute("query-migrate")["return"].get("status") != "completed")
        return bool(seen["status"] != "finish-migrate")

    assert eventually(has_settled, WAIT_S), seen
    return seen


def _is_last(message: Any) -> bool:
    return isinstance(message, dict) and message.get("id") == "last"


class Peer:
    """One process and its first client."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], path: Path) -> None:
        self.name, self.process, self.path = name, process, path
        assert eventually(lambda: path.exists() or process.poll() is not None, WAIT_S)
        assert process.poll() is None, f"{name} ended with {process.returncode} at once"
        self.client = Client(path)

    def connect(self, **options: bool) -> Client:
        """Another client, or one that has not negotiated; the caller closes it."""
        return Client(self.path, **options)

    @contextlib.contextmanager
    def fresh(self, **options: bool) -> Iterator[Client]:
        """A client in place of the first one; QEMU has room for one at a time."""
        self.client.close()
        with contextlib.closing(self.connect(**options)) as client:
            yield client

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(WAIT_S)


def command_line(name: str, qmp: Path, more: Sequence[str], *, incoming: str | None) -> list[str]:
    """How each is started; `more` are further options of this one."""
    if name == "qemu":
        line = [QEMU, "-machine", "pc,accel=tcg", "-m", "64", "-S", "-nodefaults"]
        line += ["-display", "none", "-qmp", f"unix:{qmp},server=on,wait=off"]
        option = "-incoming"
    else:
        line = [sys.executable, "-m", "engine.cli", "serve", "--qmp", f"unix:{qmp}"]
        line += ["--guest", f"ram:size={RAM_BYTES}"]
        option = "--incoming"
    return [*line, *([option, incoming] if incoming else []), *more]


@contextlib.contextmanager
def peer(name: str, *more: str, incoming: str | None = None) -> Iterator[Peer]:
    """Start `qemu` or `ramferry`, with `more` options of its own; it is gone afterwards."""
    if name == "qemu" and shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed; there is nothing to compare with")
    with tempfile.TemporaryDirectory(prefix="peer-") as directory:  # short, as sockets need it
        path = Path(directory) / "qmp"
        line = command_line(name, path, more, incoming=incoming)
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        try:
            with contextlib.closing(Peer(name, process, path)) as one:
                yield one
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def both(*, incoming: str | None = None) -> Iterator[tuple[Peer, Peer]]:
    """QEMU and ramferry, started alike."""
    with peer("qemu", incoming=incoming) as qemu, peer("ramferry", incoming=incoming) as ours:
        yield qemu, ours
