"""How a stream ends at its edges: programs that leave bytes behind, files that were there before,
pipes with a name, and a migration right behind another."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import engine
from engine import wire
from engine.control.framestream import USER_TIMEOUT_MS
from engine.control.machine import Phase
from engine.control.outgoing import OutgoingMigration
from engine.control.process import ControlProcess
from engine.control.status import Status
from engine.control.streams.child import Child
from engine.control.streams.opening import Sources, Stream
from engine.control.streams.source import StreamRoute
from engine.control.uri import FileAddress, parse_uri
from engine.errors import GuestError, MigrationError, UsageError
from engine.guest.base import Handover
from engine.guest.spec import open_guest, parse_guest_spec
from tests.control.streams.rig import (
    SLOW,
    WRITING,
    check_arrived,
    couple,
    runs,
    until,
    until_status,
)

pytestmark = pytest.mark.process

SMALL = "ram:size=256K"  #: its whole stream fits into a pipe


@contextlib.asynccontextmanager
async def process_here() -> AsyncIterator[ControlProcess]:
    guest = await open_guest(parse_guest_spec(SMALL), incoming=False)
    process = ControlProcess(guest, incoming=False)
    try:
        yield process
    finally:
        await process.close()


async def begin(process: ControlProcess, uri: str) -> OutgoingMigration:
    await process.migrate(parse_uri(uri), False)
    assert process.outgoing is not None
    return process.outgoing


async def soon(fact: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return fact()

    await until(holds)


# -- programs ------------------------------------------------------------------------------------


def test_a_program_that_leaves_the_end_unread_does_not_have_the_guest(tmp_path: Path) -> None:
    """It ends with 0 while `Take` is still in the pipe: nobody else can run, so the guest does."""
    go = tmp_path / "go"

    async def scenario() -> None:
        async with process_here() as process:
            migration = await begin(process, f"exec:while [ ! -e {go} ]; do sleep 0.05; done")
            await soon(lambda: migration.machine.phase is Phase.HANDING_OVER)
            go.touch()
            await asyncio.wait_for(migration.ended.wait(), 60)
            assert migration.status is Status.FAILED
            assert "of the stream unread" in str(migration.machine.error)
            assert process.guest.is_running
            assert not process.is_outcome_unknown

    asyncio.run(scenario())


def test_what_a_program_leaves_to_carry_the_stream_is_let_be(tmp_path: Path) -> None:
    """A shell does not wait for what it put into the background; that may have the only copy."""
    file, go = tmp_path / "f", tmp_path / "go"
    carry = f"(while [ ! -e {go} ]; do sleep 0.05; done; cat {file}.part >{file}.new"

    async def scenario() -> None:
        async with process_here() as process:
            command = f"cat >{file}.part; {carry}; mv {file}.new {file}) &"
            migration = await begin(process, f"exec:{command}")
            await asyncio.wait_for(migration.ended.wait(), 60)
            assert migration.status is Status.COMPLETED
            go.touch()
            await soon(file.exists)

    asyncio.run(scenario())


def test_a_program_that_ended_keeps_its_number_until_its_group_is_killed() -> None:
    """Else the kill could meet somebody else's group."""

    async def scenario() -> None:
        child = Child(["/bin/sh", "-c", "exit 7"], subprocess.DEVNULL, subprocess.DEVNULL)
        assert await asyncio.wait_for(child.wait(), 60) == 7
        (zombie,) = psutil.Process().children()
        assert zombie.status() == psutil.STATUS_ZOMBIE
        await child.kill()
        await child.kill()
        assert not psutil.pid_exists(zombie.pid)

        killed = Child(["/bin/sh", "-c", "kill -9 $$"], subprocess.DEVNULL, subprocess.DEVNULL)
        assert await asyncio.wait_for(killed.wait(), 60) == -9
        await killed.end(1.0)
        assert psutil.Process().children() == []

    asyncio.run(scenario())


# -- files and pipes with a name -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["appended", "in-the-middle"])
def test_what_a_client_has_in_its_file_outlives_a_cancelled_migration(
    how: str, tmp_path: Path
) -> None:
    """`fd:` does not know where the client's file was to end."""
    file = tmp_path / "f"
    before = b"A" * 4096 + b"B" * (64 << 20)

    async def scenario() -> None:
        file.write_bytes(before)
        async with engine.Control.start(WRITING) as source:
            with file.open("ab" if how == "appended" else "r+b") as stream:
                stream.seek(4096)
                await source.give("way", stream.fileno())
            migration = await source.migrate("fd:way", max_bandwidth=SLOW)
            await until_status(source, "active")
            await migration.cancel()
            await until_status(source, "cancelled")
            await runs(source)

    asyncio.run(scenario())
    kept = len(before) if how == "appended" else 4096
    assert file.read_bytes()[:kept] == before[:kept]
    assert file.stat().st_size >= len(before)
    assert file.read_bytes()[48 << 20 : len(before)] == before[48 << 20 :]


def test_a_named_pipe_without_a_reader_does_not_stop_control(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def scenario() -> None:
        async with asyncio.timeout(60), engine.Control.start(SMALL) as source:
            try:
                with pytest.raises(MigrationError, match=r"Could not create '.*': No such device"):
                    await source.migrate(f"file:{fifo}")
                assert (await source.query_guest())["running"]
            except TimeoutError:
                source.kill()
                raise

    asyncio.run(scenario())


def test_a_destination_waits_for_the_writer_of_a_named_pipe(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def scenario() -> None:
        async with couple("pipe", tmp_path) as both:
            both.incoming = f"file:{fifo}"
            async with asyncio.timeout(60):
                try:
                    await both.listen()
                    await both.destination.execute("query-status")
                except TimeoutError:
                    both.destination.kill()
                    raise
            await (await both.source.migrate(f"exec:cat >{fifo}")).result()
            await check_arrived(both)

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["file", "fifo"])
def test_a_descriptor_that_stands_for_a_path_only_is_refused_in_words(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "p"
    os.mkfifo(path) if kind == "fifo" else path.touch()

    async def scenario() -> None:
        async with engine.Control.start(SMALL, "defer") as destination:
            fd = os.open(path, os.O_PATH)
            await destination.give("way", fd)
            os.close(fd)
            with pytest.raises(UsageError, match="'way' is not open for reading"):
                await destination.execute("migrate-incoming", uri="fd:way")

    asyncio.run(scenario())


def test_a_file_is_closed_when_nobody_writes_to_it_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cancelled write goes on in its thread, and may not meet a descriptor of somebody else's."""
    may_write = threading.Event()
    real_write, written = os.write, []

    def slow_write(fd: int, data: Any) -> int:
        may_write.wait(60)
        written.append(os.readlink(f"/proc/self/fd/{fd}"))
        return real_write(fd, data)

    async def scenario() -> None:
        file = tmp_path / "f"
        route = StreamRoute(FileAddress(str(file)), Sources(), answers=False)
        route.open()
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", slow_write)
            assert route._writer is not None
            sending = asyncio.create_task(route._writer.send(wire.Take()))
            await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            closing = asyncio.create_task(route.close())
            await asyncio.wait({closing}, timeout=0.2)
            may_write.set()
            await asyncio.wait_for(closing, 60)
            await soon(lambda: bool(written))
        assert written == [str(file)]
        assert file.read_bytes() == b""

    asyncio.run(scenario())


# -- the guest, and the next migration -----------------------------------------------------------


class Mute:
    """A guest that does not answer when it shall give its right up, nor afterwards."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    async def give_away(self) -> None:
        raise GuestError("no answer")

    async def settle(self, *, taken: bool) -> None:
        self.told.append(taken)
        raise GuestError("no answer, again")


def test_a_guest_that_gives_nothing_up_has_lost_nothing(tmp_path: Path) -> None:
    """`Take` was never written, so it is known who has the right to run; the guest is told, for it
    may have given it up all the same."""

    async def scenario() -> None:
        file = tmp_path / "f"
        route = StreamRoute(FileAddress(str(file)), Sources(), answers=False)
        route.open()
        guest: Any = Mute()
        outcome, reason = await route.hand_over(guest, keeps_ram=False)
        assert outcome is Handover.REFUSED
        assert reason.endswith("no answer")
        assert guest.told == [False]
        assert file.read_bytes() == b""
        await route.close()

    asyncio.run(scenario())


def test_the_next_migration_waits_until_the_last_has_given_everything_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`completed` is told first; to stop the tracking then would stop the next one's."""

    async def scenario() -> None:
        async with process_here() as process:
            may_stop, guest = asyncio.Event(), process.guest
            stop_tracking = guest.stop_tracking

            async def slow() -> None:
                await may_stop.wait()
                await stop_tracking()

            monkeypatch.setattr(guest, "stop_tracking", slow)
            first = await begin(process, "exec:cat >/dev/null")
            await soon(lambda: first.status is Status.COMPLETED)
            await process.cont()
            again = asyncio.create_task(begin(process, "exec:cat >/dev/null"))
            done, _ = await asyncio.wait({again}, timeout=0.5)
            may_stop.set()
            second = await asyncio.wait_for(again, 60)
            await asyncio.wait_for(second.ended.wait(), 60)
            assert not done
            assert second.status is Status.COMPLETED

    asyncio.run(scenario())


# -- what may take for ever, and what goes wrong behind the last byte -----------------------------


async def end_it(process: ControlProcess, how: str) -> None:
    if how == "cancel":
        await process.cancel()
    elif how == "yank":
        process.yank()


@pytest.mark.parametrize("how", ["cancel", "yank", "quit"])
@pytest.mark.parametrize(
    ("program", "is_unknown"),
    [
        pytest.param("sleep 1000", False, id="has-read-nothing"),
        pytest.param("cat >/dev/null; exec sleep 1000", True, id="has-read-all"),
    ],
)
def test_a_program_that_does_not_end_is_waited_for_until_somebody_wants_an_end(
    how: str, program: str, is_unknown: bool
) -> None:
    async def scenario() -> OutgoingMigration:
        async with process_here() as process:
            migration = await begin(process, f"exec:{program}")
            await soon(lambda: migration.machine.phase is Phase.HANDING_OVER)
            if is_unknown:  # it has read all of it
                await soon(lambda: bool(children("sleep")))
            await end_it(process, how)
            if how != "quit":
                await asyncio.wait_for(migration.ended.wait(), 10)
                assert process.guest.is_running is not is_unknown
                assert process.is_outcome_unknown is is_unknown
                assert children("sleep") == []
        return migration

    migration = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert migration.is_outcome_unknown is is_unknown
    expected = Status.FAILED if is_unknown or how == "yank" else Status.CANCELLED
    assert migration.status is expected
    assert children("sleep") == []


def children(name: str) -> list[int]:
    return [one.pid for one in psutil.Process().children(recursive=True) if one.name() == name]


@pytest.mark.parametrize("has_more_behind", [False, True])
def test_a_file_that_cannot_be_synced_behind_the_last_byte_fails_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_more_behind: bool
) -> None:
    """The whole of it may be on the disk: where it cannot be cut off again, nobody knows."""
    file = tmp_path / "f"
    file.write_bytes(b"head" + b"more" * has_more_behind)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def scenario() -> tuple[OutgoingMigration, bool]:
        async with process_here() as process:
            fd = os.open(file, os.O_WRONLY)
            os.lseek(fd, 4, os.SEEK_SET)
            monkeypatch.setattr(os, "fsync", fail)
            await process.migrate(parse_uri("fd:f"), False, lambda _: fd)
            assert process.outgoing is not None
            await asyncio.wait_for(process.outgoing.ended.wait(), 20)
            return process.outgoing, process.guest.is_running

    migration, is_running = asyncio.run(scenario())
    assert migration.status is Status.FAILED
    assert str(migration.machine.error).startswith("Unable to write: Input/output error")
    assert migration.is_outcome_unknown is has_more_behind
    assert is_running is not has_more_behind
    if not has_more_behind:
        assert file.read_bytes() == b"head"


def test_the_kernel_looks_after_the_other_host_of_a_stream_over_tcp() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as ours,
        contextlib.closing(Stream(os.dup(ours.fileno()))),
    ):
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        unanswered_ms = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert unanswered_ms == USER_TIMEOUT_MS
