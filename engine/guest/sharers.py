"""Who else maps a guest's memory: what others write there nobody would see."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from engine.errors import MemoryRefused
from engine.guest.foreign import ForeignBlock
from engine.guest.mappings import File, looking_at, read_mappings, read_maps


def others_mapping(inodes: set[File], pid: int) -> list[int]:
    """Processes other than `pid` and us that map one of the files; not such as this user may not
    look at.

    :raise MemoryRefused: what one maps cannot be understood."""
    found = []
    texts = [
        f" {os.major(device):02x}:{os.minor(device):02x} {inode} ".encode()
        for device, inode in inodes
    ]
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (pid, os.getpid()):
            continue
        with contextlib.suppress(OSError):
            if not _maps_have(int(name), texts):
                continue
            if any(each.file in inodes for each in read_mappings(int(name))):
                found.append(int(name))
    return found


def _maps_have(pid: int, texts: Sequence[bytes]) -> bool:
    """Whether what it maps has one of the texts anywhere, be it in a file's name; parsing every
    line takes three times as long.

    :raise OSError: the process is gone, or not ours to look at."""
    maps = read_maps(pid)
    return any(text in maps for text in texts)


def check_alone(files: set[File], pid: int, besides: frozenset[int] = frozenset()) -> None:
    """Others' writes would not be seen.

    :param besides: processes that may.
    :raise MemoryRefused: another process maps one of the files."""
    if others := [each for each in others_mapping(files, pid) if each not in besides]:
        numbers = ", ".join(str(each) for each in others)
        raise MemoryRefused(
            f"other processes map the memory of process {pid}, too (pid {numbers}), and nobody "
            "sees what they write; end them, or name a QEMU's vhost-user back ends: vhost-user=PID"
        )


def check_still_alone(
    blocks: Sequence[ForeignBlock], pid: int, besides: frozenset[int] = frozenset()
) -> None:
    """As `check_alone`, also of those who have come since the blocks were found.

    :raise GuestError: the process has ended."""
    check_alone(set(files_of(blocks, pid)), pid, besides)


def files_of(blocks: Sequence[ForeignBlock], pid: int) -> list[File]:
    """Each block's file as all mappings name it. The status of a descriptor may say another device:
    a btrfs or an overlay has several.

    :raise MemoryRefused: the process does not map a block any more where it did.
    :raise GuestError: the process has ended."""
    with looking_at(pid):
        files = {each.start: each.file for each in read_mappings(pid)}
    if any(each.address not in files for each in blocks):
        raise MemoryRefused(f"process {pid} does not map its memory where it did")
    return [files[each.address] for each in blocks]


def family_of(pid: int) -> frozenset[int]:
    """A process and its children, also when threads of it end meanwhile; none of one that has
    ended."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return frozenset()
    found = {pid}
    for thread in threads:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as children,
        ):
            found.update(int(child) for child in children.read().split())
    return frozenset(found)
