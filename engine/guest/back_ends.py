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
from dataclasses import dataclass, field
from typing import Final

from engine.errors import GuestError, MemoryRefused, shown
from engine.guest.foreign import ForeignBlock
from engine.guest.foreign_tracking import ForeignTracker, track, whole_pieces
from engine.guest.mappings import File, Mapping, read_mappings
from engine.guest.sharers import check_still_alone, files_of
from engine.memory.pieces import TrackedPiece

AGAIN: Final = "what it wrote since then is not known; migrate it once more"
#: Descriptors with which a device writes into memory by itself.
DEVICES: Final = ("/dev/vfio/", "anon_inode:[vfio", "/dev/uio", "/dev/infiniband/")


@dataclass(slots=True)
class BackEndTracker(ForeignTracker):
    """Writes of a back end are tracked, and its mappings are watched; owns `pidfd`, too.

    :ivar mappings: of the files, as of when its tracking began."""

    pidfd: int = field(kw_only=True)
    files: list[File] = field(kw_only=True)
    mappings: frozenset[Mapping] = field(kw_only=True)

    @property
    def has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def check(self) -> None:
        self.check_forks()
        found: frozenset[Mapping] = frozenset()
        with contextlib.suppress(OSError):  # it has ended
            found = mappings_of(self.pid, self.files)
        if self.has_ended:
            raise MemoryRefused(self.ended)
        if found != self.mappings:
            raise MemoryRefused(
                f"vhost-user back end (pid {self.pid}) does not map the memory any more as it did "
                f"when its tracking began, and {AGAIN}"
            )

    @property
    def ended(self) -> str:
        """Said of one that has."""
        return f"vhost-user back end (pid {self.pid}) has ended, and {AGAIN}"

    def close(self) -> None:
        os.close(self.pidfd)
        ForeignTracker.close(self)


def track_all(
    pid: int, blocks: Sequence[ForeignBlock], back_ends: Sequence[int]
) -> list[ForeignTracker]:
    """Begin to track writes of a QEMU to its blocks, and of its back ends; the QEMU's is the first.

    :raise MemoryRefused: not possible, and why; all are as before.
    :raise GuestError: the QEMU or a back end has ended."""
    with contextlib.ExitStack() as undo:
        trackers = [track(pid, whole_pieces(blocks))]
        undo.callback(trackers[0].close)
        files = files_of(blocks, pid)
        for back_end in back_ends:
            trackers.append(_track(back_end, blocks, files))
            undo.callback(trackers[-1].close)
        check_still_alone(blocks, pid, frozenset(back_ends))  # now that forks are noted
        for tracker in trackers:
            tracker.check()
        undo.pop_all()
        return trackers


def _track(pid: int, blocks: Sequence[ForeignBlock], files: list[File]) -> BackEndTracker:
    with contextlib.ExitStack() as undo:
        pidfd = open_back_end(pid)
        undo.callback(os.close, pidfd)
        try:
            found = mappings_of(pid, files)
            check_bypasses(pid)
        except OSError as exc:
            raise MemoryRefused(
                f"vhost-user back end (pid {pid}) cannot be looked at: {exc.strerror}; run "
                "ramferry as its user or root"
            ) from exc
        tracker = track(pid, pieces_of(found, blocks, files))
        undo.pop_all()
    return BackEndTracker(
        pid, tracker.uffd, tracker.pagemap_fd, tracker.stopped_ns, tracker.pieces,
        pidfd=pidfd, files=files, mappings=found,
    )  # fmt: skip


def open_back_end(pid: int) -> int:
    """Its pidfd, the caller's.

    :raise GuestError: there is no such process."""
    try:
        return os.pidfd_open(pid)
    except OSError as exc:
        raise GuestError(f"there is no vhost-user back end with pid {pid}: {exc.strerror}") from exc


def mappings_of(pid: int, files: Sequence[File]) -> frozenset[Mapping]:
    """Mappings of these files.

    :raise OSError: the process is gone, or not ours to look at."""
    return frozenset(each for each in read_mappings(pid) if each.file in files)


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


def check_bypasses(pid: int) -> None:
    """What a device writes into memory by itself is not seen by any page table.

    :raise MemoryRefused: the process has a device that may, or a file that bypasses the cache.
    :raise OSError: it is not ours to look at."""
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(FileNotFoundError):  # it has ended
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                path = os.readlink(f"{directory}/{name}")
                if path.startswith(DEVICES) or _flags(pid, name) & os.O_DIRECT:
                    raise MemoryRefused(
                        f"vhost-user back end (pid {pid}) has '{shown(path)}' open in a way that "
                        "lets a device write into RAM past every page table, which cannot be "
                        "tracked"
                    )


def _flags(pid: int, name: str) -> int:
    """Those with which a descriptor was opened."""
    with open(f"/proc/{pid}/fdinfo/{name}", encoding="utf-8", errors="replace") as lines:
        found = [line.split()[1] for line in lines if line.startswith("flags:")]
    return int(found[0], 8) if found else 0
