"""Waiting in the event loop: for a descriptor that is nobody's transport, for one of several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
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


async def first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of them is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
