"""Where a process maps what, by /proc."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]  #: address and size, in the process
File = tuple[int, int]  #: device and inode


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


def read_mappings(pid: int) -> list[Mapping]:
    """:raise OSError: the process is gone, or not ours to look at."""
    mappings = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            place, rights, offset, device, inode = line.split(maxsplit=5)[:5]
            start, _, end = place.partition("-")
            major, _, minor = device.partition(":")
            number = os.makedev(int(major, 16), int(minor, 16))
            mappings.append(
                Mapping(int(start, 16), int(end, 16), rights, int(offset, 16), number, int(inode))
            )
    return mappings


@dataclass(frozen=True, slots=True)
class Place:
    """A mapping, as of smaps in proc(5); `flags` are the kernel's."""

    start: int
    end: int
    page_size: int
    flags: frozenset[str]


def read_places(pid: int) -> list[Place]:
    """All mappings, by address.

    :raise OSError: the process is gone, or not ours to look at."""
    places, start, end, page_size = [], 0, 0, 0
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as lines:
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

    :raise OSError: the process is gone, or not ours to look at."""
    return [
        place.flags
        for place in read_places(pid)
        if any(address <= place.start < address + size for address, size in ranges)
    ]
