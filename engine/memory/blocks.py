"""RAM blocks: named pieces of shared memory that a guest's RAM is made of.

A block is a descriptor (memfd, or a file in a tmpfs or hugetlbfs) and a size. Whoever holds the
descriptor can map it; the block's owner closes it.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Final

from engine import _native
from engine.errors import MemoryRefused

PAGE_SIZE: Final = 4096
STRIPE_SIZE: Final = (
    2 * 1024 * 1024
)  #: stripes are dealt to workers in turn; a huge page is never split
BLOCK_SIZE_MAX: Final = 2**32 * PAGE_SIZE  #: page indices are 32 bits on the wire: 16 TiB


def check_page_size() -> None:
    """Check that this kernel's pages are those of bitmaps, packets and native code.

    :raise MemoryRefused: they are not (arm64 kernels also come with 16 and 64 KiB)."""
    size = os.sysconf("SC_PAGESIZE")
    if size != PAGE_SIZE:
        raise MemoryRefused(f"this kernel has pages of {size} bytes; {PAGE_SIZE} are needed")


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One block; frozen, because workers and peers are told its shape once.

    :ivar name: QEMU's idstr, unique within a guest, 1 to 255 bytes of UTF-8.
    :ivar size: bytes, a multiple of `backing_page_size`.
    :ivar fd: descriptor of the shared memory, owned by whoever made the block.
    :ivar backing_page_size: 4096, or the huge page size of a hugetlbfs.
    """

    name: str
    size: int
    fd: int
    backing_page_size: int = PAGE_SIZE

    @property
    def page_count(self) -> int:
        return self.size // PAGE_SIZE

    @property
    def stripe_pages(self) -> int:
        return max(STRIPE_SIZE, self.backing_page_size) // PAGE_SIZE

    def map(self) -> mmap.mmap:
        """Map the whole block, shared and writable; the caller closes the mapping."""
        return mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def slice_of(self, worker_index: int, worker_count: int) -> tuple[int, int, int, int]:
        """The worker's part in the shape `engine._native` takes."""
        return self.page_count, self.stripe_pages, worker_index, worker_count

    def allocated_bytes(self) -> int:
        """Memory that the block really occupies (holes excluded)."""
        return os.fstat(self.fd).st_blocks * 512

    def is_full(self) -> bool:
        """Its file is not longer than it, and has as much memory as it: so it has no holes, or few,
        for what lies beyond the file's end (`FALLOC_FL_KEEP_SIZE`) counts, too."""
        return os.fstat(self.fd).st_size == self.size and self.allocated_bytes() >= self.size

    def discard(self) -> None:
        """Punch the whole block: every page is a hole and reads as zero."""
        try:
            _native.punch_hole(self.fd, 0, self.size)
        except OSError as exc:
            raise MemoryRefused(f"cannot discard RAM block '{self.name}'") from exc
