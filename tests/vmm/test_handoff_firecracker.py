"""A VMM that speaks Firecracker's userfaultfd handshake gets the memory of a `ram:` guest."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import engine
from engine import _native
from engine.errors import MigrationError, WireError
from engine.guest.handoff_plain import parse_plain
from tests.guest.support import run
from tests.support import eventually
from tests.vmm.handoff import agent_of
from tests.vmm.test_handoff_liars import attaching, connect, raw_userfaultfd, say

pytestmark = [pytest.mark.process]

MIB = 1 << 20
PAGE = 4096
LARGE = 2 * MIB
SIZES = (24, 8)  #: of its regions


class Restored:
    """The program in tests/vmm/firecracker.py."""

    def __init__(self, directory: Path) -> None:
        self.socket, pipe = directory / "uffd", subprocess.PIPE
        program = Path(__file__).with_name("firecracker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(self.socket), *map(str, SIZES)],
            stdin=pipe,
            stdout=pipe,
            text=True,
        )

    def ask(self) -> None:
        """It touches all of its memory."""
        assert self.process.stdin is not None
        self.process.stdin.write("sum\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def waits(self) -> bool:
        """Whether any of its memory is registered for missing pages."""
        smaps = Path(f"/proc/{self.process.pid}/smaps").read_text()
        return any("um" in line.split() for line in smaps.splitlines() if "VmFlags" in line)

    def close(self) -> None:
        with self.process:
            self.process.kill()


def check_served(restored: Restored, snapshot: Path) -> None:
    """It sees every byte of the memory that was sent, and then waits for nothing any more."""
    restored.ask()
    assert restored.answer() == hashlib.sha256(snapshot.read_bytes()).hexdigest()
    assert eventually(lambda: not restored.waits())


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def restored(directory: Path) -> Iterator[Restored]:
    found = Restored(directory)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def snapshot(directory: Path) -> Path:
    """A memory file: half of it holes."""
    path = directory / "memory"
    with path.open("wb") as file:
        for page in range(0, sum(SIZES) * MIB // PAGE, 2):
            os.pwrite(file.fileno(), os.urandom(64) * 64, page * PAGE)
        os.truncate(file.fileno(), sum(SIZES) * MIB)
    return path


@contextlib.asynccontextmanager
async def arrived(
    restored: Restored, snapshot: Path, *, stands: bool = False
) -> AsyncIterator[engine.Control]:
    """The destination's control process, when a migration has just completed."""
    here = engine.Control.start(f"ram:size={sum(SIZES)}M,path={snapshot}")
    there = engine.Control.start(f"handoff:{restored.socket}", "tcp:127.0.0.1:0")
    async with here, there:
        assert restored.waits()
        if stands:
            await there.execute("stop")
        migration = await here.migrate(there, max_bandwidth=0, downtime_limit=60_000)
        await migration.result()
        yield there


def test_all_of_a_snapshot_arrives_and_the_memory_is_its_own_then(
    restored: Restored, snapshot: Path
) -> None:
    restored.ask()  # before a page is there

    async def scenario() -> None:
        async with arrived(restored, snapshot) as there:
            assert await asyncio.to_thread(restored.answer) == expected
            with pytest.raises(MigrationError, match="takes no orders"):
                await there.execute("stop")

    expected = hashlib.sha256(snapshot.read_bytes()).hexdigest()
    asyncio.run(scenario())

    assert eventually(lambda: not restored.waits())
    restored.ask()
    assert restored.answer() == expected


def test_it_gets_its_pages_when_ramferry_is_killed_behind_the_migration(
    restored: Restored, snapshot: Path
) -> None:
    async def scenario() -> None:
        async with arrived(restored, snapshot) as there:
            os.kill(agent_of(there.pid), signal.SIGKILL)
            there.kill()
            await there.wait()

    asyncio.run(scenario())

    check_served(restored, snapshot)


@pytest.mark.parametrize("is_killed", [False, True], ids=["quits", "is-killed"])
def test_one_that_arrived_stopped_gets_its_pages_when_ramferry_has_gone(
    restored: Restored, snapshot: Path, is_killed: bool
) -> None:
    async def scenario() -> None:
        async with arrived(restored, snapshot, stands=True) as there:
            assert (await there.execute("query-status"))["running"] is False
            assert restored.waits()
            if is_killed:
                os.kill(agent_of(there.pid), signal.SIGKILL)
                there.kill()
                await there.wait()

    asyncio.run(scenario())

    check_served(restored, snapshot)


def test_a_migration_fails_when_nobody_can_serve_its_pages(
    restored: Restored, snapshot: Path
) -> None:
    async def scenario() -> None:
        here = engine.Control.start(f"ram:size={sum(SIZES)}M,path={snapshot}")
        there = engine.Control.start(f"handoff:{restored.socket}", "tcp:127.0.0.1:0")
        async with here, there:
            os.kill(server_of(agent_of(there.pid)), signal.SIGKILL)
            migration = await here.migrate(there, max_bandwidth=0, downtime_limit=60_000)
            with pytest.raises(MigrationError):
                await migration.result()
            assert (await here.execute("query-status"))["status"] == "running"
            assert "the process that serves pages" in there.stderr

    asyncio.run(scenario())


def test_one_that_serves_nobody_is_not_waited_for(restored: Restored) -> None:
    """Whatever it does, it ends with its agent."""

    async def scenario() -> int:
        async with engine.Control.start(f"handoff:{restored.socket}", "tcp:127.0.0.1:0") as there:
            server = server_of(agent_of(there.pid))
            os.kill(server, signal.SIGSTOP)
            return server

    server = asyncio.run(scenario())

    assert eventually(lambda: not Path(f"/proc/{server}").exists(), 20)


def server_of(agent: int) -> int:
    """The process that will serve the pages."""
    for children in Path(f"/proc/{agent}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"engine.guest.handoff_pages" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("it has none")


def test_it_waits_when_the_migration_never_comes(restored: Restored) -> None:
    async def scenario() -> None:
        async with engine.Control.start(f"handoff:{restored.socket}", "tcp:127.0.0.1:0"):
            pass

    asyncio.run(scenario())

    assert restored.waits()
    assert restored.process.poll() is None


def test_it_cannot_be_a_source(directory: Path) -> None:
    async def scenario() -> str:
        uffd = raw_userfaultfd()
        try:
            async with attaching(directory / "door"):
                connection, answer = await say(directory / "door", plain(region()), [uffd])
                connection.close()
                return str(answer["error"])
        finally:
            os.close(uffd)

    assert "can only take a memory over" in run(scenario())


@pytest.mark.parametrize(
    ("kinds", "says"),
    [([], "0 descriptors beside it"), (["pipe"], "is no userfaultfd"), (["uffd"] * 2, "2 descr")],
)
def test_wrong_descriptors_are_refused(directory: Path, kinds: list[str], says: str) -> None:
    async def scenario(fds: list[int]) -> str:
        async with attaching(directory / "door", incoming=True):
            connection, answer = await say(directory / "door", plain(region()), fds)
            connection.close()
            (await connect(directory / "door")).close()
            return str(answer["error"])

    with contextlib.ExitStack() as undo:
        fds = [raw_userfaultfd() if kind == "uffd" else os.eventfd(0) for kind in kinds]
        for fd in fds:
            undo.callback(os.close, fd)
        assert says in run(scenario(fds))


@pytest.mark.parametrize("lie", ["unregistered", "half", "elsewhere", "large-pages"])
def test_memory_that_does_not_wait_is_refused(directory: Path, lie: str) -> None:
    """Its faults would never be told."""
    size = 4 * LARGE

    async def scenario(place: dict[str, int]) -> str:
        async with attaching(directory / "door", incoming=True):
            connection, answer = await say(directory / "door", plain(place), [uffd])
            connection.close()
            return str(answer["error"])

    with contextlib.ExitStack() as undo:
        uffd = _native.uffd_open(_native.UFFD_USER_MODE_ONLY, 0)
        undo.callback(os.close, uffd)
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        undo.callback(memory.close)
        address = -(-_native.mapping_address(memory) // LARGE) * LARGE
        waiting = {"unregistered": 0, "half": LARGE}.get(lie, 2 * LARGE)
        if waiting:
            _native.uffd_register(uffd, address, waiting, _native.UFFD_REGISTER_MISSING)
        place = region(base_host_virt_addr=address, size=2 * LARGE)
        if lie == "elsewhere":
            place["base_host_virt_addr"] += LARGE
        if lie == "large-pages":
            place["page_size_kib"] = LARGE
        assert "does not wait for missing pages" in run(scenario(place))


def region(**changes: int) -> dict[str, int]:
    whole = {"base_host_virt_addr": 16 * PAGE, "size": 4 * PAGE, "offset": 0}
    return {**whole, "page_size_kib": PAGE, **changes}


def plain(*regions: dict[str, int]) -> bytes:
    return json.dumps(regions).encode()


def test_firecrackers_of_all_ages_are_understood() -> None:
    old = {name: value for name, value in region().items() if name != "page_size_kib"}

    for each in (old, region(), region(page_size_kib=4), region(page_size=PAGE, page_size_kib=0)):
        assert parse_plain(plain(each))[0].page_size == PAGE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[]", "0 regions"),
        (b"[1]", "not Firecracker's handshake"),
        (plain(region(), region(base_host_virt_addr=64 * PAGE)), "overlap at 0x0"),
        (plain(region(), region(offset=4 * PAGE)), "overlap at 0x10000"),
        (plain(region(offset=2**62)), "are allowed"),
        (plain(region(size=0)), "is not whole pages"),
        (plain(region(page_size=3)), "page size 3"),
    ],
)
def test_a_wrong_handshake_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        parse_plain(text)
