"""The fault service as control sees it, with workers that a test plays."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from engine import wire
from engine.control.pool import Pool
from engine.control.postcopy.faultservice import FaultService
from engine.guest.base import Missing
from engine.memory.bitmaps import PageBitmaps, shared_memory
from engine.memory.blocks import RamBlock
from engine.postcopy.statistics import FaultStatistics

SIZE = 1 << 20
ENDPOINT = "tcp://127.0.0.1:5"


@contextlib.contextmanager
def ram() -> Iterator[RamBlock]:
    block = RamBlock("ram", SIZE, shared_memory("test", SIZE))
    try:
        yield block
    finally:
        os.close(block.fd)


def made(workers: Any, block: RamBlock, moved: Callable[[str], None] = print) -> FaultService:
    pool = cast("Pool[wire.FaultsReport]", workers)
    missing = Missing((0,), (0,), 1)
    return FaultService(pool, bytes(16), [block], missing, moved, prefetch_pages_max=0)


@pytest.mark.parametrize("step", ["received", "stale", "statistics", "filling"])
def test_one_that_cannot_be_made_leaves_no_descriptors(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    create = PageBitmaps.create

    def full(*args: Any) -> Any:
        if args[:1] == (step,) or step in ("statistics", "filling"):
            raise OSError(errno.EMFILE, "Too many open files")
        return create(*args)

    match step:
        case "statistics":
            monkeypatch.setattr(FaultStatistics, "create", full)
        case "filling":
            monkeypatch.setattr(PageBitmaps, "fill", full)
        case _:
            monkeypatch.setattr(PageBitmaps, "create", full)
    with ram() as block:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="Too many"):
            made(None, block)
        assert sorted(os.listdir("/proc/self/fd")) == before
