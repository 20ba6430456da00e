"""A Linux guest for `machines`: Debian's own kernel, and an initramfs with one program."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.support import eventually
from tests.vmm import machines
from tests.vmm.machines import FETCHED, Vm

KERNELS: Final = sorted((FETCHED / "kernel").glob("boot/vmlinuz-*"))  #: at most one
MIB: Final = 192
BOOT_S: Final = 240.0  #: 5 s where nothing else runs
INIT: Final = Path(__file__).with_name("linux_init.c")
FLAGS: Final = ("-std=c11", "-O2", "-static", "-Wall", "-Wextra", "-Wconversion", "-Werror")
#: Nothing that the kernel measures may end otherwise because the machine is busy, and its own log
#: goes to the second serial port, which is polled: a console driven by interrupts stalls there.
ARGUMENTS: Final = (
    "earlyprintk=serial,0x2f8,115200,keep 8250.nr_uarts=0 loglevel=7 panic=1 no_timer_check "
    "tsc=reliable nowatchdog nosoftlockup rcupdate.rcu_cpu_stall_suppress=1 mitigations=off"
)
TROUBLE: Final = re.compile(
    r".*(?:\bBUG\b|Oops|WARNING:|[Cc]orrupt|Bad page|Call Trace|Kernel panic|Out of memory|segfault"
    r"|traps:).*"
)
needs_kernel = pytest.mark.skipif(
    not KERNELS, reason="needs a kernel for a guest: run tests/vmm/fetch.sh"
)


@dataclass(frozen=True)
class Entry:
    """A file of an archive. `device`: the numbers of the one that it is."""

    name: str
    mode: int
    contents: bytes = b""
    device: tuple[int, int] = (0, 0)


def archive(*entries: Entry) -> bytes:
    """A cpio of the format newc."""
    found = bytearray()
    for number, entry in enumerate((*entries, Entry("TRAILER!!!", 0))):
        name, size = entry.name.encode() + b"\0", len(entry.contents)
        fields = (number, entry.mode, 0, 0, 1, 0, size, 0, 0, *entry.device, len(name), 0)
        found += b"070701" + b"".join(b"%08x" % field for field in fields)
        for part in (name, entry.contents):
            found += part
            found += bytes(-len(found) % 4)
    return bytes(found)


def build(directory: Path) -> Path:
    """Compile the program, and put it into an initramfs."""
    program, found = directory / "init", directory / "initramfs"
    compiler = shutil.which("cc") or "gcc"
    subprocess.run([compiler, *FLAGS, "-o", str(program), str(INIT)], check=True)
    found.write_bytes(
        archive(
            Entry("dev", 0o040755),
            Entry("dev/console", 0o020600, device=(5, 1)),
            Entry("init", 0o100755, program.read_bytes()),
        )
    )
    return found


def vm(initramfs: Path, *options: str) -> AbstractContextManager[Vm]:
    """A QEMU with this guest, which ends if the guest's kernel gives up."""
    given = ["-kernel", str(KERNELS[0]), "-initrd", str(initramfs), "-append", ARGUMENTS]
    given += ["-serial", "file:kernel", "-no-reboot"]
    return machines.vm(*given, *options, mib=MIB)


def has_booted(machine: Vm) -> bool:
    """It begins its rounds, soon."""
    eventually(lambda: machine.process.poll() is not None or machine.rounds() > 2, BOOT_S)
    return machine.rounds() > 2


def complaints(machine: Vm) -> list[str]:
    """What the guest's kernel has said and should not."""
    return TROUBLE.findall(machine.wrote("kernel"))
