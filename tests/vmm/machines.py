"""Real QEMUs with a guest that sweeps its memory, each in a directory of its own; always ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from engine.memory.blocks import PAGE_SIZE
from tests.support import WAIT_S, eventually
from tests.vmm.sweeper import SECTOR

FETCHED: Final = Path(__file__).parents[2] / ".vmm"  #: by `fetch.sh`
QEMU: Final = "qemu-system-x86_64"
MIB: Final = 1024 * 1024
SETTINGS: Final = ("capabilities", "parameters")  #: of a QEMU's own migration
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"needs {QEMU}")


class Monitor:
    """A QMP connection of the test's own, beside ramferry's."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_S)
        self._lines = self._socket.makefile("rb")
        try:
            assert eventually(lambda: self._socket.connect_ex(str(path)) == 0, WAIT_S)
            self._lines.readline()
            self.ask("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def ask(self, command: str, **arguments: Any) -> Any:
        """:raise AssertionError: QEMU said no."""
        text = json.dumps({"execute": command, "arguments": arguments})
        self._socket.sendall(text.encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "return" in answer:
                return answer["return"]
            assert "event" in answer, answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass
class Vm:
    """One QEMU. `rams` are the files of its memory backends."""

    process: subprocess.Popen[bytes]
    directory: Path
    rams: list[Path] = field(default_factory=list)
    monitor: Monitor = field(init=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def spec(self) -> str:
        """For `--guest`."""
        return f"qemu:qmp={self.directory}/ramferry.qmp"

    @property
    def status(self) -> str:
        return str(self.monitor.ask("query-status")["status"])

    def said(self) -> list[tuple[str, int]]:
        """What the guest has said: ("R", round) or ("W", address of a wrong page)."""
        text = self.wrote("serial")
        return [(each[1], int(each[2], 16)) for each in re.finditer(r"([RW])([0-9a-f]{8})\n", text)]

    def wrote(self, name: str) -> str:
        """Contents of a file in its directory."""
        return (self.directory / name).read_text()

    def rounds(self) -> int:
        """Rounds that the guest has ended.

        :raise AssertionError: it found a page wrong."""
        said = self.said()
        wrong = [hex(where) for what, where in said if what == "W"]
        assert not wrong, self.wrote("serial")[-200:]
        return said[-1][1] if said else 0

    def goes_on(self) -> bool:
        """Whether it ends another round, or more."""
        before = self.rounds()
        return eventually(lambda: self.rounds() > before, WAIT_S)

    def memory(self) -> list[bytes]:
        """All of its RAM; it should stand."""
        return [path.read_bytes() for path in self.rams]


def memory_options(directory: Path, mib: int, blocks: int) -> list[str]:
    """RAM of so many equal files; several are NUMA nodes."""
    options = ["-m", str(mib)]
    for i in range(blocks):
        path, size = directory / f"ram{i}", mib // blocks
        options += [
            "-object",
            f"memory-backend-file,id=ram{i},size={size}M,mem-path={path},share=on",
        ]
        options += ["-numa", f"node,memdev=ram{i}"] if blocks > 1 else []
    return [*options, *([] if blocks > 1 else ["-machine", "memory-backend=ram0"])]


def fill(path: Path, mib: int) -> None:
    """Contents that the sweeper mostly leaves alone: of four pages one is a hole, one is random,
    and two compress well."""
    pages = np.zeros((mib * MIB // PAGE_SIZE, PAGE_SIZE // 8), np.uint64)
    numbers = np.arange(len(pages), dtype=np.uint64)
    pages[1::4] = np.random.default_rng(1).integers(2**63, size=pages[1::4].shape, dtype=np.uint64)
    pages[2::4] = numbers[2::4, np.newaxis] + 1
    pages[3::4] = np.frombuffer(b"ramferry", np.uint64)
    with path.open("wb") as file:
        for page in range(len(pages)):
            if page % 4:
                os.pwrite(file.fileno(), pages[page].tobytes(), page * PAGE_SIZE)
        os.truncate(file.fileno(), pages.nbytes)


@contextlib.contextmanager
def vm(
    *options: str,
    mib: int = 64,
    blocks: int = 1,
    memory: list[str] | None = None,
    is_filled: bool = False,
    qemu: str = QEMU,
) -> Iterator[Vm]:
    """A QEMU that runs the sweeper from memory in files, or as `memory` says."""
    directory = Path(tempfile.mkdtemp(prefix="rf-", dir="/dev/shm"))
    try:
        (directory / "sweeper").write_bytes(SECTOR)
        for i in range(blocks * is_filled):
            fill(directory / f"ram{i}", mib // blocks)
        command = [qemu, "-accel", "tcg", "-nodefaults", "-vga", "none", "-display", "none"]
        command += memory_options(directory, mib, blocks) if memory is None else memory
        command += ["-drive", f"file={directory}/sweeper,format=raw,if=floppy,readonly=on"]
        command += ["-serial", f"file:{directory}/serial"]
        for name in ("test", "ramferry"):
            command += ["-qmp", f"unix:{directory}/{name}.qmp,server=on,wait=off"]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd=directory)
        try:
            found = Vm(process, directory, [directory / f"ram{i}" for i in range(blocks)])
            found.monitor = Monitor(directory / "test.qmp")
            try:
                yield found
            finally:
                found.monitor.close()
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def pair(
    *options: str,
    mib: int = 64,
    blocks: int = 1,
    memory: list[str] | None = None,
    is_filled: bool = False,
    qemus: tuple[str, str] = (QEMU, QEMU),
) -> Iterator[tuple[Vm, Vm]]:
    """One whose guest has begun its rounds, and its twin that waits for a migration."""
    here, there = qemus
    waits = (*options, "-incoming", "defer")
    with (
        vm(
            *options, mib=mib, blocks=blocks, memory=memory, is_filled=is_filled, qemu=here
        ) as source,
        vm(*waits, mib=mib, blocks=blocks, memory=memory, qemu=there) as destination,
    ):
        assert eventually(lambda: source.rounds() > 2, WAIT_S)
        yield source, destination
