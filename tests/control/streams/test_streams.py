"""Migrations over one descriptor: they arrive whole, and whatever breaks, the guest runs on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine
from engine.control.status import Status
from engine.errors import MigrationError, UsageError
from tests.conformance.peers import Client
from tests.control.streams.rig import (
    GUEST,
    SLOW,
    WRITING,
    Couple,
    check_arrived,
    check_nothing_came,
    couple,
    parts,
    runs,
    status_of,
    until,
    until_data,
    until_gone,
    until_status,
)

pytestmark = pytest.mark.process

WAYS = ("socket", "pipe", "exec")
RETURN_PATH = "return-path=on"


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        *(pytest.param(way, [], id=way) for way in WAYS),
        pytest.param("socket", [RETURN_PATH], id="socket-return-path"),
        pytest.param("socket", ["x-tracker=content-hash"], id="socket-content-hash"),
    ],
)
def test_a_guest_that_writes_arrives_whole(way: str, settings: list[str], tmp_path: Path) -> None:
    async def scenario() -> None:
        async with couple(way, tmp_path, *settings) as both:
            migration = await both.migrate(max_bandwidth=40_000_000)
            statistics = await migration.result()
            assert statistics.rounds >= 2
            assert statistics.normal_pages >= 24 * 256
            assert statistics.transferred_bytes > 24 << 20
            assert sum(statistics.phases_ns.values()) > 0
            assert [channel["index"] for channel in statistics.channels] == [0]
            await check_arrived(both)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "settings", [["multifd-compression=zstd"], ["xbzrle=on", "multifd-compression=lz4"]],
    ids=["zstd", "xbzrle-lz4"],
)  # fmt: skip
def test_codecs_and_deltas_go_through_a_stream_too(settings: list[str], tmp_path: Path) -> None:
    guest = "workload:size=24M,rate=10M,pattern=random,contents=text"

    async def scenario() -> None:
        async with couple("pipe", tmp_path, *settings, guest=guest) as both:
            statistics = await (await both.migrate(max_bandwidth=40_000_000)).result()
            assert statistics.raw["x-compression"]["encoded-bytes"] > 0
            assert statistics.transferred_bytes < statistics.normal_pages * 4096
            await check_arrived(both)

    asyncio.run(scenario())


def test_both_ways_through_a_program(tmp_path: Path) -> None:
    """`exec:` on both sides with a return path: two programs and a socket between them."""
    path = tmp_path / "s"
    script = (
        "import os, socket, sys, threading\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "if sys.argv[1] == 'listen':\n"
        "    s.bind(sys.argv[2]); s.listen(); s = s.accept()[0]\n"
        "else:\n"
        "    s.connect(sys.argv[2])\n"
        "def answers():\n"
        "    while data := s.recv(65536):\n"
        "        os.write(1, data)\n"
        "def stream():\n"
        "    while data := os.read(0, 65536):\n"
        "        s.sendall(data)\n"
        "    s.shutdown(socket.SHUT_WR)\n"
        "threading.Thread(target=stream, daemon=True).start()\n"
        "answers()\n"
    )

    async def scenario() -> None:
        async with couple("socket", tmp_path, RETURN_PATH) as both:
            for control, command, how in (
                (both.destination, "migrate-incoming", "listen"),
                (both.source, "migrate", "connect"),
            ):
                addr = {"transport": "exec", "args": [sys.executable, "-c", script, how, str(path)]}
                await control.execute(command, channels=[{"channel-type": "main", "addr": addr}])

                async def listens() -> bool:
                    return path.exists()

                await until(listens)
                await asyncio.sleep(0)
            assert await until_status(both.source, "completed", "failed") == "completed"
            await check_arrived(both)

    asyncio.run(scenario())
    path.unlink()


def test_a_program_that_compresses_keeps_it_and_gives_it_back(tmp_path: Path) -> None:
    file = tmp_path / "guest.gz"

    async def scenario() -> None:
        async with couple("", tmp_path) as both:
            migration = await both.source.migrate(f"exec:gzip -1 >{file}", downtime_limit=30_000)
            await migration.result()  # on a busy machine gzip is no faster than the guest writes
            both.incoming = f"exec:gzip -dc {file}"
            await both.listen()
            await check_arrived(both)

    asyncio.run(scenario())


def test_the_bandwidth_limit_holds_and_back_pressure_reaches_the_sender(tmp_path: Path) -> None:
    async def scenario() -> float:
        async with couple("pipe", tmp_path) as both:
            began = time.monotonic()
            await (await both.migrate(max_bandwidth=20_000_000, downtime_limit=2000)).result()
            took_s = time.monotonic() - began
            await check_arrived(both)
            return took_s

    assert asyncio.run(scenario()) > 1.0  # 24 MiB at 20 MB/s


def test_events_come_in_the_order_of_any_migration(tmp_path: Path) -> None:
    async def seen(both: Couple, *, is_stream: bool) -> list[str]:
        if is_stream:
            await both.connect()
            await both.listen()
            uri = both.outgoing
        else:
            await both.destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
            uri = await both.destination.address()
        names: list[str] = []
        with both.source.listen() as events:
            await both.source.migrate(uri, downtime_limit=10_000)
            async for event in events:
                names.append(event.get("data", {}).get("status", event["event"]))
                if names[-1] == "completed":
                    return [name for name in names if name != "MIGRATION_PASS"]
        return names

    async def scenario() -> None:
        async with couple("socket", tmp_path) as both, couple("socket", tmp_path) as others:
            theirs = await seen(others, is_stream=False)
            assert await seen(both, is_stream=True) == theirs

    asyncio.run(scenario())


# -- after a one-way end -------------------------------------------------------------------------


def test_cont_after_a_one_way_end_is_the_operators_word(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine.Control.start(WRITING) as source:
            await (await source.migrate("exec:cat >/dev/null")).result()
            assert (await source.execute("query-status"))["status"] == "postmigrate"
            with pytest.raises(UsageError, match="paused due to previous migration"):
                await source.migrate("exec:cat >/dev/null")
            assert not (await source.query_guest())["running"]
            await source.execute("cont")
            await runs(source)
            await (await source.migrate("exec:cat >/dev/null")).result()

    asyncio.run(scenario())


def test_cont_after_an_answered_end_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with couple("socket", tmp_path, RETURN_PATH) as both:
            await (await both.migrate()).result()
            with pytest.raises(UsageError, match="the guest is at the destination"):
                await both.source.execute("cont")
            await check_arrived(both)

    asyncio.run(scenario())


@pytest.mark.parametrize("continues", [False, True])
def test_the_journal_knows_who_has_the_guest_after_a_one_way_end(
    continues: bool, tmp_path: Path
) -> None:
    state = tmp_path / "state"

    async def scenario() -> None:
        async with engine.Control.start(WRITING, state_dir=state) as first:
            await (await first.migrate("exec:cat >/dev/null")).result()
            if continues:
                await first.execute("cont")
            first.kill()
            await first.wait()
            again = engine.Control.start(WRITING, state_dir=state)
            if continues:
                async with again:
                    await runs(again)
            else:
                with pytest.raises(UsageError, match="its guest runs at the destination, or did"):
                    await again.__aenter__()

    asyncio.run(scenario())


# -- what breaks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_cancelled_in_mid_stream(way: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with couple(way, tmp_path) as both:
            migration = await both.migrate(max_bandwidth=SLOW)
            await until_data(both.destination)
            await migration.cancel()
            with pytest.raises(engine.MigrationFailed) as ended:
                await migration.result()
            assert ended.value.statistics.status is Status.CANCELLED
            await runs(both.source)
            assert "the stream ended early" in await check_nothing_came(both.destination)
            await both.until_given_back()
            await until_gone("cat", both.source, both.destination)

    asyncio.run(scenario())


def test_cancelled_while_nobody_reads(tmp_path: Path) -> None:
    """The sender waits for room and hears its orders nevertheless."""

    async def scenario() -> None:
        async with engine.Control.start(WRITING) as source:
            migration = await source.migrate("exec:sleep 1000")
            await until_status(source, "active")

            async def is_full() -> bool:
                return (await migration.statistics()).transferred_bytes > 0

            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(until(is_full), 1.0)
            await migration.cancel()
            await until_status(source, "cancelled")  # the program would sleep on
            await runs(source)
            await until_gone("sleep", source)

    asyncio.run(scenario())


@pytest.mark.parametrize("settings", [[], [RETURN_PATH]], ids=["one-way", "return-path"])
@pytest.mark.parametrize("victim", ["sender", "receiver", "source", "destination"])
def test_killed_in_mid_stream(victim: str, settings: list[str], tmp_path: Path) -> None:
    """kill -9 of a worker or a control process: the source's guest runs on."""

    async def scenario() -> None:
        async with couple("socket", tmp_path, *settings) as both:
            guests = parts(both.source, "engine.guest.agent")
            await both.migrate(max_bandwidth=SLOW)
            await until_data(both.destination)
            match victim:
                case "sender":
                    parts(both.source, "engine.multifd.sender")[0].kill()
                case "receiver":
                    parts(both.destination, "engine.multifd.receiver")[0].kill()
                case "source":
                    both.source.kill()
                case "destination":
                    both.destination.kill()
            if victim == "source":
                assert guests[0].is_running()
            else:
                assert await until_status(both.source, "failed", "completed") == "failed"
                await runs(both.source)
            if victim == "destination":
                await both.destination.wait()
            else:
                await check_nothing_came(both.destination)

    asyncio.run(scenario())


@pytest.mark.parametrize("side", ["source", "destination"])
def test_the_program_is_killed_in_mid_stream(side: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with couple("exec", tmp_path) as both:
            await both.migrate(max_bandwidth=SLOW)
            await until_data(both.destination)
            control = both.source if side == "source" else both.destination
            for process in parts(control, "cat"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
            assert await until_status(both.source, "failed", "completed") == "failed"
            error = (await both.source.execute("query-migrate"))["error-desc"]
            assert "\n" not in error
            await runs(both.source)
            await check_nothing_came(both.destination)
            await until_gone("cat", both.source, both.destination)

    asyncio.run(scenario())


def test_a_program_that_ends_at_once_fails_the_migration() -> None:
    async def scenario() -> str:
        async with engine.Control.start(WRITING) as source:
            migration = await source.migrate("exec:exit 3")
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            await runs(source)
            return str(failed.value)

    error = asyncio.run(scenario())
    assert "exit status 3 before the stream did" in error or "Unable to write" in error


def test_a_program_that_fails_after_the_whole_stream_leaves_the_outcome_open() -> None:
    """It may have carried the guest to somebody: two that run would be worse than none."""

    async def scenario() -> None:
        async with engine.Control.start(WRITING) as source:
            migration = await source.migrate("exec:cat >/dev/null; exit 3")
            with pytest.raises(engine.OutcomeUnknown, match="exit status 3 after it had taken"):
                await migration.result()
            assert (await source.execute("query-status"))["status"] == "paused"
            assert not (await source.query_guest())["running"]
            await source.execute("cont")
            await runs(source)

    asyncio.run(scenario())


def test_control_that_dies_behind_the_last_byte_leaves_no_second_guest(
    tmp_path: Path,
) -> None:
    """The whole stream may run somewhere: here the guest stands until its user has looked."""
    file, rundir = tmp_path / "f", Path(os.environ["XDG_RUNTIME_DIR"]) / "guest"
    rundir.mkdir(mode=0o700)

    async def scenario() -> None:
        async with engine.Control.start(f"{WRITING},rundir={rundir}") as source:
            await source.migrate(f"exec:cat >{file}; sleep 1000")
            await until_status(source, "device")
            async with asyncio.timeout(60):
                while not any("sleep" in p.name() for p in parts(source, "sleep 1000")):
                    await asyncio.sleep(0.02)
            program = parts(source, "sleep 1000")
            source.kill()
            await source.wait()
            for process in program:
                process.kill()
            async with asyncio.timeout(60):
                while not (orphans := list(rundir.glob("guest-*.sock"))):
                    await asyncio.sleep(0.02)
            async with engine.Control.start(f"workload:socket={orphans[0]}") as adopted:
                assert not (await adopted.query_guest())["running"]
                assert (await adopted.execute("query-migrate"))["x-handover"] == "unknown"
                await adopted.execute("cont")
                await runs(adopted)
        async with engine.Control.start(GUEST, f"file:{file}") as destination:
            assert await until_status(destination, "completed", "failed") == "completed"
            await runs(destination)

    asyncio.run(scenario())


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


@pytest.mark.parametrize("form", ["file", "exec"])
def test_a_full_disk_fails_the_migration_and_the_guest_runs_on(
    form: str, small_tmpfs: Path
) -> None:
    file = small_tmpfs / "stream"
    file.write_bytes(b"X" * 4096)
    uri = f"file:{file},offset=4096" if form == "file" else f"exec:cat >>{file} 2>/dev/null"

    async def scenario() -> str:
        async with engine.Control.start(WRITING) as source:
            with pytest.raises(engine.MigrationFailed) as failed:
                await (await source.migrate(uri)).result()
            await runs(source)
            return str(failed.value)

    error = asyncio.run(scenario())
    assert "\n" not in error
    if form == "file":
        assert error == "the stream is lost: Unable to write: No space left on device"
        assert file.read_bytes() == b"X" * 4096  # nothing that looks like a stream is left


def test_a_destination_that_does_not_fit_says_so_on_the_return_path(tmp_path: Path) -> None:
    async def scenario() -> tuple[str, str]:
        smaller = engine.Control.start("workload:size=4M", "defer")
        async with couple("socket", tmp_path, RETURN_PATH) as both, smaller:
            both.destination = smaller
            with pytest.raises(engine.MigrationFailed) as failed:
                await (await both.migrate()).result()
            await runs(both.source)
            return str(failed.value), await check_nothing_came(smaller)

    at_source, at_destination = asyncio.run(scenario())
    for error in (at_source, at_destination):
        assert "Size mismatch" in error


def test_answers_need_a_stream_that_goes_both_ways(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with couple("pipe", tmp_path, RETURN_PATH) as both:
            await both.connect()
            for uri in (both.outgoing, f"file:{tmp_path}/f"):
                with pytest.raises(UsageError, match="return-path needs a descriptor"):
                    await both.source.migrate(uri)
                assert await status_of(both.source) == "failed"
            await runs(both.source)
            assert not (tmp_path / "f").exists()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("fd:nope", "File descriptor named 'nope' has not been found"),
        ("exec:true", "Migration requires multi-channel URIs"),
        ("file:/x", "Migration requires multi-channel URIs"),
        ("vsock:1:2", "Migration requires multi-channel URIs"),
    ],
)
def test_streams_carry_no_channels(uri: str, says: str) -> None:
    async def scenario() -> None:
        settings = [] if "nope" in uri else ["multifd=on"]
        source = engine.Control.start("workload:size=1M", settings=settings)
        destination = engine.Control.start("workload:size=1M", "defer", settings)
        async with source, destination:
            with pytest.raises(MigrationError, match=says):
                await source.migrate(uri)
            with pytest.raises(MigrationError, match=says):
                await destination.execute("migrate-incoming", uri=uri)
            await destination.execute("migrate-set-capabilities", capabilities=[
                {"capability": "multifd", "state": False}
            ])  # fmt: skip
            await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")  # it may try again

    asyncio.run(scenario())


# -- files and inherited descriptors -------------------------------------------------------------


def test_a_file_is_its_owners_alone_and_can_come_in_on_stdin(tmp_path: Path) -> None:
    file = tmp_path / "stream"

    async def scenario() -> None:
        async with engine.Control.start(WRITING) as source:
            await (await source.migrate(f"file:{file}")).result()

    asyncio.run(scenario())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    qmp = Path(os.environ["XDG_RUNTIME_DIR"]) / "q"
    line = [sys.executable, "-m", "engine.cli", "serve", "--qmp", f"unix:{qmp}"]
    line += ["--guest", WRITING.partition(",rate")[0], "--incoming", "fd:0"]
    with file.open("rb") as stdin, subprocess.Popen(line, stdin=stdin) as process:
        try:
            with contextlib.closing(Client(qmp)) as client:
                while client.execute("query-migrate")["return"]["status"] != "completed":
                    assert process.poll() is None
                    time.sleep(0.02)
                judged = client.execute("x-judge")["return"]
                assert judged["wrong-pages"] == 0
                assert judged["page-writes"] == judged["vcpu-writes"] > 0
        finally:
            process.terminate()


@pytest.mark.parametrize("uri", ["fd:nope", "file:/nonexistent/x"])
def test_a_stream_that_cannot_be_opened_fails_at_once_and_nothing_else_is_tried(uri: str) -> None:
    async def scenario() -> None:
        async with engine.Control.start("workload:size=1M") as source:
            with pytest.raises(MigrationError):
                await source.migrate(uri)
            assert await status_of(source) == "failed"
            with pytest.raises(engine.MigrationFailed):
                await (await source.migrate("tcp:127.0.0.1:1")).result()
        assert "internal error" not in source.stderr

    asyncio.run(scenario())


def test_numbers_that_nobody_gave_the_process_are_no_streams() -> None:
    async def scenario() -> None:
        async with engine.Control.start("ram:size=1M", "defer") as control:
            for number in ("3", "5", "99", "9" * 30):
                with pytest.raises(UsageError, match="has not been found"):
                    await control.execute("migrate-incoming", uri=f"fd:{number}")

    asyncio.run(scenario())
