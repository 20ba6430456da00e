"""Who watches whether writes are seen, with a guest that a test plays."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.control.dirtysync import DirtySync
from engine.errors import MemoryRefused
from engine.guest.base import TrackerName


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
