"""A Linux guest: Debian's kernel, and `linux_init.c` as all of its userland.

The first serial port has what the program says, as the sweeper's does, the second the kernel's log.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from tests.vmm.machines import FETCHED

HERE: Final = Path(__file__).parent
MIB: Final = 256  #: of the guest's memory; every page that it does not use is filled, too
SWEPT_MIB: Final = 64
#: The kernel fills memory that is free, and looks at it when it is wanted again.
COMMAND_LINE: Final = f"console=ttyS1 panic=-1 page_poison=1 slub_debug=FZP MIB={SWEPT_MIB}"
#: What a kernel says when something is wrong with its memory, or its time.
TROUBLE: Final = re.compile(
    r"\bBUG\b|WARNING:|Oops|Call Trace|Kernel panic|stall|lockup|blocked for more"
    r"|corruption|single bit error|Machine check|general protection"
)
DIRECTORY, DEVICE, PROGRAM = 0o040755, 0o020600, 0o100755  #: modes
SAID: Final = re.compile(r"(?:R([0-9a-f]{8})\nC([0-9a-f]{8})\n)")


def kernel() -> Path | None:
    """The newest that may be read: the environment's, else what was fetched, else the host's."""
    if named := os.environ.get("RAMFERRY_KERNEL"):
        return Path(named)
    for place in (FETCHED / "kernel/boot", Path("/boot")):
        found = [path for path in place.glob("vmlinuz-*") if os.access(path, os.R_OK)]
        if found:
            return max(
                found, key=lambda path: [int(each) for each in re.findall(r"\d+", path.name)]
            )
    return None


def lacking() -> str:
    """What there is not of all that such a guest needs; empty if nothing."""
    if kernel() is None:
        return "a Linux kernel: run tests/vmm/fetch.sh, or name one in RAMFERRY_KERNEL"
    if platform.machine() != "x86_64" or shutil.which("gcc") is None:
        return "a C compiler for x86-64"
    asked = ["gcc", "-print-file-name=libc.a"]
    found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return "" if Path(found).is_absolute() else "a C library to link statically"


needs_linux = pytest.mark.skipif(bool(lacking()), reason=f"needs {lacking()}")


def entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file of a cpio archive, in the kernel's format (initramfs/buffer-format.rst)."""
    inode, user, group, links, modified, disk, checksum = 0, 0, 0, 1, 0, (0, 0), 0
    fields = (inode, mode, user, group, links, modified, len(content), *disk, *device)
    header = b"070701" + b"".join(b"%08x" % each for each in (*fields, len(name) + 1, checksum))
    header += name.encode() + b"\0"
    return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)


def initramfs(directory: Path) -> Path:
    """Build one there."""
    program, archive = directory / "init", directory / "initramfs"
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-static"]
    subprocess.run([*command, "-pthread", "-o", program, HERE / "linux_init.c"], check=True)
    archive.write_bytes(
        entry("dev", DIRECTORY)
        + entry("dev/console", DEVICE, device=(5, 1))
        + entry("dev/ttyS0", DEVICE, device=(4, 64))
        + entry("init", PROGRAM, program.read_bytes())
        + entry("TRAILER!!!", 0)
    )
    return archive


def options(archive: Path) -> tuple[str, ...]:
    """For `vm`, with `mib=MIB`."""
    boot = ("-kernel", str(kernel()), "-initrd", str(archive), "-append", COMMAND_LINE)
    return ("-smp", "2", "-serial", "file:kernel", "-no-reboot", *boot)


def check_said(serial: str, elapsed_s: float) -> int:
    """Look at all that one guest has said on its first port, wherever it was; return its rounds.

    Not one letter is lost or said twice, and its clock neither stands, nor goes back, nor ahead.

    :param elapsed_s: since it was started.
    :raise AssertionError: it is not so."""
    whole = serial[: serial.rfind("R")]  # the last line may be halved
    assert SAID.sub("", whole) == ""
    said = SAID.findall(whole)
    assert [int(each, 16) for each, _ in said] == list(range(1, len(said) + 1))
    clock_ms = [int(each, 16) for _, each in said]
    assert all(before < after for before, after in pairwise(clock_ms))
    assert clock_ms[-1] < elapsed_s * 1000
    return len(said)


def trouble(log: str) -> list[str]:
    """Lines in which the kernel complains."""
    return [line for line in log.splitlines() if TROUBLE.search(line)]
