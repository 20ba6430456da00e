"""The reference clients of the handoff protocol as guests: started, looked at, always ended."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import eventually

CLIENTS: Final = Path(__file__).parents[2] / "docs" / "handoff"
MIB: Final = 16
KINDS: Final = ("c", "python")
WARNINGS: Final = ("-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror")


@pytest.fixture(scope="session")
def c_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C client, compiled without a warning."""
    where = str(tmp_path_factory.mktemp("handoff") / "client")
    compiler = shutil.which("cc") or "gcc"
    source = str(CLIENTS / "client.c")
    subprocess.run([compiler, *WARNINGS, "-pthread", "-O1", "-o", where, source], check=True)
    return where


class Client:
    """One toy VMM that hands its memory over at `socket`."""

    def __init__(self, command: list[str], socket: Path, how: str, mib: int) -> None:
        self.socket = socket
        self.process = subprocess.Popen(
            [*command, str(socket), str(mib), how], stderr=subprocess.PIPE
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def spec(self) -> str:
        return f"handoff:{self.socket}"

    def memory(self) -> bytes:
        """All of it, without being seen; it should stand."""
        with self._file() as file:
            return file.read_bytes()

    def steps(self) -> int:
        with self._file() as file, file.open("rb") as memory:
            return int(struct.unpack("=Q", memory.read(8))[0])

    @contextlib.contextmanager
    def _file(self) -> Iterator[Path]:
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            if os.readlink(each).startswith("/memfd:guest"):
                yield each
                return
        raise AssertionError("it has no memory")

    def goes_on(self) -> bool:
        """Whether it makes more steps, soon."""
        assert self.process.poll() is None
        before = self.steps()
        return eventually(lambda: self.steps() > before + 1000)

    def stands(self) -> bool:
        """Whether it makes no steps any more, soon."""

        def rests() -> bool:
            before = self.steps()
            return not eventually(lambda: self.steps() != before, 0.1)

        return eventually(rests)

    def flags(self) -> set[str]:
        """What the kernel says of its memory: uw: tracked, um: missing pages are waited for."""
        smaps = Path(f"/proc/{self.pid}/smaps").read_text()
        lines = re.findall(r"memfd:guest.*?^VmFlags:(.*?)$", smaps, re.M | re.S)
        assert lines
        return {flag for line in lines for flag in line.split()} & {"uw", "um"}

    def close(self) -> None:
        with self.process:
            self.process.kill()


@contextlib.contextmanager
def client(command: list[str], socket: Path, how: str = "run", mib: int = MIB) -> Iterator[Client]:
    """How: run or wait."""
    found = Client(command, socket, how, mib)
    try:
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def clients(command: list[str], directory: Path, mib: int = MIB) -> Iterator[tuple[Client, Client]]:
    """One that steps, and one that waits."""
    with (
        client(command, directory / "a", mib=mib) as source,
        client(command, directory / "b", "wait", mib) as destination,
    ):
        yield source, destination


def agent_of(control: int) -> int:
    """The agent that a control process has started for its VMM."""
    for child in Path(f"/proc/{control}/task/{control}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if b"engine.guest.handoff_agent" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("it has none")


@pytest.fixture(params=KINDS)
def command(request: pytest.FixtureRequest, c_client: str) -> list[str]:
    """How each of the two clients is run."""
    if request.param == "c":
        return [c_client]
    return [sys.executable, str(CLIENTS / "client.py")]
