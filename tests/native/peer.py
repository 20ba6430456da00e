"""The other process of the native tests: a tracked guest, or one that works on shared bitmaps."""

from __future__ import annotations

import mmap
import os
import signal
import sys

from engine import _native

PAGE = _native.PAGE_SIZE


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _guest(ram: mmap.mmap) -> None:
    """A guest registered for write tracking; `first count step` writes pages."""
    uffd = _native.uffd_open(
        _native.UFFD_USER_MODE_ONLY,
        _native.UFFD_FEATURE_WP_ASYNC
        | _native.UFFD_FEATURE_WP_UNPOPULATED
        | _native.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        | _native.UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    )
    address = _native.mapping_address(ram)
    _native.uffd_register(uffd, address, len(ram), _native.UFFD_REGISTER_WP)
    _say(address)
    for line in sys.stdin:
        first, count, step = map(int, line.split())
        for page in range(first, first + count * step, step):
            ram[page * PAGE] = (ram[page * PAGE] + 1) % 256
        _say(count)
    os.close(uffd)


def _set_bits(bitmap: mmap.mmap) -> None:
    _say(0)
    sys.stdin.readline()
    _say(sum(_native.bitmap_set_range(bitmap, page, 1) for page in range(len(bitmap) * 8)))


def _move_bits(source: mmap.mmap, target: mmap.mmap) -> None:
    page_slice = (len(source) * 8, 64, 0, 1)
    _say(0)
    times = int(sys.stdin.readline())
    for _ in range(times):
        _native.bitmap_move_slice(source, target, page_slice)
    _say(times)


def _buy(budget: mmap.mmap) -> None:
    _say(0)
    times = int(sys.stdin.readline())
    for _ in range(times):
        _native.budget_take(budget, 3, 0, 0)
    _say(times)


def main() -> None:
    """Run the role named first over mappings of the descriptors named after it."""
    signal.alarm(60)  # nobody waits for a lost peer
    role, mappings = sys.argv[1], [mmap.mmap(int(fd), 0) for fd in sys.argv[2:]]
    roles = {"guest": _guest, "set": _set_bits, "move": _move_bits, "buy": _buy}
    roles[role](*mappings)  # type: ignore[operator]


if __name__ == "__main__":
    main()
