"""Waiting in the event loop for a descriptor that is nobody's transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def until_readable(fd: int) -> None:
    """Wait until a read does not block: bytes, the end, or (a pidfd) the death of its process."""
    loop = asyncio.get_running_loop()
    await _until(lambda wake: loop.add_reader(fd, wake), lambda: loop.remove_reader(fd))


async def until_writable(fd: int) -> None:
    """Wait until a write does not block, or fails."""
    loop = asyncio.get_running_loop()
    await _until(lambda wake: loop.add_writer(fd, wake), lambda: loop.remove_writer(fd))


async def _until(begin: Callable[[Callable[[], None]], Any], end: Callable[[], Any]) -> None:
    woken = asyncio.Event()
    begin(woken.set)
    try:
        await woken.wait()
    finally:
        end()
