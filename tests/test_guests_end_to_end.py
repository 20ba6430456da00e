"""Whole migrations of guests that need something special: huge pages, a throttle, channels."""

from __future__ import annotations

import asyncio
import struct
import sys
import tempfile
from pathlib import Path

import pytest

import engine
from tests.hugepages import huge_pages

__all__ = ["huge_pages"]

pytestmark = pytest.mark.process


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("tracker", ["uffd-wp", "guest-bitmap", "content-hash"])
def test_a_guest_on_huge_pages_arrives_right(tracker: str) -> None:
    guest = "workload:size=32M,hugetlb=2M"

    async def scenario() -> tuple[engine.Verdict, int]:
        source = engine.Control.start(f"{guest},rate=20M,pattern=hotspot")
        destination = engine.Control.start(guest, "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(
                destination, max_bandwidth=0, downtime_limit=30_000, x_tracker=tracker
            )  # a write dirties 2 MiB: with the usual limit a busy machine might go round for ever
            await migration.result()
            blocks = (await destination.query_guest())["blocks"]
            return await engine.verify(source, destination), blocks[0]["backing-page-size"]

    verdict, page_size = asyncio.run(scenario())
    assert verdict.is_right
    assert page_size == 2 * 1024 * 1024


@pytest.mark.usefixtures("huge_pages")
def test_a_destination_with_another_page_size_is_refused() -> None:
    async def scenario() -> str:
        source = engine.Control.start("workload:size=32M,hugetlb=2M")
        destination = engine.Control.start("workload:size=32M", "tcp:127.0.0.1:0")
        async with source, destination:
            with pytest.raises(engine.MigrationFailed) as failed:
                await (await source.migrate(destination)).result()
            return str(failed.value)

    assert "Mismatched RAM page size ram (local) 4096 != 2097152" in asyncio.run(scenario())


def test_auto_converge_brings_down_a_guest_that_writes_faster_than_the_channel() -> None:
    """10 MB/s cannot follow 50 MB/s; throttled, the guest ends inside the limit."""

    async def scenario() -> tuple[engine.Statistics, list[int], engine.Verdict]:
        source = engine.Control.start(
            "workload:size=8M,rate=50M,pattern=random,contents=random",
            settings=["max-bandwidth=10M", "downtime-limit=50", "auto-converge=on",
                      "max-cpu-throttle=20"],
        )  # fmt: skip
        destination = engine.Control.start("workload:size=8M", "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(destination)
            seen: list[int] = []
            async for progress in migration.progress(0.02):
                if progress.throttle_percent and not any(seen):  # it begins low, and has been seen
                    await source.execute("migrate-set-parameters", max_cpu_throttle=99)
                seen.append(progress.throttle_percent)
            result = await migration.result()
            return result, seen, await engine.verify(source, destination)

    result, seen, verdict = asyncio.run(scenario())
    running = [percent for percent in seen if percent]
    assert running[0] == 20
    assert running == sorted(running)
    assert running[-1] > 20
    assert max(running) <= 99
    assert verdict.is_right
    assert result.downtime_ms is not None


def test_the_throttle_is_taken_away_at_the_destination() -> None:
    """At 99 % it would write 100 pages a second, and here it writes 1000 within one."""

    async def scenario() -> int:
        source = engine.Control.start(
            "workload:size=16M,rate=40M,pattern=random",
            settings=["max-bandwidth=5M", "downtime-limit=50", "auto-converge=on",
                      "cpu-throttle-initial=99"],
        )  # fmt: skip
        destination = engine.Control.start("workload:size=16M", "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(destination)
            percents = [progress.throttle_percent async for progress in migration.progress(0.02)]
            await migration.result()
            async with asyncio.timeout(60):
                while await writes_of_a_second(destination) < 1000:
                    pass
            return max(percents)

    async def writes_of_a_second(control: engine.Control) -> int:
        before = int((await control.query_guest())["writes"])
        await asyncio.sleep(1.0)
        return int((await control.query_guest())["writes"]) - before

    assert asyncio.run(scenario()) == 99


@pytest.mark.parametrize("channels", [1, 16])
def test_any_number_of_channels_carries_every_page(channels: int) -> None:
    async def scenario() -> tuple[engine.Statistics, engine.Verdict]:
        source = engine.Control.start("workload:size=64M,rate=10M")
        destination = engine.Control.start("workload:size=64M", "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(
                destination, multifd_channels=channels, max_bandwidth=0
            )
            return await migration.result(), await engine.verify(source, destination)

    result, verdict = asyncio.run(scenario())
    assert len(result.channels) == channels
    assert verdict.is_right


#: Writes rising numbers to random places of a file until its standard input ends; says the last.
WRITER = """
import mmap, random, select, struct, sys
random.seed(1)
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
    number = 0
    while not (number % 100 == 0 and select.select([sys.stdin], [], [], 0.002)[0]):
        number += 1
        struct.pack_into("<Q", ram, random.randrange(len(ram) // 8) * 8, number)
        if number == 10_000:
            print("writes", flush=True)
print(number)
"""
#: The writer dirties most of RAM in the time of a round at this rate: none finds nothing dirty.
STRANGERS_BANDWIDTH = 20_000_000


def test_a_ram_guest_that_a_stranger_writes_arrives_byte_by_byte() -> None:
    """Nobody tells who writes to it, or when: contents are compared."""

    async def scenario(directory: Path) -> tuple[engine.Statistics, int]:
        paths = [directory / name for name in ("source", "destination")]
        source = engine.Control.start(f"ram:size=32M,path={paths[0]}")
        destination = engine.Control.start(f"ram:size=32M,path={paths[1]}", "tcp:127.0.0.1:0")
        async with source, destination:
            pipe = asyncio.subprocess.PIPE
            writer = await asyncio.create_subprocess_exec(
                sys.executable, "-c", WRITER, str(paths[0]), stdin=pipe, stdout=pipe
            )
            try:  # a limit of 0 waits until nothing is dirty: until the writer has ended
                assert writer.stdout is not None
                assert await writer.stdout.readline() == b"writes\n"
                migration = await source.migrate(
                    destination,
                    downtime_limit=0,
                    max_bandwidth=STRANGERS_BANDWIDTH,
                    x_tracker="content-hash",
                )
                async for progress in migration.progress(0.02):
                    assert progress.status not in (engine.Status.COMPLETED, engine.Status.FAILED)
                    if progress.rounds >= 4:
                        break
                said, _ = await writer.communicate(b"")
                await source.execute("migrate-set-parameters", max_bandwidth=0)
            finally:
                if writer.returncode is None:
                    writer.kill()
                    await writer.wait()
            result = await migration.result()
            contents = [path.read_bytes() for path in paths]
            assert contents[0] == contents[1]
            assert said.strip().isdigit()
            assert struct.pack("<Q", int(said)) in contents[1]
            return result, int(said)

    with tempfile.TemporaryDirectory(prefix="rf-", dir="/dev/shm") as directory:
        result, writes = asyncio.run(scenario(Path(directory)))
    assert result.tracker == "content-hash"
    assert result.rounds > 4
    assert writes > 0
