"""A process that forks while its memory moves: a child's writes are never lost without a word."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import engine
from engine import _native
from engine.errors import MemoryRefused
from engine.guest.foreignguest import attach_process
from engine.guest.process_machine import ProcessMachine
from tests.guest.support import run
from tests.support import eventually
from tests.vmm.test_attaching import mapped
from tests.vmm.test_end_to_end import LIMIT_MS, failure
from tests.vmm.test_process import STEPPER, Stepper, directory

pytestmark = pytest.mark.process
__all__ = ["directory"]

#: Writes to the last page in a child of its own, which has ended before it is told: SIGUSR1.
FORKS: Final = """
import os, signal
def fork(*_):
    child = os.fork()
    if not child:
        if %r:
            memory[-8:] = b"children"
        os._exit(0)
    os.waitpid(child, 0)
    os.close(os.open(sys.argv[1] + ".forked", os.O_WRONLY | os.O_CREAT))
signal.signal(signal.SIGUSR1, fork)
"""
SHARING: Final = FORKS % True + STEPPER.replace("memory.madvise(mmap.MADV_DONTFORK)", "pass")
ALONE: Final = FORKS % False + STEPPER


@pytest.fixture
def source(directory: Path) -> Iterator[Stepper]:
    """It shares its memory with its children."""
    yield from _started(directory, SHARING)


@pytest.fixture
def alone(directory: Path) -> Iterator[Stepper]:
    """It does not."""
    yield from _started(directory, ALONE)


def _started(directory: Path, program: str) -> Iterator[Stepper]:
    stepper = Stepper(directory / "source", program)
    try:
        stepper.begin()
        assert stepper.goes_on()
        yield stepper
    finally:
        stepper.close()


@pytest.fixture
def destination(directory: Path) -> Iterator[Stepper]:
    stepper = Stepper(directory / "destination")
    yield stepper
    stepper.close()


async def fork(stepper: Stepper) -> None:
    """It has a child that has ended: it did not wait for anybody for long."""
    os.kill(stepper.process.pid, signal.SIGUSR1)
    forked = Path(f"{stepper.path}.forked")
    assert await asyncio.to_thread(eventually, forked.exists, 10)


async def migrate_forking(source: Stepper, destination: Stepper) -> None:
    """A migration in whose first round the source forks."""
    here = engine.Control.start(source.spec)
    there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
    async with here, there:
        migration = await here.migrate(there, max_bandwidth=2**20, downtime_limit=LIMIT_MS)
        async for progress in migration.progress(0.01):
            if progress.status is engine.Status.ACTIVE:
                break
        await fork(source)
        await here.execute("migrate-set-parameters", max_bandwidth=0)
        await migration.result()


def test_a_fork_ends_the_migration_and_the_source_runs(
    source: Stepper, destination: Stepper
) -> None:
    with pytest.raises(engine.MigrationFailed, match="has forked meanwhile"):
        asyncio.run(migrate_forking(source, destination))

    assert source.path.read_bytes().endswith(b"children")
    assert source.goes_on()
    assert destination.stands()


def test_a_fork_without_the_memory_is_nothing(alone: Stepper, destination: Stepper) -> None:
    asyncio.run(migrate_forking(alone, destination))

    assert alone.stands()
    assert eventually(lambda: not destination.stands())


def test_a_fork_of_a_process_that_nobody_tracks_any_more_waits_for_nobody(source: Stepper) -> None:
    async def scenario() -> None:
        path = str(source.path)
        guest = await attach_process(source.process.pid, path, incoming=False)
        try:
            await guest.start_tracking(None)
            await guest.stop_tracking()
            await fork(source)
            await guest.start_tracking(None)  # the child has gone, and what it wrote is sent
        finally:
            await guest.quit()

    run(scenario())


def test_who_maps_the_memory_in_mid_migration_is_noticed(
    directory: Path, destination: Stepper
) -> None:
    async def scenario(source: Stepper) -> None:
        here = engine.Control.start(source.spec)
        there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
        async with here, there:
            migration = await here.migrate(there, max_bandwidth=2**20, downtime_limit=LIMIT_MS)
            async for progress in migration.progress(0.01):
                if progress.status is engine.Status.ACTIVE:
                    break
            with mapped(source.path):
                await here.execute("migrate-set-parameters", max_bandwidth=0)
                assert "other processes map" in await failure(migration)

    for source in _started(directory, STEPPER):
        asyncio.run(scenario(source))
        assert source.goes_on()


def negotiate_as_a_user(uffd: int, features: int) -> None:
    if features & _native.UFFD_FEATURE_EVENT_FORK:
        raise PermissionError(errno.EPERM, "Operation not permitted")
    NEGOTIATE(uffd, features)


NEGOTIATE: Final = _native.uffd_negotiate


def track(stepper: Stepper) -> None:
    machine = ProcessMachine(stepper.process.pid, str(stepper.path), incoming=False)
    try:
        machine.start_tracking(None)
    finally:
        machine.close()


def test_who_may_not_see_forks_is_refused_unless_they_do_not_matter(
    source: Stepper, destination: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "uffd_negotiate", negotiate_as_a_user)
    with pytest.raises(MemoryRefused, match="CAP_SYS_PTRACE, or have the process call madvise"):
        track(source)
    track(destination)

    assert source.goes_on()


def test_missing_pages_are_not_opened_where_a_child_would_make_them_zero(
    source: Stepper,
) -> None:
    async def scenario() -> None:
        path = str(source.path)
        guest = await attach_process(source.process.pid, path, incoming=True)
        try:
            with pytest.raises(MemoryRefused, match="would make missing pages zero"):
                await guest.open_missing()
        finally:
            await guest.quit()

    run(scenario())
