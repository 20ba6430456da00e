"""Dirty trackers as the tracked process itself opens them.

An `OpenTracker` owns its userfaultfd, pagemap and bitmap; `close` gives them back, and the tracked
program pays nothing any more.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from engine import _native
from engine.errors import MemoryRefused
from engine.memory.blocks import PAGE_SIZE, STRIPE_SIZE
from engine.memory.tracking import TrackerName

PAGEMAP: Final = "/proc/self/pagemap"
CLEAR_REFS: Final = "/proc/self/clear_refs"
CLEAR_SOFT_DIRTY: Final = b"4"
FEATURES: Final = (
    _native.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | _native.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | _native.UFFD_FEATURE_WP_UNPOPULATED
    | _native.UFFD_FEATURE_WP_ASYNC
)


@dataclass(slots=True)
class OpenTracker:
    """A tracker in use; owns its descriptors.

    :ivar fd: to be handed out: pagemap (UFFD, SOFT_DIRTY) or bitmap (BITMAP), or -1.
    :ivar address: of RAM in this process, or 0.
    :ivar bitmap: where the vCPUs set the bit of a page after each write.
    :ivar arm: call every page clean from now on (SOFT_DIRTY).
    """

    name: TrackerName
    reason: str
    fd: int = -1
    address: int = 0
    bitmap: mmap.mmap | None = None
    arm: Callable[[], None] = lambda: None
    release: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        """Stop tracking. The bitmap must not be in use any more."""
        self.release.close()


def count_written(tracker: OpenTracker, page_count: int) -> int:
    """How many pages the tracker found written since it was opened, or re-armed."""
    whole = (page_count, STRIPE_SIZE // PAGE_SIZE, 0, 1)
    if tracker.bitmap is not None:
        return _native.bitmap_count(tracker.bitmap, whole)
    scratch = bytearray(-(-page_count // 64) * 8)
    if tracker.name is TrackerName.UFFD:
        return _native.pagemap_scan(tracker.fd, tracker.address, scratch, whole)
    return _native.soft_dirty_scan(tracker.fd, tracker.address, scratch, whole)


def open_tracker(wanted: TrackerName | None, ram: mmap.mmap, page_count: int) -> OpenTracker:
    """Begin to track; every page is clean from now.

    :param wanted: None takes the first that works of UFFD, BITMAP, SOFT_DIRTY and HASH.
    :raise MemoryRefused: the wanted one does not work here; says which do."""
    if wanted is not None:
        return _open_wanted(wanted, ram, page_count)
    refusals = []
    for name, opener in OPENERS.items():
        try:
            tracker = opener(ram, page_count)
        except MemoryRefused as exc:
            refusals.append(f"{name.value} does not work here ({exc})")
        else:
            tracker.reason = "; ".join([*refusals, tracker.reason])
            return tracker
    raise MemoryRefused("; ".join(refusals))


def _open_wanted(wanted: TrackerName, ram: mmap.mmap, page_count: int) -> OpenTracker:
    try:
        if wanted not in OPENERS:
            raise MemoryRefused("it is not for a guest that can run")
        tracker = OPENERS[wanted](ram, page_count)
    except MemoryRefused as exc:
        working = ", ".join(_working(wanted, ram, page_count))
        raise MemoryRefused(
            f"dirty tracker '{wanted.value}' does not work here: {exc}; working are: {working}"
        ) from exc
    tracker.reason = f"asked for; {tracker.reason}"
    return tracker


def _working(wanted: TrackerName, ram: mmap.mmap, page_count: int) -> list[str]:
    names = []
    for name, opener in OPENERS.items():
        if name is not wanted:
            with contextlib.suppress(MemoryRefused):
                opener(ram, page_count).close()
                names.append(name.value)
    return names


def _open_uffd(ram: mmap.mmap, page_count: int) -> OpenTracker:
    with contextlib.ExitStack() as release:
        pagemap_fd = _open(PAGEMAP, os.O_RDONLY, release)
        if not _native.pagemap_scan_supported(pagemap_fd):
            raise MemoryRefused("the kernel has no PAGEMAP_SCAN, which Linux 6.7 brought")
        address, size = _native.mapping_address(ram), page_count * PAGE_SIZE
        try:
            uffd = _open_userfaultfd()
            release.callback(os.close, uffd)
            _native.uffd_register(uffd, address, size, _native.UFFD_REGISTER_WP)
            release.callback(_native.uffd_unregister, uffd, address, size)
            scratch = bytearray(-(-page_count // 64) * 8)
            stripe = (page_count, STRIPE_SIZE // PAGE_SIZE, 0, 1)
            _native.pagemap_scan(pagemap_fd, address, scratch, stripe)
        except OSError as exc:
            raise MemoryRefused(f"userfaultfd: {exc.strerror}") from exc
        return OpenTracker(
            TrackerName.UFFD,
            "userfaultfd write-protect async with PAGEMAP_SCAN: reads and re-arms in one call",
            pagemap_fd,
            address,
            release=release.pop_all(),
        )


def _open_userfaultfd() -> int:
    """One for user-mode faults needs no privilege; older kernels do not know that flag."""
    try:
        return _native.uffd_open(_native.UFFD_USER_MODE_ONLY, FEATURES)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EPERM):
            raise
    return _native.uffd_open(0, FEATURES)


def _open_bitmap(_ram: mmap.mmap, page_count: int) -> OpenTracker:
    size = -(-page_count // (8 * PAGE_SIZE)) * PAGE_SIZE
    with contextlib.ExitStack() as release:
        try:
            fd = os.memfd_create("ramferry-written", os.MFD_CLOEXEC)
            release.callback(os.close, fd)
            os.ftruncate(fd, size)
            bitmap = release.enter_context(mmap.mmap(fd, size))
        except OSError as exc:
            raise MemoryRefused(f"no memory for the bitmap: {exc.strerror}") from exc
        return OpenTracker(
            TrackerName.BITMAP,
            "the vCPUs set a bit after each write",
            fd,
            bitmap=bitmap,
            release=release.pop_all(),
        )


def _open_soft_dirty(ram: mmap.mmap, _page_count: int) -> OpenTracker:
    with contextlib.ExitStack() as release:
        pagemap_fd = _open(PAGEMAP, os.O_RDONLY, release)
        clear_fd = _open(CLEAR_REFS, os.O_WRONLY, release)
        if not _has_soft_dirty(pagemap_fd, clear_fd):
            raise MemoryRefused("the kernel keeps no soft-dirty bits")
        return OpenTracker(
            TrackerName.SOFT_DIRTY,
            "soft-dirty bits, read and cleared while the guest stands",
            pagemap_fd,
            _native.mapping_address(ram),
            arm=lambda: _clear_soft_dirty(clear_fd),
            release=release.pop_all(),
        )


def _open(path: str, flags: int, release: contextlib.ExitStack) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as exc:
        raise MemoryRefused(f"{path}: {exc.strerror}") from exc
    release.callback(os.close, fd)
    return fd


def _clear_soft_dirty(clear_fd: int) -> None:
    os.pwrite(clear_fd, CLEAR_SOFT_DIRTY, 0)


def _has_soft_dirty(pagemap_fd: int, clear_fd: int) -> bool:
    """Clear all bits, write one page of two, and look. Leaves all of RAM clean."""
    found = bytearray(8)
    with mmap.mmap(-1, 2 * PAGE_SIZE) as probe:
        probe[0] = probe[PAGE_SIZE] = 1
        try:
            _clear_soft_dirty(clear_fd)
            probe[0] = 2
            address = _native.mapping_address(probe)
            _native.soft_dirty_scan(pagemap_fd, address, found, (2, 64, 0, 1))
        except OSError:
            return False
    return found[0] == 1


def _open_hash(_ram: mmap.mmap, _page_count: int) -> OpenTracker:
    return OpenTracker(TrackerName.HASH, "contents are compared, each pass reads all of RAM")


OPENERS: Final[Mapping[TrackerName, Callable[[mmap.mmap, int], OpenTracker]]] = {
    TrackerName.UFFD: _open_uffd,
    TrackerName.BITMAP: _open_bitmap,
    TrackerName.SOFT_DIRTY: _open_soft_dirty,
    TrackerName.HASH: _open_hash,
}
