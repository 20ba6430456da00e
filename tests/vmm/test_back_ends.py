"""A QEMU whose vhost-user back end writes into its RAM all the time is migrated, or refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import pytest

import engine
from engine.errors import MigrationError
from engine.guest.foreignguest import attach_qemu
from tests.guest.support import run
from tests.support import WAIT_S, eventually
from tests.vmm.back_end import MEMORY_MIB, BackEnd, back_end, steps, writes
from tests.vmm.machines import Vm, needs_qemu, vm
from tests.vmm.postcopy_rig import needs_kernel_faults, until
from tests.vmm.test_end_to_end import (
    LIMIT_MS,
    Standing,
    agents_of,
    failure,
    is_let_go,
    is_tracked,
)

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu]


@dataclass
class Pair:
    """A QEMU whose back end writes, and its twin that waits with one of its own."""

    source: Vm
    destination: Vm
    back_end: BackEnd
    other: BackEnd

    @property
    def ram(self) -> Path:
        return self.source.rams[0]

    @property
    def named(self) -> str:
        """The source with its back end."""
        return f"{self.source.spec},vhost-user={self.back_end.pid}"

    @property
    def named_there(self) -> str:
        return f"{self.destination.spec},vhost-user={self.other.pid}"


@contextlib.contextmanager
def machine(directory: Path, *options: str) -> Iterator[tuple[Vm, BackEnd]]:
    with (
        back_end(directory / "back_end") as found,
        vm(*found.options, *options, mib=MEMORY_MIB) as qemu,
    ):
        yield qemu, found


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    for name in ("source", "destination"):
        (tmp_path / name).mkdir()
    with (
        machine(tmp_path / "source") as (source, found),
        machine(tmp_path / "destination", "-incoming", "defer") as (destination, other),
    ):
        assert eventually(lambda: source.rounds() > 2, WAIT_S)
        assert writes(source.rams[0])
        yield Pair(source, destination, found, other)


@contextlib.asynccontextmanager
async def sending(pair: Pair, more: str = "") -> AsyncIterator[Standing]:
    """A migration in its first round, which takes long.

    :param more: options of the source."""
    here = engine.Control.start(pair.named + more)
    there = engine.Control.start(pair.named_there, "tcp:127.0.0.1:0")
    async with here, there:
        slow = {"multifd_channels": 2, "max_bandwidth": 2**20, "downtime_limit": LIMIT_MS}
        migration = await here.migrate(there, **slow)
        async for progress in migration.progress(0.01):
            if progress.status is engine.Status.ACTIVE:
                break
        yield Standing(here, there, migration)
        assert await asyncio.to_thread(pair.source.goes_on)


async def migrate(source: str, destination: str) -> engine.Statistics:
    """The guest stands on its arrival."""
    here = engine.Control.start(source)
    there = engine.Control.start(destination, "tcp:127.0.0.1:0")
    async with here, there:
        await there.execute("stop")
        settings = {"multifd_channels": 2, "max_bandwidth": 0, "downtime_limit": LIMIT_MS}
        migration = await here.migrate(there, **settings)
        return await migration.result()


def test_what_a_back_end_writes_all_the_time_arrives_byte_by_byte(pair: Pair) -> None:
    before = steps(pair.ram)
    result = asyncio.run(migrate(pair.named, pair.named_there))

    assert pair.source.memory() == pair.destination.memory()
    assert steps(pair.ram) > before + 100
    assert f"process {pair.source.pid}, {pair.back_end.pid}" in result.tracker_reason
    assert is_let_go(pair.source)
    pair.destination.monitor.ask("cont")
    assert pair.destination.goes_on()
    assert writes(pair.destination.rams[0])  # its own back end, from where the other one stood


def test_a_back_end_that_nobody_has_named_is_refused(pair: Pair) -> None:
    async def scenario() -> None:
        with pytest.raises(MigrationError, match=r"other processes map .*: vhost-user=PID"):
            await attach_qemu(f"{pair.source.directory}/ramferry.qmp", incoming=False)

    run(scenario())

    assert pair.source.goes_on()
    assert writes(pair.ram)


def test_a_back_end_that_nobody_sees_mapping_anything_is_refused_unless_it_is_named(
    tmp_path: Path,
) -> None:
    """One of another user looks as this one does, that maps nothing before the guest starts."""

    async def scenario(qemu: Vm, back_end: BackEnd) -> None:
        path = f"{qemu.directory}/ramferry.qmp"
        with pytest.raises(MigrationError, match=r"\('vhost-user-blk-pci'\).*: vhost-user=PID"):
            await attach_qemu(path, incoming=False)
        guest = await attach_qemu(path, [back_end.pid], incoming=False)
        await guest.quit()

    with machine(tmp_path, "-S") as (qemu, found):
        run(scenario(qemu, found))


def test_a_back_end_that_comes_later_is_refused_when_tracking_begins(tmp_path: Path) -> None:
    async def scenario(qemu: Vm) -> None:
        guest = await attach_qemu(f"{qemu.directory}/ramferry.qmp", incoming=False)
        try:
            device = {"driver": "vhost-user-blk-pci", "chardev": "back", "num-queues": 1}
            qemu.monitor.ask("device_add", **device)
            with pytest.raises(MigrationError, match=r"\('vhost-user-blk-pci'\).*: vhost-user=PID"):
                await guest.start_tracking(None)
        finally:
            await guest.quit()

    path = tmp_path / "back_end"
    chardev = ["-chardev", f"socket,id=back,path={path}"]
    with back_end(path), vm(*chardev, mib=MEMORY_MIB) as qemu:
        run(scenario(qemu))


def test_what_is_no_back_end_is_refused(pair: Pair) -> None:
    async def scenario(pid: int, says: str) -> None:
        with pytest.raises(MigrationError, match=says):
            await attach_qemu(f"{pair.source.directory}/ramferry.qmp", [pid], incoming=False)

    run(scenario(2**22, "there is no vhost-user back end with pid 4194304"))
    run(scenario(pair.source.pid, "is no vhost-user back end, but QEMU"))


def test_a_back_end_that_ended_before_is_known_by_more_than_its_pid(pair: Pair) -> None:
    async def scenario() -> None:
        path = f"{pair.source.directory}/ramferry.qmp"
        guest = await attach_qemu(path, [pair.back_end.pid], incoming=False)
        try:
            pair.back_end.process.kill()
            pair.back_end.process.wait()
            with pytest.raises(MigrationError, match="has ended; start ramferry anew"):
                await guest.start_tracking(None)
        finally:
            await guest.quit()

    run(scenario())

    assert pair.source.goes_on()


def test_a_back_end_maps_more_than_the_file_has(pair: Pair) -> None:
    """What lies beyond its end is not tracked, so the kernel splits that mapping."""

    async def scenario(pid: int) -> str:
        guest = await attach_qemu(
            f"{pair.source.directory}/ramferry.qmp", [pair.back_end.pid, pid], incoming=False
        )
        try:
            return (await guest.start_tracking(None)).reason
        finally:
            await guest.quit()

    command = [sys.executable, "-c", MAPS_BEYOND, str(pair.ram)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            assert str(other.pid) in run(scenario(other.pid))
        finally:
            other.kill()


def test_a_back_end_that_dies_in_a_round_ends_the_migration(pair: Pair) -> None:
    async def scenario() -> str:
        async with sending(pair) as found:
            pair.back_end.process.kill()
            return await failure(found.migration)

    assert f"vhost-user back end (pid {pair.back_end.pid}) has ended" in asyncio.run(scenario())

    assert is_let_go(pair.source)


async def after(pair: Pair, number: signal.Signals) -> str:
    """Why a migration fails in whose first round the back end gets this signal, and counts on."""
    async with sending(pair) as found:
        os.kill(pair.back_end.pid, number)
        assert await asyncio.to_thread(writes, pair.ram)  # also who forks waits for nobody for long
        await found.here.execute("migrate-set-parameters", max_bandwidth=0)
        return await failure(found.migration)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        pytest.param(signal.SIGUSR1, "has forked meanwhile", id="forks"),
        pytest.param(signal.SIGUSR2, "has been mapped anew", id="maps-the-same-anew"),
        pytest.param(signal.SIGHUP, "does not map the memory any more as it did", id="maps-more"),
    ],
)
def test_a_back_end_whose_writes_are_not_all_seen_ends_the_migration(
    pair: Pair, number: signal.Signals, says: str
) -> None:
    reason = asyncio.run(after(pair, number))

    assert says in reason
    assert "migrate it once more" in reason
    assert is_let_go(pair.source)
    assert writes(pair.ram)


def test_a_back_end_that_becomes_another_program_ends_the_migration_at_once(pair: Pair) -> None:
    async def scenario() -> str:
        async with sending(pair) as found:
            os.kill(pair.back_end.pid, signal.SIGALRM)
            return await failure(found.migration)

    reason = asyncio.run(scenario())

    name = f"vhost-user back end (pid {pair.back_end.pid})"
    assert f"{name} has ended or replaced its program, and what it wrote since then" in reason
    assert "made anew" not in reason
    assert pair.back_end.process.poll() is None
    assert is_let_go(pair.source)


def test_a_back_end_that_dies_while_the_guest_stands_ends_the_migration(pair: Pair) -> None:
    async def scenario() -> str:
        settings = ["pause-before-switchover=on"]
        here = engine.Control.start(pair.named, settings=settings)
        there = engine.Control.start(pair.named_there, "tcp:127.0.0.1:0")
        async with here, there:
            migration = await here.migrate(there, max_bandwidth=0, downtime_limit=LIMIT_MS)
            await until(here, engine.Status.PRE_SWITCHOVER)
            pair.back_end.process.kill()
            reason = await failure(migration)
            assert await asyncio.to_thread(pair.source.goes_on)
            return reason

    assert f"vhost-user back end (pid {pair.back_end.pid}) has ended" in asyncio.run(scenario())


def test_back_ends_are_tracked_no_more_when_ramferry_is_killed(pair: Pair) -> None:
    async def scenario() -> None:
        async with sending(pair) as found:
            assert is_tracked(pair.back_end)
            victims = [found.here.pid, *agents_of(found.here.pid)]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            assert await asyncio.to_thread(is_let_go, pair.back_end)

    asyncio.run(scenario())

    assert is_let_go(pair.source)
    assert writes(pair.ram)


MAPS_LATER = """
import mmap, sys
print(flush=True)
input()
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0):
    print(flush=True)
    input()
"""


MAPS_BEYOND = """
import ctypes, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
print(libc.mmap(None, os.fstat(file).st_size + 2**20, 3, 1, file, 0), flush=True)
input()
"""


def test_who_is_named_may_map_nothing_yet_and_is_noticed_when_it_does(pair: Pair) -> None:
    async def scenario(other: subprocess.Popen[bytes]) -> str:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        async with sending(pair, f",vhost-user={other.pid}") as found:
            other.stdin.write(b"\n")
            other.stdin.flush()
            other.stdout.readline()
            await found.here.execute("migrate-set-parameters", max_bandwidth=0)
            return await failure(found.migration)

    command = [sys.executable, "-c", MAPS_LATER, str(pair.ram)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as other:
        reason = asyncio.run(scenario(other))
        other.kill()

    assert f"vhost-user back end (pid {other.pid}) does not map the memory any more" in reason


@needs_kernel_faults
def test_postcopy_is_refused_where_a_back_end_would_not_wait(pair: Pair) -> None:
    async def scenario(options: Sequence[int]) -> None:
        path = f"{pair.destination.directory}/ramferry.qmp"
        guest = await attach_qemu(path, options, incoming=True)
        try:
            with pytest.raises(MigrationError, match=r"vhost-user-blk-pci.* no postcopy"):
                await guest.open_missing()
        finally:
            await guest.quit()

    run(scenario([pair.other.pid]))
    run(scenario([]))  # whether it is named or not
