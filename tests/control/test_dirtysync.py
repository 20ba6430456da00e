"""Who watches whether writes are seen, with a guest that a test plays."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.control.dirtysync import DirtySync
from engine.control.lane import HarvestTotals
from engine.errors import MemoryRefused
from engine.guest.base import TrackerName
from engine.memory.blocks import PAGE_SIZE


@pytest.mark.parametrize("is_gone", [False, True])
def test_lost_tracking_matters_as_long_as_the_guest_writes_here(is_gone: bool) -> None:
    async def untracked() -> str:
        return "process 7 has ended"

    host: Any = SimpleNamespace(guest=SimpleNamespace(untracked=untracked))
    sync = DirtySync(host, cast(Any, None), cast(Any, None), TrackerName.UFFD)
    if is_gone:
        asyncio.run(sync.watch(lambda: True))
    else:
        with pytest.raises(MemoryRefused, match="process 7 has ended"):
            asyncio.run(sync.watch(lambda: False))


@pytest.mark.parametrize(
    ("tracker", "is_peek", "counted"),
    [(TrackerName.UFFD, True, []), (TrackerName.BITMAP, False, [3])],
)
def test_a_peek_counts_what_no_later_collection_finds_again(
    tracker: TrackerName, is_peek: bool, counted: list[int]
) -> None:
    asked: list[tuple[int, bool]] = []

    class Senders:
        async def harvest(self, number: int, *, is_peek: bool = False) -> HarvestTotals:
            asked.append((number, is_peek))
            return HarvestTotals(5, 3)

    host: Any = SimpleNamespace(guest=SimpleNamespace(is_running=True))
    found: list[int] = []
    numbers: Any = SimpleNamespace(dirtied=found.append)
    sync = DirtySync(host, cast(Any, Senders()), numbers, tracker)

    assert asyncio.run(sync.peek()) == 5 * PAGE_SIZE
    assert asked == [(1, is_peek)]
    assert found == counted
