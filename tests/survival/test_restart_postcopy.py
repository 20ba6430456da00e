"""kill -9 of a control process in postcopy, and the next one on the same state directory: what it
finds and keeps. The guests are real, their former control processes and the peers are stubs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import engine
from engine.control.journal import Began, Journal, start_time
from engine.control.notifiers import Change, Moment, Side
from engine.control.status import Status
from engine.errors import UsageError
from engine.guest.base import Handover
from engine.guest.token import Kind
from tests.guest.support import (
    SECOND_NS,
    SESSION,
    Stub,
    ended_within,
    peer,
    socket_of,
    stub,
    workload,
    writes_reach,
)
from tests.kernel import has_userfaultfd
from tests.survival.test_restart import killed

pytestmark = pytest.mark.process

needs_uffd = pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")
NO_JOURNAL = "no journal says of which migration"


@pytest.fixture
def rundir() -> Path:
    path = Path(os.environ["XDG_RUNTIME_DIR"]) / "guest"
    path.mkdir(mode=0o700)
    return path


@contextlib.asynccontextmanager
async def arrived(rundir: Path) -> AsyncIterator[Stub]:
    """A guest that has taken over, and lacks every page."""
    with stub(f"workload:size=1M,fill=off,rundir={rundir}", incoming=True) as control:
        async with workload("size=1M,rate=1M") as source:
            await writes_reach(source, 10)
            await source.pause(for_migration=True)
            endpoint = control.do(do="listen", uri="tcp:127.0.0.1:0")
            await source.connect_handover(endpoint, SESSION)
            control.do(do="load", state=(await source.save_state()).hex())
            control.do(do="open_missing")
            control.do(do="arm", session=SESSION.hex(), run=True)
            outcome = await source.hand_over(20 * SECOND_NS, keeps_ram=True)
            assert outcome is Handover.TAKEN
        yield control


@contextlib.contextmanager
def given_away(rundir: Path) -> Iterator[Stub]:
    """A guest that was handed over, and keeps its RAM."""
    answers: dict[Kind, Kind | None] = {Kind.HELLO: Kind.WAITING, Kind.TAKE: Kind.TAKEN}
    with (
        stub(f"workload:size=1M,rundir={rundir}") as control,
        peer(answers, threading.Event()) as endpoint,
    ):
        control.do(do="connect", endpoint=endpoint, session=SESSION.hex())
        control.do(do="pause", for_migration=True)
        assert control.do(do="hand_over", wait_ns=20 * SECOND_NS, keeps_ram=True) == "taken"
        yield control


def journal_of(control: Stub, directory: Path, rundir: Path, side: Side) -> Journal:
    """As its control process has begun it."""
    pid, incoming = control.guest_pid, side is Side.DESTINATION
    journal = Journal(str(directory))
    journal.begin(Began(1234, "workload", pid, start_time(pid), str(rundir), incoming))
    return journal


@needs_uffd
@pytest.mark.parametrize("is_known", [False, True])
def test_a_destination_goes_on_as_paused_in_each_life(
    tmp_path: Path, rundir: Path, is_known: bool
) -> None:
    async def scenario() -> None:
        async with arrived(rundir) as control:
            journal = journal_of(control, tmp_path, rundir, Side.DESTINATION)
            journal.promised(Side.DESTINATION, SESSION)
            if is_known:
                journal.postcopy(Side.DESTINATION, SESSION)
            journal.close(in_order=False)
            control.kill()
            spec = f"workload:size=1M,fill=off,rundir={rundir}"
            async with contextlib.AsyncExitStack() as lives:
                for _ in range(2):
                    one = await lives.enter_async_context(
                        engine.Control.start(spec, "tcp:127.0.0.1:0", state_dir=tmp_path)
                    )
                    assert (await one.query_guest())["pid"] == control.guest_pid
                    assert "its guest lives and is taken over" in one.stderr
                    assert "postcopy is paused: resume it with 'migrate-recover' here" in one.stderr
                    await killed(one)
                async with engine.Control.start(spec, "tcp:127.0.0.1:0", state_dir=tmp_path):
                    pass
                assert ended_within(control.guest_pid)

    asyncio.run(scenario())


def test_a_source_goes_on_as_paused_in_each_life(tmp_path: Path, rundir: Path) -> None:
    async def scenario(control: Stub) -> None:
        async with contextlib.AsyncExitStack() as lives:
            for _ in range(2):
                one = await lives.enter_async_context(
                    engine.Control.start(f"workload:size=1M,rundir={rundir}", state_dir=tmp_path)
                )
                assert "its guest lives and is taken over" in one.stderr
                assert (await one.query_guest())["pid"] == control.guest_pid
                assert "resume it with 'migrate-recover' at the destination" in one.stderr
                assert (await one.execute("query-status"))["status"] == "postmigrate"
                with pytest.raises(UsageError, match="at the destination"):
                    await one.execute("cont")
                assert (await one.judge())["wrong-pages"] == 0
                await killed(one)

    with given_away(rundir) as control:
        journal = journal_of(control, tmp_path, rundir, Side.SOURCE)
        journal.moved(Change(Side.SOURCE, Status.ACTIVE, Status.DEVICE, Moment.BEFORE))
        journal.promised(Side.SOURCE, SESSION)
        journal.close(in_order=False)
        control.kill()
        asyncio.run(scenario(control))


def test_a_source_whose_postcopy_is_complete_is_not_kept(tmp_path: Path, rundir: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(UsageError, match="its guest runs at the destination"):
            async with engine.Control.start(
                f"workload:size=1M,rundir={rundir}", state_dir=tmp_path
            ):
                pytest.fail("it started")

    with given_away(rundir) as control:
        journal = journal_of(control, tmp_path, rundir, Side.SOURCE)
        journal.moved(_completed(Side.SOURCE))
        journal.close(in_order=False)
        control.kill()
        asyncio.run(scenario())
        assert ended_within(control.guest_pid)


@needs_uffd
def test_a_guest_that_lacks_pages_of_nobody_knows_which_migration_is_named(rundir: Path) -> None:
    async def scenario() -> str:
        async with arrived(rundir) as control:
            control.kill()
            async with engine.Control.start(f"workload:socket={socket_of(control)}") as one:
                return one.stderr

    said = asyncio.run(scenario())
    assert NO_JOURNAL in said
    assert "postcopy is paused" not in said


def test_memory_that_is_kept_for_nobody_knows_which_migration_is_named(rundir: Path) -> None:
    async def scenario(path: str) -> str:
        async with engine.Control.start(f"workload:socket={path}") as one:
            return one.stderr

    with given_away(rundir) as control:
        control.kill()
        assert NO_JOURNAL in asyncio.run(scenario(socket_of(control)))


@needs_uffd
def test_a_guest_that_has_every_page_does_not_wait_any_more(tmp_path: Path, rundir: Path) -> None:
    """Killed between `completed` and the end of its userfaultfd: what is a hole is zero."""

    async def scenario() -> None:
        async with arrived(rundir) as control:
            journal = journal_of(control, tmp_path, rundir, Side.DESTINATION)
            journal.moved(_completed(Side.DESTINATION))
            journal.close(in_order=False)
            control.kill()
            async with engine.Control.start(
                f"workload:size=1M,rundir={rundir}", "tcp:127.0.0.1:0", state_dir=tmp_path
            ) as one:
                assert "postcopy" not in one.stderr
                assert NO_JOURNAL not in one.stderr
                before = (await one.query_guest())["writes"]
                async with asyncio.timeout(20):
                    while (await one.query_guest())["writes"] <= before:
                        await asyncio.sleep(0.01)

    asyncio.run(scenario())


def _completed(side: Side) -> Change:
    return Change(side, Status.POSTCOPY_ACTIVE, Status.COMPLETED, Moment.BEFORE)
