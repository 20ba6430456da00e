"""What the world does to a migration other than killing: cuts, cancels, misfits, full disks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

import engine
from engine.control.status import Status
from tests.survival.proxy import free_ports, proxy
from tests.survival.rig import BANDWIDTH, GUEST, WRITING, ended, is_right, is_running, pair

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

MIB = 1024 * 1024
#: How much of the 48 MiB is still to be sent when the fault strikes, or 0 for at once.
MOMENTS = [pytest.param(0, id="setup"), pytest.param(40 * MIB, id="first-round"),
           pytest.param(5 * MIB, id="late")]  # fmt: skip


async def reached(migration: engine.Migration, remaining_bytes: int) -> None:
    """Wait until the migration has come so far, or has ended."""
    if not remaining_bytes:
        return
    async for progress in migration.progress(0.01):
        if progress.total_bytes and progress.remaining_bytes <= remaining_bytes:
            return


async def end_of(source: engine.Control, destination: engine.Control) -> Status:
    """The end of a migration, after which exactly one right guest runs."""
    statistics = await ended(source)
    if statistics.status is Status.COMPLETED:
        assert not await is_running(source)
        assert await is_running(destination)
        assert await is_right(destination)
    else:
        assert await is_running(source)
        assert await is_right(source)
    return statistics.status


@pytest.mark.parametrize("remaining_bytes", MOMENTS)
def test_a_cancelled_migration_leaves_the_guest_and_the_next_one_succeeds(
    tmp_path: Path, remaining_bytes: int
) -> None:
    async def scenario() -> tuple[Status, engine.Verdict]:
        async with pair(tmp_path) as both:
            migration = await both.source.migrate(both.destination, max_bandwidth=BANDWIDTH)
            await reached(migration, remaining_bytes)
            await migration.cancel()
            status = await end_of(both.source, both.destination)
            if status is Status.COMPLETED:
                return status, await engine.verify(both.source, both.destination)
            assert await both.destination.wait() == 1
            async with engine.Control.start(GUEST, "tcp:127.0.0.1:0") as second:
                await (await both.source.migrate(second, max_bandwidth=0)).result()
                return status, await engine.verify(both.source, second)

    status, verdict = asyncio.run(scenario())
    assert status in (Status.CANCELLED, Status.COMPLETED)
    assert verdict.is_right


def test_a_destination_that_quits_leaves_the_guest_at_the_source(tmp_path: Path) -> None:
    async def scenario() -> Status:
        async with pair(tmp_path) as both:
            migration = await both.source.migrate(both.destination, max_bandwidth=BANDWIDTH)
            await reached(migration, 40 * MIB)
            await both.destination.execute("quit")
            return await end_of(both.source, both.destination)

    assert asyncio.run(scenario()) is Status.FAILED


def test_a_second_migrate_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    async def scenario() -> engine.Verdict:
        async with pair(tmp_path) as both:
            migration = await both.source.migrate(both.destination, max_bandwidth=BANDWIDTH)
            await reached(migration, 40 * MIB)
            with pytest.raises(engine.UsageError, match="There's a migration process in progress"):
                await both.source.migrate("tcp:127.0.0.1:9")
            await migration.result()
            return await engine.verify(both.source, both.destination)

    assert asyncio.run(scenario()).is_right


@pytest.mark.parametrize(
    ("guest", "says"),
    [
        pytest.param("workload:size=16M", "Size mismatch: ram: 0x3000000 != 0x1000000", id="size"),
        pytest.param("ram:size=48M", "guest kind 'workload' and local is 'ram'", id="kind"),
    ],
)
def test_a_destination_that_does_not_fit_says_what_differs_and_waits_on(
    guest: str, says: str
) -> None:
    async def scenario() -> str:
        source = engine.Control.start(WRITING)
        destination = engine.Control.start(guest, "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(destination)
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            assert await is_running(source)
            assert await destination.address()
            return str(failed.value)

    assert says in asyncio.run(scenario())


CUTS = [
    pytest.param("one channel", Status.COMPLETED, id="one-channel"),
    pytest.param("all channels", Status.COMPLETED, id="all-channels"),
    pytest.param("main", Status.FAILED, id="main"),
    pytest.param("everything", Status.FAILED, id="everything"),
]


@pytest.mark.parametrize("remaining_bytes", MOMENTS)
@pytest.mark.parametrize(("what", "expected"), CUTS)
def test_a_cut_connection_heals_or_leaves_the_guest_at_the_source(
    tmp_path: Path, what: str, expected: Status, remaining_bytes: int
) -> None:
    async def scenario() -> Status:
        base = free_ports(4)
        main, handover, *channels = range(base, base + 4)
        cuts = {
            "one channel": channels[:1],
            "all channels": channels,
            "main": [main],
            "everything": [main, handover, *channels],
        }
        async with proxy(range(base, base + 4)) as between, pair(
            tmp_path, "defer"
        ) as both:  # fmt: skip
            await both.destination.execute("migrate-set-parameters", x_multifd_port_base=handover)
            await both.destination.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{main}")
            migration = await both.source.migrate(f"tcp:127.0.0.2:{main}", max_bandwidth=BANDWIDTH)
            await reached(migration, remaining_bytes)
            between.cut(cuts[what])
            return await end_of(both.source, both.destination)

    status = asyncio.run(scenario())
    if remaining_bytes == 40 * MIB:
        assert status is expected
    assert status in (Status.COMPLETED, Status.FAILED)


def test_channels_that_cannot_be_made_anew_end_the_migration_at_the_limit(tmp_path: Path) -> None:
    async def scenario() -> tuple[Status, str]:
        base = free_ports(4)
        async with proxy(range(base, base + 4)) as between, pair(
            tmp_path, "defer"
        ) as both:  # fmt: skip
            await both.destination.execute("migrate-set-parameters", x_multifd_port_base=base + 1)
            await both.destination.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{base}")
            migration = await both.source.migrate(
                f"tcp:127.0.0.2:{base}", max_bandwidth=1_000_000, x_heal_limit=3
            )
            async for progress in migration.progress(0.05):
                if progress.total_bytes:
                    between.cut([base + 2])
            statistics = await migration.statistics()
            assert await is_running(both.source)
            return statistics.status, str(statistics.error)

    status, error = asyncio.run(scenario())
    assert status is Status.FAILED
    assert "made anew 3 times already" in error


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root; CI runs this as root")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_at_the_destination_leaves_the_guest_at_the_source(
    small_tmpfs: Path,
) -> None:
    async def scenario() -> tuple[str, str]:
        source = engine.Control.start(WRITING)
        destination = engine.Control.start(f"{GUEST},path={small_tmpfs}/ram", "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(destination, max_bandwidth=BANDWIDTH)
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            assert await is_running(source)
            assert await is_right(source)
            assert await destination.wait() == 1
            return str(failed.value), destination.stderr

    error, stderr = asyncio.run(scenario())
    assert "cannot place pages in RAM block 'ram'" in error
    assert "Traceback" not in stderr
    assert list(small_tmpfs.iterdir()) == []


def test_strangers_do_not_disturb_a_waiting_destination(tmp_path: Path) -> None:
    async def scenario() -> engine.Verdict:
        async with pair(tmp_path) as both:
            endpoint = (await both.destination.address()).replace("tcp:", "tcp://", 1)
            context = zmq.asyncio.Context()
            try:
                stranger = context.socket(zmq.DEALER)
                stranger.connect(endpoint)
                for size in (0, 1, 100, 5000):
                    await stranger.send(os.urandom(size))
                    await stranger.send_multipart([b"x", os.urandom(size)])
                await stranger.send(bytes(3 * MIB))
                host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(os.urandom(10_000))
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                writer.close()
                await (await both.source.migrate(both.destination, max_bandwidth=0)).result()
                return await engine.verify(both.source, both.destination)
            finally:
                context.destroy(linger=0)

    assert asyncio.run(scenario()).is_right
