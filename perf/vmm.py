"""`ramferry bench vmm`: the same real guest migrated by its QEMU itself and by ramferry, in turn.

Both times two QEMUs of the same command lines run on this machine, and the guest is seen from the
same place: its serial port, where it shows its progress every few milliseconds.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from engine.errors import MigrationError, UsageError
from perf.codec import NONE, Codec
from perf.image import SHARED_MEMORY
from perf.pair import RUN_WAIT_S, START_WAIT_S, Side, Way, prepare, side
from perf.vmmguest import SPEED_S, Shape, Watcher, qemu_command, serve_command, watched
from perf.warm import warm_memory

ENGINES: Final = ("qemu", "ramferry")
LOOK_S: Final = 0.01
SPARE_BYTES: Final = 2 << 30
COMPARED: Final = ("total_time_ms", "wall_time_ms", "downtime_seen_ms", "downtime_told_ms")


@dataclass(frozen=True, slots=True)
class Plan:
    """:ivar codec: of both; one that QEMU lacks is ramferry's alone.
    :ivar xbzrle: of ramferry; QEMU's multifd cannot have it."""

    shape: Shape
    limit_ms: int
    channels: int = 2
    codec: Codec = NONE
    auto_converge: bool = False
    xbzrle: bool = False

    def settings(self, engine: str) -> tuple[dict[str, object], list[str]]:
        """Parameters and capabilities."""
        parameters: dict[str, object] = {
            "downtime-limit": self.limit_ms,
            **(self.codec if engine == "ramferry" or self.codec.is_qemus else NONE).parameters(),
        }
        capabilities = ["events", *(["auto-converge"] if self.auto_converge else [])]
        if engine == "ramferry" and self.xbzrle:
            parameters["xbzrle-cache-size"] = self.shape.size
            return parameters, [*capabilities, "xbzrle"]
        return parameters, [*capabilities, "multifd"]


@dataclass(frozen=True, slots=True)
class Run:
    """One migration.

    :ivar total_time_ms: as the engine itself says.
    :ivar wall_time_ms: from `migrate` to the later of both sides' `completed` events.
    :ivar downtime_seen_ms: from the guest's last mark at the source to its first one at the
        destination; it makes one in 32 MiB or a round.
    :ivar downtime_told_ms: as the engine itself says.
    :ivar speed_ratio: of the guest, during the migration to before it.
    :ivar passes: over its memory (`dirty-sync-count`)."""

    total_time_ms: float
    wall_time_ms: float
    downtime_seen_ms: float
    downtime_told_ms: float
    speed_ratio: float
    passes: float
    sent_mib: float


async def migrate_once(engine: str, plan: Plan) -> Run:
    """:raise MigrationError: the engine failed, or the guest found a page wrong."""
    with tempfile.TemporaryDirectory(prefix="ramferry-bench-", dir=SHARED_MEMORY) as base:
        async with AsyncExitStack() as stack:
            watchers, sides = [], []
            for place, incoming in ((Path(base) / "s", False), (Path(base) / "d", True)):
                watchers.append(stack.enter_context(watched(place, plan.shape)))
                line = qemu_command(plan.shape, place, place / "qmp", incoming=incoming)
                sides.append(await stack.enter_async_context(side(line, place / "qmp")))
            await _wait(lambda: watchers[0].rounds > 1, sides)
            if engine == "ramferry":
                sides = [
                    await stack.enter_async_context(_serve(Path(base) / name, incoming=incoming))
                    for name, incoming in (("s", False), ("d", True))
                ]
            return await _migrate(sides, watchers, plan, engine)


def _serve(place: Path, *, incoming: bool) -> AbstractAsyncContextManager[Side]:
    qmp = place / "serve.qmp"
    return side(serve_command(place, qmp, incoming=incoming), qmp)


async def _wait(fact: Callable[[], bool], sides: Sequence[Side]) -> None:
    deadline = time.monotonic() + START_WAIT_S
    while not fact():
        if time.monotonic() > deadline or any(one.process.returncode is not None for one in sides):
            raise MigrationError("the guest does not go on")
        await asyncio.sleep(LOOK_S)


async def _migrate(
    sides: Sequence[Side], watchers: Sequence[Watcher], plan: Plan, engine: str
) -> Run:
    source, destination = sides
    parameters, capabilities = plan.settings(engine)
    uri = await prepare(source, destination, Way(plan.channels), parameters, capabilities)
    await asyncio.sleep(SPEED_S)
    ends = [asyncio.ensure_future(one.end_of_migration()) for one in sides]
    began = time.monotonic()
    before = watchers[0].per_s(began - SPEED_S, began)
    await source.client.execute("migrate", {"uri": uri})
    statuses = await asyncio.wait_for(asyncio.gather(*ends), RUN_WAIT_S)
    ended = time.monotonic()
    if statuses != ["completed", "completed"]:
        raise MigrationError(f"a benchmark's migration ended as {statuses}")
    stopped = watchers[0].last
    told: Any = await source.client.execute("query-migrate")
    await _wait(lambda: watchers[1].rounds > 1, sides)
    return Run(
        total_time_ms=told["total-time"],
        wall_time_ms=(ended - began) * 1000,
        downtime_seen_ms=(watchers[1].first - stopped) * 1000,
        downtime_told_ms=told["downtime"],
        speed_ratio=watchers[0].per_s(began, stopped) / before,
        passes=told["ram"]["dirty-sync-count"],
        sent_mib=told["ram"]["transferred"] / 2**20,
    )


def measure(plan: Plan, pairs: int) -> tuple[dict[str, list[float]], list[str]]:
    """Both engines' figures and the pairs' ratios (above 1 ramferry needs less), and who was first
    in each pair.

    :raise MigrationError: an engine failed.
    :raise UsageError: there is not enough memory; QEMU takes all of it, at the source."""
    wanted = plan.shape.size + 2 * plan.shape.touched
    available = psutil.virtual_memory().available
    if wanted + SPARE_BYTES > available:
        raise UsageError(
            f"this needs {(wanted + SPARE_BYTES) >> 20} MiB of memory; {available >> 20} are free"
        )
    orders = [ENGINES if number % 2 == 0 else ENGINES[::-1] for number in range(pairs)]
    done: list[dict[str, Run]] = []
    with warm_memory(wanted):
        for order in orders:
            done.append({one: asyncio.run(migrate_once(one, plan)) for one in order})
    return figures_of(done), [order[0] for order in orders]


def figures_of(pairs: Sequence[dict[str, Run]]) -> dict[str, list[float]]:
    """What `publish` shows."""
    figures: dict[str, list[float]] = {}
    for field in (*COMPARED, "speed_ratio", "passes", "sent_mib"):
        for engine in ENGINES:
            figures[f"{engine}_{field}"] = [float(getattr(one[engine], field)) for one in pairs]
        if field in COMPARED:
            theirs, ours = (figures[f"{engine}_{field}"] for engine in ENGINES)
            figures[f"{field.removesuffix('_ms')}_ratio_qemu_to_ramferry"] = [
                their / max(own, 1.0) for their, own in zip(theirs, ours, strict=True)
            ]
    return figures


def shape_of(size: int, touched: int, swept: int) -> Shape:
    """:raise UsageError: no such guest can be."""
    if not 0 < swept <= touched <= size - (2 << 20):
        raise UsageError("a guest sweeps a part of what it touches, and touches a part of its RAM")
    if touched > 2 << 30:
        raise UsageError("this guest touches 2G at most")
    return Shape(size, touched, swept)
