"""A real QEMU whose guest sweeps its memory, and somebody who watches it: for `bench vmm`."""

from __future__ import annotations

import bisect
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.errors import MigrationError
from perf.pair import QEMU

MIB: Final = 1024 * 1024
#: The code of sweeper.S; the ends of what is touched and swept follow at `ENDS_AT`.
CODE: Final = bytes.fromhex(
    "fa31c08ed8e4920c02e6920f0116b87c0f20c00c010f22c0ea1d7c080066b810008ed88ec066baf8038b1df6"
    "7d0000bf00001000897f0881c70010000039df72f38b1dfa7d0000bf00001000c7070000000081c700100000"
    "39df72f031edbf0000100089e9c1e10681e1c00f0000392f7524ff078d042f89440f0481c700100000f7c7ff"
    "ffff017503b02eee39df72de45b052eeebc8b057eef4ebfd8d7426000000000000000000ffff0000009acf00"
    "ffff00000092cf001700a07c"
)
ENDS_AT: Final = 502
FIRST_BYTE: Final = MIB  #: of what is touched and swept
ENDS_MAX: Final = 3 * 1024 * MIB  #: there is no RAM behind it, up to 4 GiB
ROUND, WRONG = b"R"[0], b"W"[0]
SPEED_S: Final = 1.5  #: the speed before a migration is taken over so long
ACCEPT_WAIT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A guest, in bytes: its RAM, what it touches in it, and what of that it sweeps."""

    size: int
    touched: int
    swept: int

    def boot_sector(self) -> bytes:
        ends = [FIRST_BYTE + each for each in (self.touched, self.swept)]
        assert FIRST_BYTE < ends[1] <= ends[0] <= min(self.size, ENDS_MAX), "whoever calls checks"
        words = b"".join(end.to_bytes(4, "little") for end in ends)
        return CODE.ljust(ENDS_AT, b"\0") + words + b"\x55\xaa"


def qemu_command(shape: Shape, directory: Path, qmp: Path, *, incoming: bool) -> list[str]:
    """One QEMU with files of its own in a directory of shared memory; a second monitor is for
    ramferry."""
    backend = f"memory-backend-file,id=ram,size={shape.size},mem-path={directory}/ram,share=on"
    line = [QEMU, "-machine", "pc,accel=tcg,memory-backend=ram", "-object", backend]
    line += ["-m", f"size={shape.size}B", "-nodefaults", "-vga", "none", "-display", "none"]
    line += ["-drive", f"file={directory}/boot,format=raw,if=floppy,readonly=on", "-boot", "a"]
    line += ["-chardev", f"socket,id=marks,path={directory}/marks", "-serial", "chardev:marks"]
    for each in (qmp, directory / "ramferry.qmp"):
        line += ["-qmp", f"unix:{each},server=on,wait=off"]
    return [*line, "-incoming", "defer"] if incoming else line


def serve_command(directory: Path, qmp: Path, *, incoming: bool) -> list[str]:
    """The ramferry beside it."""
    line = [sys.executable, "-m", "engine.cli", "serve", "--qmp", f"unix:{qmp}"]
    line += ["--guest", f"qemu:qmp={directory}/ramferry.qmp"]
    return [*line, "--incoming", "defer"] if incoming else line


class Watcher:
    """Notes when each mark of a guest came; owns the socket and a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._times: list[float] = []  #: monotonic, of each mark
        self._marks = bytearray()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(ACCEPT_WAIT_S)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """Until the guest's QEMU is gone, or never came."""
        with contextlib.suppress(OSError), self._listener:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(None)
                while piece := connection.recv(4096):
                    now = time.monotonic()
                    self._marks += piece
                    self._times += [now] * len(piece)

    def close(self) -> None:
        """The guest's QEMU has ended."""
        self._listener.close()
        self._thread.join(ACCEPT_WAIT_S)
        self._path.unlink(missing_ok=True)

    @property
    def rounds(self) -> int:
        """:raise MigrationError: the guest found a page wrong."""
        marks = bytes(self._marks)
        if WRONG in marks:
            raise MigrationError("the guest found a page that is not as it wrote it")
        return marks.count(ROUND)

    @property
    def last(self) -> float:
        """When the last mark came."""
        return self._times[-1]

    @property
    def first(self) -> float:
        return self._times[0]

    def per_s(self, began: float, ended: float) -> float:
        """Marks in a second of that time."""
        times = list(self._times)
        count = bisect.bisect(times, ended) - bisect.bisect(times, began)
        return count / max(ended - began, 1e-9)


@contextlib.contextmanager
def watched(directory: Path, shape: Shape) -> Iterator[Watcher]:
    """All that a QEMU's command line wants to find; whoever runs it ends it inside."""
    directory.mkdir()
    (directory / "boot").write_bytes(shape.boot_sector())
    watcher = Watcher(directory / "marks")
    try:
        yield watcher
    finally:
        watcher.close()
