"""What the world does to a migration other than killing: cuts, cancels, misfits, full disks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import engine
from engine.control.status import Status
from engine.guest.token import Kind, encode
from tests.survival.proxy import LISTEN, TARGET, Hold, Proxy, proxy
from tests.survival.rig import (
    BANDWIDTH,
    DOWNTIME_MAX_MS,
    GUEST,
    WRITING,
    Pair,
    begin,
    ended,
    gave_up,
    is_right,
    is_running,
    is_still,
    let_end,
    pair,
    reached,
)

pytestmark = pytest.mark.process

MIB = 1024 * 1024
#: How much of RAM was sent in the first round when the fault strikes; 0 is at once. The first round
#: is not the last here: see `rig.begin`.
MOMENTS = [
    pytest.param(0.0, id="setup"),
    pytest.param(0.15, id="first-round"),
    pytest.param(0.9, id="late"),
]


async def end_of(source: engine.Control, destination: engine.Control) -> Status:
    """The end of a migration, after which exactly one right guest runs."""
    statistics = await ended(source)
    if statistics.status is Status.COMPLETED:
        assert await is_still(source)
        assert await is_running(destination)
        assert await is_right(destination)
    else:
        assert await is_running(source)
        assert await is_right(source)
    return statistics.status


@pytest.mark.parametrize("part", MOMENTS)
def test_a_cancelled_migration_leaves_the_guest_and_the_next_one_succeeds(
    tmp_path: Path, part: float
) -> None:
    async def scenario() -> tuple[Status, engine.Verdict]:
        async with pair(tmp_path) as both:
            migration = await begin(both)
            await reached(migration, part)
            await migration.cancel()
            status = await end_of(both.source, both.destination)
            assert await gave_up(both.destination) or not part
            async with engine.Control.start(GUEST, "tcp:127.0.0.1:0") as second:
                await let_end(both.source)
                await (await both.source.migrate(second, max_bandwidth=0)).result()
                return status, await engine.verify(both.source, second)

    status, verdict = asyncio.run(scenario())
    assert status is Status.CANCELLED
    assert verdict.is_right


def test_a_destination_that_quits_leaves_the_guest_at_the_source(tmp_path: Path) -> None:
    async def scenario() -> Status:
        async with pair(tmp_path) as both:
            migration = await both.source.migrate(both.destination, max_bandwidth=BANDWIDTH)
            await reached(migration, 0.15)
            await both.destination.execute("quit")
            return await end_of(both.source, both.destination)

    assert asyncio.run(scenario()) is Status.FAILED


def test_a_second_migrate_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    async def scenario() -> engine.Verdict:
        async with pair(tmp_path) as both:
            migration = await begin(both)
            await reached(migration, 0.15)
            with pytest.raises(engine.UsageError, match="There's a migration process in progress"):
                await both.source.migrate("tcp:127.0.0.1:9")
            await let_end(both.source)
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


@contextlib.asynccontextmanager
async def pair_through_proxy(directory: Path) -> AsyncIterator[tuple[Pair, Proxy, int]]:
    """A pair whose connections can be cut: main, handover and two channels at four ports in a row,
    of which the first is told."""
    async with proxy(4) as (between, base), pair(directory, "defer") as both:
        await both.destination.execute("migrate-set-parameters", x_multifd_port_base=base + 1)
        await both.destination.execute("migrate-incoming", uri=f"tcp:{TARGET}:{base}")
        both.uri = f"tcp:{LISTEN}:{base}"
        yield both, between, base


#: Which ports, counted from the main channel's, and what must come of it before the switchover:
#: data channels are made anew, also while they are being set up for the first time; without the
#: main channel nobody can agree on anything, so the source keeps its guest; the handover connection
#: is needed for the token, and made anew for that.
CUTS = [
    pytest.param([2], Status.COMPLETED, id="one-channel"),
    pytest.param([2, 3], Status.COMPLETED, id="all-channels"),
    pytest.param([1], Status.COMPLETED, id="handover"),
    pytest.param([0], Status.FAILED, id="main"),
    pytest.param([0, 1, 2, 3], Status.FAILED, id="everything"),
]


@pytest.mark.parametrize("part", MOMENTS)
@pytest.mark.parametrize(("cut", "expected"), CUTS)
def test_a_cut_connection_heals_or_leaves_the_guest_at_the_source(
    tmp_path: Path, cut: list[int], expected: Status, part: float
) -> None:
    async def scenario() -> tuple[str, Status]:
        async with pair_through_proxy(tmp_path) as (both, between, base):
            ports = [base + offset for offset in cut]
            migration = await begin(both)
            await reached(migration, part)
            await between.connected(ports)
            phase = (await migration.statistics()).raw["x-phase"]
            assert between.cut(ports) == len(ports)
            await let_end(both.source)
            return phase, await end_of(both.source, both.destination)

    phase, status = asyncio.run(scenario())
    assert phase in ("connecting", "sending", "harvesting")[bool(part) :]
    if phase == "connecting" and cut == [1]:  # the guests greet once: cut in the middle, it fails
        assert status in (Status.FAILED, Status.COMPLETED)
    else:
        assert status is expected


TAKE, TAKEN = (encode(kind, b"x" * 16)[:8] for kind in (Kind.TAKE, Kind.TAKEN))
LOST = {Status.FAILED}  #: the source has kept its guest
WON = {Status.COMPLETED}
#: What is held back in the switchover, which ports are cut then, and what may come of it. The
#: right to run leaves the source with TAKE, and is at the destination when TAKEN leaves it. Who
#: finds the connection cut when it sends TAKE cannot know whether that arrived: it asks, and a
#: destination that was asked before it took never will. One that loses the main channel gives up,
#: or takes the token when that comes first.
SWITCHOVERS = [
    pytest.param((0, b"Armed"), [0], LOST, id="main-before-armed-is-heard"),
    pytest.param((0, b"Armed"), [1], LOST, id="handover-before-the-token"),
    pytest.param((0, b"Armed"), [0, 1, 2, 3], LOST, id="everything-before-the-token"),
    pytest.param((1, TAKE), [1], LOST, id="handover-with-the-token-on-its-way"),
    pytest.param((1, TAKE), [0], LOST | WON, id="main-with-the-token-on-its-way"),
    pytest.param((1, TAKEN), [1], WON, id="handover-with-the-answer-on-its-way"),
    pytest.param((1, TAKEN), [0], WON, id="main-with-the-answer-on-its-way"),
    pytest.param((1, TAKEN), [0, 1, 2, 3], WON, id="everything-with-the-answer-on-its-way"),
]


@contextlib.asynccontextmanager
async def in_the_switchover(
    directory: Path, port: int, word: bytes
) -> AsyncIterator[tuple[Pair, Proxy, int, Hold, engine.Migration]]:
    """A pair through a proxy in status `device`; the word has come to the port, and waits there."""
    async with pair_through_proxy(directory) as (both, between, base):
        hold = between.hold(base + port, word)
        migration = await begin(both)
        await let_end(both.source)
        await hold.reached.wait()
        assert (await migration.statistics()).status is Status.DEVICE
        yield both, between, base, hold, migration


@pytest.mark.parametrize(("held", "cut", "allowed"), SWITCHOVERS)
def test_a_cut_in_the_switchover_leaves_the_guest_where_the_right_to_run_is(
    tmp_path: Path, held: tuple[int, bytes], cut: list[int], allowed: set[Status]
) -> None:
    async def scenario() -> Status:
        async with in_the_switchover(tmp_path, *held) as (both, between, base, hold, _):
            connections = between.cut([base + port for port in cut])
            if held[1] == TAKEN:  # the destination has finished: only the answer is waited for
                assert connections >= cut.count(1)
            else:
                assert connections == len(cut)
            hold.released.set()
            return await end_of(both.source, both.destination)

    assert asyncio.run(scenario()) in allowed


def test_a_source_cut_off_with_the_token_on_its_way_runs_nothing_until_its_operator_says_so(
    tmp_path: Path,
) -> None:
    """The destination has given up and ended, but across a network that is no proof."""

    async def scenario() -> None:
        async with in_the_switchover(tmp_path, 1, TAKE) as (both, between, base, hold, migration):
            assert between.cut(range(base, base + 4), for_good=True) == 4
            assert await both.destination.wait() == 1
            hold.released.set()
            with pytest.raises(engine.OutcomeUnknown):
                await migration.result()
            assert await is_still(both.source)
            await both.source.execute("cont")
            assert await is_running(both.source)
            assert await is_right(both.source)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        pytest.param((0, b"Armed"), Status.CANCELLED, id="before-the-token"),
        pytest.param((1, TAKEN), Status.COMPLETED, id="with-the-answer-on-its-way"),
    ],
)
def test_a_cancel_in_the_switchover_comes_too_late_only_for_a_token_that_was_taken(
    tmp_path: Path, held: tuple[int, bytes], expected: Status
) -> None:
    async def scenario() -> Status:
        async with in_the_switchover(tmp_path, *held) as (both, _, _, hold, migration):
            await migration.cancel()
            hold.released.set()
            return await end_of(both.source, both.destination)

    assert asyncio.run(scenario()) is expected


def test_ram_that_cannot_be_made_ends_the_destination_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "nonexistent" / "dir" / "x"
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "serve", "--qmp", f"unix:{tmp_path}/qmp",
         "--guest", f"ram:size=64M,path={path}", "--incoming", "tcp:127.0.0.1:0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith("ramferry: ")
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def test_channels_that_cannot_be_made_anew_end_the_migration_at_the_limit(tmp_path: Path) -> None:
    async def scenario() -> tuple[Status, str]:
        async with pair_through_proxy(tmp_path) as (both, between, base):
            migration = await both.source.migrate(both.uri, max_bandwidth=1_000_000, x_heal_limit=3)
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
            address = await both.destination.address()
            host, port = address.removeprefix("tcp:").rsplit(":", 1)
            for size in (0, 1, 100, 5000, 3 * MIB):
                for head in (b"", struct.pack(">I", size), b"\xff" * 4):
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.write(head + os.urandom(size))
                    with contextlib.suppress(ConnectionError):
                        await writer.drain()
                    writer.close()
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
            migration = await both.source.migrate(
                both.destination, max_bandwidth=0, downtime_limit=DOWNTIME_MAX_MS
            )
            await migration.result()
            for _, writer in silent:
                writer.close()
            return await engine.verify(both.source, both.destination)

    assert asyncio.run(scenario()).is_right
