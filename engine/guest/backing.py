"""Where a guest's RAM comes from: a memfd, or a file in a tmpfs or hugetlbfs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final

from engine.errors import MemoryRefused, UsageError, shown
from engine.guest.rundir import remove_file
from engine.memory.blocks import PAGE_SIZE, RamBlock

HUGE_2M: Final = 2 * 1024**2
HUGE_1G: Final = 1024**3
MFD_HUGE: Final = {HUGE_2M: os.MFD_HUGE_2MB, HUGE_1G: os.MFD_HUGE_1GB}
BLOCK_NAME: Final = "ram"


@dataclass(slots=True)
class OwnedRam:
    """One block, its descriptor, and the file if we made it; `close` gives all back."""

    block: RamBlock
    created_path: str = ""

    def close(self) -> None:
        """Remove the file that was made here, close the descriptor. Only once."""
        if self.created_path:
            remove_file(self.created_path, self.block.fd)
        os.close(self.block.fd)


def available_bytes() -> int:
    """What the kernel thinks can be allocated without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    raise MemoryRefused("/proc/meminfo tells no MemAvailable")


def check_available(wanted: int, what: str) -> None:
    """:raise MemoryRefused: less than `wanted` bytes are there for `what`."""
    available = available_bytes()
    if wanted > available:
        raise MemoryRefused(
            f"{what} wants {wanted / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB "
            "are available; give a smaller size"
        )


def make_ram(size: int, path: str | None, hugetlb: int | None, page_size: int | None) -> OwnedRam:
    """Make or open RAM of `size` bytes; nothing of it is allocated yet.

    :param hugetlb: huge page size of a memfd (2 MiB or 1 GiB), or None.
    :param page_size: treat it as made of such pages, at least what the backing has; None: as it is.
    :raise UsageError: it cannot be had like that.
    :raise MemoryRefused: the system has no such memory."""
    with contextlib.ExitStack() as undo:
        created_path = ""
        if path is None:
            fd = _make_memfd(size, hugetlb)
            undo.callback(os.close, fd)
        else:
            fd, is_new = _open_file(path)
            undo.callback(os.close, fd)
            if is_new:
                created_path = os.path.abspath(path)
                undo.callback(remove_file, created_path, fd)
            _lock(fd, path)
        backing = os.fstatvfs(fd).f_bsize if path is not None else hugetlb or PAGE_SIZE
        backing = max(backing, PAGE_SIZE)
        _check_page_size(size, backing, page_size)
        if created_path or path is None:
            _set_size(fd, size)
        elif os.fstat(fd).st_size != size:
            there = os.fstat(fd).st_size
            raise UsageError(
                f"'{shown(path)}' has {there} bytes; give size={there}, or another path"
            )
        if backing > PAGE_SIZE:
            _reserve(fd, size, backing)
        undo.pop_all()
        return OwnedRam(RamBlock(BLOCK_NAME, size, fd, page_size or backing), created_path)


def _make_memfd(size: int, hugetlb: int | None) -> int:
    flags = os.MFD_CLOEXEC
    if hugetlb is not None:
        flags |= os.MFD_HUGETLB | MFD_HUGE[hugetlb]
    try:
        return os.memfd_create("ramferry-ram", flags)
    except OSError as exc:
        kind = f"huge pages of {hugetlb // 1024} KiB" if hugetlb else "memory"
        raise MemoryRefused(f"cannot make a memfd of {size} bytes of {kind}") from exc


def _open_file(path: str) -> tuple[int, bool]:
    """Open the file, or make it; say whether it was made."""
    flags = os.O_RDWR | os.O_CLOEXEC
    for _ in range(2):
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            pass
        except OSError as exc:
            raise UsageError(f"cannot make RAM at '{shown(path)}': {exc.strerror}") from exc
        try:
            return os.open(path, flags), False
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise UsageError(f"cannot open RAM at '{shown(path)}': {exc.strerror}") from exc
    raise UsageError(f"'{shown(path)}' comes and goes; use another path")


def _lock(fd: int, path: str) -> None:
    """One guest to a file: as source and destination it would be punched while it is sent.

    Lent descriptors share the lock, so it lasts as long as the guest, whoever controls it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        raise UsageError(f"'{shown(path)}' is the RAM of another guest; use another path") from exc


def _check_page_size(size: int, backing: int, page_size: int | None) -> None:
    if page_size is not None and page_size < backing:
        raise UsageError(f"pagesize={page_size} is less than the {backing} bytes of this memory")
    unit = page_size or backing
    if size <= 0 or size % unit:
        raise UsageError(f"size={size} is not a positive multiple of the page size {unit}")


def _set_size(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as exc:
        raise MemoryRefused(f"cannot make RAM of {size} bytes") from exc


def _reserve(fd: int, size: int, backing: int) -> None:
    """Huge pages are reserved when they are mapped, so a lack of them shows here, not as SIGBUS."""
    try:
        mmap.mmap(fd, size).close()
    except OSError as exc:
        if exc.errno != errno.ENOMEM:
            raise MemoryRefused(f"cannot map {size} bytes of huge pages") from exc
        raise MemoryRefused(
            f"not enough huge pages: {size // backing} of {backing // 1024} KiB are needed; "
            f"reserve them with sysctl vm.nr_hugepages"
        ) from exc
