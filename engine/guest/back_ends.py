"""A QEMU's vhost-user back ends: processes that map its RAM too, and write there beside it.

QEMU sends them its memory's descriptors when a device starts, and they map what they like of it:
parts, from offsets, twice. They do so anew when the guest is continued. What they write until that
is seen again nobody knows, so a back end that maps other things than when its tracking began ends
the migration.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Self

from engine.errors import GuestError, MemoryRefused, shown
from engine.guest.foreign import ForeignBlock
from engine.guest.foreign_tracking import ForeignTracker, track, whole_pieces
from engine.guest.injecting import Injector
from engine.guest.mappings import File, Mapping, read_mappings
from engine.guest.sharers import check_still_alone, files_of
from engine.memory.pieces import TrackedPiece, check_piece_count

AGAIN: Final = "what it wrote since then is not known; migrate it once more"
#: Descriptors with which a device writes into memory by itself.
DEVICES: Final = (
    "/dev/vfio/",
    "anon_inode:[vfio",
    "/dev/iommu",
    "/dev/vhost-vdpa",
    "/dev/uio",
    "/dev/infiniband/",
)


@dataclass(frozen=True, slots=True)
class BackEnd:
    """One that was named. Owns `pidfd`, by which it is this one still when others have its pid."""

    pid: int
    pidfd: int

    @classmethod
    def open(cls, pid: int) -> Self:
        """:raise GuestError: there is no such process."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError as exc:
            raise GuestError(
                f"there is no vhost-user back end with pid {pid}: {exc.strerror}"
            ) from exc

    @property
    def has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def ended(self) -> str:
        """Said of one that has."""
        return f"{self} has ended, and {AGAIN}"

    def unseen(self, exc: OSError) -> MemoryRefused:
        """Why nothing is known of it."""
        if self.has_ended:
            return MemoryRefused(self.ended)
        return MemoryRefused(
            f"{self} cannot be looked at: {exc.strerror}; run ramferry as its user or root"
        )

    def __str__(self) -> str:
        return f"vhost-user back end (pid {self.pid})"

    def close(self) -> None:
        os.close(self.pidfd)


@dataclass(slots=True)
class BackEndTracker(ForeignTracker):
    """Writes of a back end are tracked, and its mappings are watched.

    :ivar back_end: its owner keeps it open for longer.
    :ivar mappings: of the files, as of when its tracking began."""

    back_end: BackEnd = field(kw_only=True)
    files: list[File] = field(kw_only=True)
    mappings: frozenset[Mapping] = field(kw_only=True)

    @property
    def what(self) -> str:
        return str(self.back_end)

    def check(self) -> None:
        self.check_forks()
        found = mappings_of(self.back_end, self.files)
        if self.back_end.has_ended:
            raise MemoryRefused(self.back_end.ended)
        if found != self.mappings:
            raise MemoryRefused(
                f"{self.back_end} does not map the memory any more as it did when its tracking "
                f"began, and {AGAIN}"
            )


def track_all(
    pid: int, blocks: Sequence[ForeignBlock], back_ends: Sequence[BackEnd]
) -> list[ForeignTracker]:
    """Begin to track writes of a QEMU to its blocks, and of its back ends; the QEMU's is the first.

    :raise MemoryRefused: not possible, and why; all are as before.
    :raise GuestError: the QEMU has ended."""
    files = files_of(blocks, pid)
    found = [_look(each, files) for each in back_ends]
    whole, parts = whole_pieces(blocks), [pieces_of(each, blocks, files) for each in found]
    check_piece_count(len(whole) + sum(len(each) for each in parts))
    injector = Injector()
    with contextlib.ExitStack() as undo:
        trackers = [track(pid, whole, injector, ForeignTracker)]
        undo.callback(trackers[0].close)
        for back_end, mappings, pieces in zip(back_ends, found, parts, strict=True):
            kind = partial(BackEndTracker, back_end=back_end, files=files, mappings=mappings)
            trackers.append(track(back_end.pid, pieces, injector, kind))
            undo.callback(trackers[-1].close)
        check_still_alone(blocks, pid, frozenset(each.pid for each in back_ends))  # forks are noted
        for tracker in trackers:
            tracker.check()
        undo.pop_all()
        return trackers


def _look(back_end: BackEnd, files: Sequence[File]) -> frozenset[Mapping]:
    """What it maps, of one that can be tracked.

    :raise MemoryRefused: it cannot."""
    if back_end.has_ended:
        raise MemoryRefused(
            f"{back_end} has ended; start ramferry anew, and name the one in its place"
        )
    check_bypasses(back_end)
    return mappings_of(back_end, files)


def mappings_of(back_end: BackEnd, files: Sequence[File]) -> frozenset[Mapping]:
    """Mappings of these files. Those that go on in each other are one: the kernel splits them as it
    likes, also where a tracked part ends.

    :raise MemoryRefused: it has ended, or is not ours to look at."""
    try:
        mappings = read_mappings(back_end.pid)
    except OSError as exc:
        raise back_end.unseen(exc) from exc
    found: list[Mapping] = []
    for each in mappings:
        if each.file not in files:
            continue
        if found and found[-1].goes_on_in(each):
            found[-1] = replace(found[-1], end=each.end)
        else:
            found.append(each)
    return frozenset(found)


def pieces_of(
    mappings: frozenset[Mapping], blocks: Sequence[ForeignBlock], files: Sequence[File]
) -> list[TrackedPiece]:
    """What of the blocks is written through these mappings. What is mapped beyond the end of a file
    cannot be written."""
    pieces = []
    for mapping in sorted(mappings, key=lambda each: each.start):
        index = files.index(mapping.file)
        size = min(mapping.end - mapping.start, blocks[index].block.size - mapping.offset)
        if mapping.is_written and size > 0:
            pieces.append(TrackedPiece(index, 0, mapping.start, size, mapping.offset))
    return pieces


def check_bypasses(back_end: BackEnd) -> None:
    """What a device writes into memory by itself is not seen by any page table.

    :raise MemoryRefused: the process has a device that may, or a file that bypasses the cache; or
        it has ended, or is not ours to look at."""
    directory = f"/proc/{back_end.pid}/fd"
    try:
        names = os.listdir(directory)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                path = os.readlink(f"{directory}/{name}")
                if path.startswith(DEVICES) or _flags(back_end.pid, name) & os.O_DIRECT:
                    raise MemoryRefused(
                        f"{back_end} has '{shown(path)}' open in a way that lets a device write "
                        "into RAM past every page table, which cannot be tracked"
                    )
    except OSError as exc:
        raise back_end.unseen(exc) from exc
    if back_end.has_ended:  # and another process had its pid
        raise MemoryRefused(back_end.ended)
    if not names:  # one that serves has its QEMU's socket
        raise MemoryRefused(
            f"{back_end} shows no open file: its first thread has ended; name a process whose "
            "first thread lives"
        )


def _flags(pid: int, name: str) -> int:
    """Those with which a descriptor was opened."""
    with open(f"/proc/{pid}/fdinfo/{name}", encoding="utf-8", errors="replace") as lines:
        found = [line.split()[1] for line in lines if line.startswith("flags:")]
    return int(found[0], 8) if found else 0
