"""What has changed in RAM between two looks at it, from outside and without a tracker.

Contents are read with `pread`, which allocates no holes, and compared by the native page hash. So a
page that was written with what it held already does not count, as with QEMU's sampling. All of this
blocks: it is for a thread. Whoever begins owns the object until `close`.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from engine import _native
from engine.errors import MemoryRefused
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.tracking import HASH_BYTES

GIB: Final = 2**30
#: Smaller blocks are not sampled. QEMU's MIN_RAMBLOCK_SIZE is meant in MiB, and compared in KiB.
BLOCK_BYTES_MIN: Final = 128 * 2**10
BATCH_PAGES: Final = 256  #: 1 MiB at a time, so that an order to stop is heard soon
SEED_BITS: Final = 63


class Stopped(Exception):
    """The measurement was given up."""


class Hasher:
    """Reads pages of one block and hashes them; owns its own descriptor of the block."""

    def __init__(self, block: RamBlock, seed: int) -> None:
        """:raise MemoryRefused: no descriptor is left."""
        try:
            self._fd = os.dup(block.fd)
        except OSError as exc:
            raise MemoryRefused(f"cannot read RAM: {exc.strerror}") from exc
        self._seed = seed
        self._pages = bytearray(BATCH_PAGES * PAGE_SIZE)
        self._hashes = bytearray(BATCH_PAGES * HASH_BYTES)

    def hash_pages(self, pages: Sequence[int]) -> bytes:
        """The hashes of at most BATCH_PAGES pages, one after the other.

        :raise MemoryRefused: RAM is shorter than it was."""
        view = memoryview(self._pages)
        for slot, page in enumerate(pages):
            self._read(view[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE], page)
        return self._hash(len(pages))

    def hash_range(self, first: int, count: int) -> bytes:
        """The hashes of at most BATCH_PAGES pages from `first` on."""
        self._read(memoryview(self._pages)[: count * PAGE_SIZE], first)
        return self._hash(count)

    def is_hole(self, first: int, count: int) -> bool:
        """Nothing of the range was ever touched."""
        try:
            return (
                os.lseek(self._fd, first * PAGE_SIZE, os.SEEK_DATA) >= (first + count) * PAGE_SIZE
            )
        except OSError:  # ENXIO: no data any more
            return True

    def _read(self, view: memoryview, first: int) -> None:
        if os.preadv(self._fd, [view], first * PAGE_SIZE) != len(view):
            raise MemoryRefused("RAM is shorter than it was")

    def _hash(self, count: int) -> bytes:
        runs = memoryview(bytearray(8)).cast("I")
        runs[1] = count
        pages = memoryview(self._pages)[: count * PAGE_SIZE]
        _native.hash_pages(pages, self._seed, self._hashes, runs, 1)
        return bytes(self._hashes[: count * HASH_BYTES])

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Comparison:
    """One seed, one hasher a block, and an end that can be asked for."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._seed = random.getrandbits(SEED_BITS)
        self._blocks = blocks
        self._stopped = threading.Event()
        self._hashers: list[Hasher] = []
        try:
            for block in blocks:
                self._hashers.append(Hasher(block, self._seed))
        except MemoryRefused:
            self.close()
            raise

    def stop(self) -> None:
        """Have `begin` and `count_changed` raise Stopped soon."""
        self._stopped.set()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped

    def close(self) -> None:
        """Give the descriptors back; nothing may run any more. Idempotent."""
        for hasher in self._hashers:
            hasher.close()


class SampledPages(_Comparison):
    """Random pages of the blocks that are large enough, `pages_per_gib` of them: one from each of
    as many equal parts of a block, the same ones at each look.

    :ivar sampled_bytes: size of the blocks that are sampled.
    :ivar sample_count: how many pages are looked at."""

    def __init__(self, blocks: Sequence[RamBlock], pages_per_gib: int) -> None:
        smallest = max(BLOCK_BYTES_MIN, math.ceil(GIB / pages_per_gib))
        super().__init__([block for block in blocks if block.size >= smallest])
        self.sampled_bytes = sum(block.size for block in self._blocks)
        self._counts = [block.size * pages_per_gib // GIB for block in self._blocks]
        self.sample_count = sum(self._counts)
        self._before: list[bytes] = []

    def begin(self) -> None:
        """The first look."""
        self._before = list(self._look())

    def count_changed(self) -> int:
        """The second look: how many of the pages differ."""
        looks = zip(self._before, self._look(), strict=True)
        return sum(differing(before, after) for before, after in looks)

    def _look(self) -> Iterator[bytes]:
        chance = random.Random(self._seed)
        for hasher, block, count in zip(self._hashers, self._blocks, self._counts, strict=True):
            ends = [block.page_count * part // count for part in range(count + 1)]
            for first in range(0, count, BATCH_PAGES):
                self._check()
                parts = itertools.pairwise(ends[first : first + BATCH_PAGES + 1])
                yield hasher.hash_pages([chance.randrange(*part) for part in parts])


class AllPages(_Comparison):
    """Every page of every block: 16 bytes a page, and all of RAM read twice."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        super().__init__(blocks)
        self._zero = bytes(_zero_hash(self._seed))
        self._before: list[bytes] = []

    def begin(self) -> None:
        """The first look."""
        self._before = list(self._look())

    def count_changed(self) -> int:
        """The second look: how many pages differ."""
        looks = zip(self._before, self._look(), strict=True)
        return sum(differing(before, after) for before, after in looks)

    def _look(self) -> Iterator[bytes]:
        """Hashes of batch after batch; holes of a look share one object."""
        holes: dict[int, bytes] = {}
        for hasher, block in zip(self._hashers, self._blocks, strict=True):
            for first in range(0, block.page_count, BATCH_PAGES):
                self._check()
                count = min(BATCH_PAGES, block.page_count - first)
                if hasher.is_hole(first, count):
                    yield holes.setdefault(count, self._zero * count)
                else:
                    yield hasher.hash_range(first, count)


def _zero_hash(seed: int) -> bytearray:
    zero_hash, run = bytearray(HASH_BYTES), memoryview(bytearray(8)).cast("I")
    run[1] = 1
    _native.hash_pages(bytes(PAGE_SIZE), seed, zero_hash, run, 1)
    return zero_hash


def differing(before: bytes, after: bytes) -> int:
    """How many of the hashes differ."""
    if before == after:
        return 0
    return sum(
        before[at : at + HASH_BYTES] != after[at : at + HASH_BYTES]
        for at in range(0, len(before), HASH_BYTES)
    )


Comparison = SampledPages | AllPages
Work = Callable[[], int | None]
