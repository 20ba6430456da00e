"""kill -9 of workers at random instants while codecs are at work: every page right afterwards.

Each run draws its instants (bytes on the wire since the kill before), sides and channels from its
seed. A kill may strike a lane that is being made anew already, or both ends of one at once.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, Final

import pytest

import engine
from tests.survival.rig import DEADLINE_S, Pair, let_end, pair

pytestmark = pytest.mark.process

GUEST: Final = "workload:size=16M"  #: mixed contents: text, pointers, noise, zeros
#: 12 runs of 5: 60 kills. What all runs together take: see `KILLS` x about 0.2 s + 12 x 2 s.
KILLS: Final = 5
BETWEEN_BYTES_MAX: Final = 3_000_000
#: The compressed rounds of a 16 MiB guest are short: slow enough that kills strike in them, and
#: written so fast that none ends with nothing dirty, which would end the migration.
BANDWIDTH: Final = 20_000_000
WRITES: Final = "rate=200M,pattern=random"

MODES: Final[dict[str, tuple[str, ...]]] = {
    "zlib": ("multifd-compression=zlib",),
    "zstd": ("multifd-compression=zstd",),
    "lz4": ("multifd-compression=lz4",),
    "auto": ("multifd-compression=auto",),
    "changing": ("multifd-compression=zstd",),
    "deltas": ("multifd-compression=lz4", "xbzrle=on", "xbzrle-cache-size=16M"),
}


async def until_sent(migration: engine.Migration, more: int) -> None:
    """Wait until so many bytes more are on the wire, in whatever round."""
    begun: int | None = None
    async with asyncio.timeout(DEADLINE_S):
        async for now in migration.progress(0.001):
            sent = now.raw.get("ram", {}).get("multifd-bytes", 0)
            begun = sent if begun is None else begun
            if now.rounds and sent - begun >= more:
                return
    raise AssertionError(f"the migration ended: {now.status} {now.error}")


async def kill_one(both: Pair, side: str, index: int) -> None:
    """Kill -9 the worker of a channel; one that is being replaced is waited for."""
    role = {"source": "multifdsend", "destination": "multifdrecv"}[side]
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        threads = await both.side(side).execute("query-migrationthreads")
        pids = {one["name"]: one["thread-id"] for one in threads}
        try:
            os.kill(pids[f"{role}_{index}"], signal.SIGKILL)
        except (KeyError, ProcessLookupError):
            await asyncio.sleep(0.005)
            continue
        return
    raise AssertionError(f"{role}_{index} never came back")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_every_page_arrives(tmp_path: Path, mode: str, seed: int) -> None:
    draw = random.Random(f"{mode} {seed}")

    async def scenario() -> tuple[dict[str, Any], engine.Verdict]:
        async with pair(tmp_path, guest=GUEST, settings=MODES[mode], writes=WRITES) as both:
            migration = await both.source.migrate(
                both.destination, max_bandwidth=BANDWIDTH, downtime_limit=0, x_heal_limit=255
            )
            for number in range(KILLS):
                await until_sent(migration, draw.randrange(BETWEEN_BYTES_MAX))
                if mode == "changing":
                    codec = ["lz4", "none", "auto", "zlib", "zstd"][number % 5]
                    await both.source.execute("migrate-set-parameters", multifd_compression=codec)
                side, index = draw.choice(["source", "destination"]), draw.randrange(2)
                await kill_one(both, side, index)
            await until_sent(migration, 500_000)
            await let_end(both.source)
            result = await migration.result()
            return dict(result.raw), await engine.verify(both.source, both.destination)

    raw, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    # Two kills may cost one incarnation; each is seen by either end.
    assert KILLS // 2 <= raw["x-heals"] <= 2 * KILLS
    batches = {name for one in raw["x-compression"]["channels"] for name in one["batches"]}
    assert batches - {"none"}, "nothing was encoded"
