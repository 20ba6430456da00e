"""Oracles and processes that the tests of `engine._native` share."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hypothesis import strategies as st

from engine import _native

PAGE: Final = _native.PAGE_SIZE
ROOT: Final = Path(__file__).parents[2]
DEADLINE_S: Final = 60


def bitmap_of(pages: Iterable[int], page_count: int) -> bytearray:
    """A bitmap with the bits of `pages` set."""
    bitmap = bytearray(-(-page_count // 64) * 8)
    for page in pages:
        bitmap[page // 8] |= 1 << page % 8
    return bitmap


def pages_of(bitmap: bytes | bytearray | memoryview | mmap.mmap) -> set[int]:
    """The pages whose bits are set."""
    return {
        byte * 8 + bit
        for byte, value in enumerate(bytes(bitmap))
        for bit in range(8)
        if value >> bit & 1
    }


def slice_pages(page_slice: _native.Slice) -> set[int]:
    """What a slice means, page by page."""
    page_count, stripe_pages, worker_index, worker_count = page_slice
    return {p for p in range(page_count) if p // stripe_pages % worker_count == worker_index}


def table_of(runs: Sequence[tuple[int, int]]) -> bytes:
    """A run table."""
    return b"".join(struct.pack("<II", *run) for run in runs)


def runs_of(table: bytes | bytearray, run_count: int) -> list[tuple[int, int]]:
    """The runs of a table."""
    return [struct.unpack_from("<II", table, 8 * i) for i in range(run_count)]


def pages_in(runs: Iterable[tuple[int, int]]) -> list[int]:
    """The pages of runs, in order."""
    return [page for first, count in runs for page in range(first, first + count)]


@st.composite
def slices(draw: st.DrawFn, pages_max: int = 600) -> _native.Slice:
    """Slices of all shapes."""
    worker_count = draw(st.integers(1, 5))
    return (
        draw(st.integers(0, pages_max)),
        64 * draw(st.integers(1, 4)),
        draw(st.integers(0, worker_count - 1)),
        worker_count,
    )


@contextmanager
def shared_memory(size: int) -> Iterator[tuple[int, mmap.mmap]]:
    """A memfd and a mapping of it."""
    fd = os.memfd_create("ramferry-test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as mapping:
            yield fd, mapping
    finally:
        os.close(fd)


class Peer:
    """Another process that runs `tests.native.peer` over some descriptors, one line a command."""

    def __init__(self, role: str, *fds: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.native.peer", role, *map(str, fds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            pass_fds=fds, cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def tell(self, *words: object) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")

    def answer(self) -> int:
        """Wait for the number that answers a command (or the start); the peer's alarm bounds it."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def ask(self, *words: object) -> int:
        """Send a command and wait for its answer."""
        self.tell(*words)
        return self.answer()

    def kill(self) -> None:
        """End it now. Idempotent."""
        self.process.kill()
        self.process.wait(DEADLINE_S)
