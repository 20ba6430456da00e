"""Sources for postcopy tests, and who plays a peer."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from engine import _native, wire
from perf.postcopy_rig import SESSION, Rig, memory
from tests.kernel import has_userfaultfd

PAGE = 4096
needs_uffd = pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")

T = TypeVar("T")


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """With a deadline of its own."""

    async def bounded() -> T:
        async with asyncio.timeout(180):
            return await scenario

    return asyncio.run(bounded())


@contextmanager
def source(page_count: int, *, zero_every: int = 0, hugetlb: bool = False) -> Iterator[int]:
    """RAM with random pages; each `zero_every`-th is a hole."""
    fd = memory(page_count * PAGE, hugetlb=hugetlb)
    try:
        content = random.Random(1).randbytes(page_count * PAGE)
        step = zero_every or page_count + 1
        for start in range(0, page_count, step):
            first = start + bool(zero_every)
            data = content[first * PAGE : (start + step) * PAGE]
            if hugetlb:  # takes no pwrite
                with mmap.mmap(fd, page_count * PAGE) as ram:
                    ram[first * PAGE : first * PAGE + len(data)] = data
            else:
                os.pwrite(fd, data, first * PAGE)
        yield fd
    finally:
        os.close(fd)


def all_dirty(rig: Rig) -> None:
    """Nothing was sent yet."""
    _native.bitmap_set_range(rig.dirty[0], 0, rig.block.page_count)


def destination(rig: Rig) -> bytes:
    """What is there, without a fault."""
    return os.pread(rig.block.fd, rig.block.size, 0)


def frame(kind: wire.FaultKind, sequence: int, request: int, **fields: Any) -> bytes:
    """A frame of the rig's session."""
    return wire.FaultFrame(
        kind, fields.pop("session", SESSION), sequence, request, **fields
    ).encode()
