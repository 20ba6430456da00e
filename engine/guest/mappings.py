"""Where a process maps what, by /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.errors import GuestError, MemoryRefused

Range = tuple[int, int]  #: address and size, in the process
File = tuple[int, int]  #: device and inode


@contextlib.contextmanager
def looking_at(pid: int) -> Iterator[None]:
    """:raise GuestError: the process has ended, or is not ours to look at."""
    try:
        yield
    except OSError as exc:
        raise GuestError(
            f"process {pid} cannot be looked at; if it lives, run ramferry as its user or root"
        ) from exc


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps. `offset` is where in its file it begins."""

    start: int
    end: int
    rights: str
    offset: int
    device: int
    inode: int

    @property
    def file(self) -> File:
        return self.device, self.inode

    @property
    def is_written(self) -> bool:
        """Whether what the process writes here is in the file."""
        return self.rights[1] + self.rights[3] == "ws"

    def goes_on_in(self, other: Mapping) -> bool:
        """Whether the two are as one mapping would be."""
        return (self.end, self.offset + self.end - self.start, self.file, self.rights) == (
            other.start, other.offset, other.file, other.rights
        )  # fmt: skip


def read_maps(pid: int) -> bytes:
    """/proc/PID/maps; of a living thread, if the first has ended, of which it shows nothing. Empty
    for a process without memory.

    :raise OSError: the process is gone, or not ours to look at."""
    if maps := _read(f"/proc/{pid}/maps"):
        return maps
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if maps := _read(f"/proc/{pid}/task/{thread}/maps"):
                return maps
    return b""


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def read_mappings(pid: int) -> list[Mapping]:
    """:raise OSError: the process is gone, or not ours to look at.
    :raise MemoryRefused: a line of it means nothing to us."""
    lines = read_maps(pid).split(b"\n")  # of a file's name the kernel escapes this, but not "\r"
    try:
        return [_parse(line) for line in lines if line]
    except ValueError as exc:
        raise MemoryRefused(f"what process {pid} maps cannot be understood") from exc


def _parse(line: bytes) -> Mapping:
    place, rights, offset, device, inode = line.split(maxsplit=5)[:5]
    start, _, end = place.partition(b"-")
    major, _, minor = device.partition(b":")
    number = os.makedev(int(major, 16), int(minor, 16))
    return Mapping(
        int(start, 16), int(end, 16), rights.decode(), int(offset, 16), number, int(inode)
    )


@dataclass(frozen=True, slots=True)
class Place:
    """A mapping, as of smaps in proc(5); `flags` are the kernel's."""

    start: int
    end: int
    page_size: int
    flags: frozenset[str]


def read_places(pid: int) -> list[Place]:
    """All mappings, by address.

    :raise GuestError: the process has ended, or is not ours to look at."""
    places, start, end, page_size = [], 0, 0, 0
    with (
        looking_at(pid),
        open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace", newline="\n") as lines,
    ):
        for line in lines:
            words = line.split()
            if not words[0].endswith(":"):
                start, end = (int(each, 16) for each in words[0].split("-"))
            elif words[0] == "KernelPageSize:":
                page_size = int(words[1]) * 1024
            elif words[0] == "VmFlags:":
                places.append(Place(start, end, page_size, frozenset(words[1:])))
    return places


def flags_of(pid: int, ranges: Sequence[Range]) -> list[frozenset[str]]:
    """The kernel's flags of each mapping in these ranges of the process.

    :raise GuestError: the process has ended, or is not ours to look at."""
    return [
        place.flags
        for place in read_places(pid)
        if any(address <= place.start < address + size for address, size in ranges)
    ]
