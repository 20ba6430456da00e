"""What a missing page costs the guest that touches it, with and without background."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any, Final

from engine import _native
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE
from engine.postcopy.statistics import FaultCount
from perf.background import pushing
from perf.postcopy_rig import Rig, memory, rig
from perf.toucher import Touches

PIECE: Final = 16 * 1024 * 1024
STARTED_PAGES: Final = 2048  #: received by the background before the first touch
STRIDES: Final = {"random": 0, "sweep": 1}


@contextlib.contextmanager
def _filled(size: int) -> Any:
    fd = memory(size)
    try:
        content = os.urandom(PIECE)
        for offset in range(0, size, PIECE):
            os.pwrite(fd, content[: size - offset], offset)
        yield fd
    finally:
        os.close(fd)


async def once(
    size: int, touches: int, *, background: int, channels: int, prefetch: int, pattern: str
) -> tuple[dict[str, float], list[int]]:
    """One toucher on `size` bytes that nobody pushes, while `background` more are pushed.

    :return: the figures, and the touches in power-of-two buckets of microseconds."""
    with _filled(size + background) as fd:
        async with rig(fd, prefetch_pages_max=prefetch) as made:
            _native.bitmap_set_range(made.dirty[0], 0, size // PAGE_SIZE)
            await made.start()
            async with contextlib.AsyncExitStack() as stack:
                if background:
                    pushed_since_ns = await _push(made, stack, size, background, channels)
                stride = STRIDES[pattern]
                answer = await made.toucher.ask(
                    Touches(count=min(touches, size // PAGE_SIZE), stride=stride)
                )
                figures = _figures(made, answer)
                if background:
                    took_s = (time.monotonic_ns() - pushed_since_ns) / 1e9
                    pushed_mib = _pushed(made, size) * PAGE_SIZE / 2**20
                    figures["background_mib_per_s"] = pushed_mib / took_s
            if answer["wrong"]:
                raise AssertionError(f"wrong pages: {answer['wrong']}")
            return figures, answer["took_ns"]["buckets"]


async def _push(
    made: Rig, stack: contextlib.AsyncExitStack, size: int, background: int, channels: int
) -> int:
    """Start the background, and see it run.

    :return: the time in ns of its first page, from which its throughput is counted: the touches
        alone may be over before it places another."""
    dirty = PageBitmaps.create("pushed", [made.block])
    stack.callback(dirty.close)
    _native.bitmap_set_range(dirty[0], size // PAGE_SIZE, background // PAGE_SIZE)
    await stack.enter_async_context(pushing(made, channels, dirty))
    await made.until(lambda: _pushed(made, size) > 0)
    since_ns = time.monotonic_ns()
    await made.until(lambda: _pushed(made, size) >= STARTED_PAGES)
    return since_ns


def _pushed(made: Rig, size: int) -> int:
    """Pages that the background has placed."""
    touched = (size // PAGE_SIZE, 64, 0, 1)
    return made.received.count() - _native.bitmap_count(made.received[0], touched)


def _figures(made: Rig, answer: dict[str, Any]) -> dict[str, float]:
    took, counts = answer["took_ns"], made.fault_statistics
    return {
        "touch_p50_us": took["p50"] / 1e3,
        "touch_p99_us": took["p99"] / 1e3,
        "touch_max_us": took["max"] / 1e3,
        "touches_per_s": answer["touched"] / max(1e-9, took["sum"] / 1e9),
        "service_mean_us": counts.latency_mean_ns / 1e3,
        "service_slow_share": sum(counts.latency_distribution[9:]) / counts[FaultCount.WAITS],
        "faults_per_touch": counts[FaultCount.WAITS] / answer["touched"],
        "load_1m": os.getloadavg()[0],
    }


def measure(
    size: int, touches: int, runs: int, backgrounds: Sequence[int], **options: Any
) -> dict[int, tuple[dict[str, list[float]], list[int]]]:
    """Runs of each background in turn: figures of each, and all its touches in buckets."""
    results: dict[int, tuple[dict[str, list[float]], list[int]]] = {
        background: ({}, [0] * 24) for background in backgrounds
    }
    for _ in range(runs):
        for background in backgrounds:
            figures, buckets = asyncio.run(once(size, touches, background=background, **options))
            kept, all_buckets = results[background]
            for name, value in figures.items():
                kept.setdefault(name, []).append(value)
            all_buckets[:] = map(sum, zip(all_buckets, buckets, strict=True))
    return results


def histogram(buckets: Sequence[int]) -> str:
    """The buckets that are not empty, for people."""
    return "  ".join(f"{2**i}-{2 ** (i + 1)} us: {n}" for i, n in enumerate(buckets) if n)
