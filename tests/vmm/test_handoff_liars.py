"""VMMs that hand over what is not what they say: refused in one line, and others are served."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import mmap
import os
import platform
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from engine import _native
from engine.errors import GuestError, MemoryRefused, NotHandedOver, UsageError
from engine.guest.foreignguest import ForeignGuest
from engine.guest.handoff_door import BUSY
from engine.guest.handoffguest import attach_handoff
from engine.guest.mappings import flags_of
from tests.guest.support import run
from tests.hugepages import huge_pages
from tests.support import WAIT_S
from tests.vmm.test_attaching import harvest, pages_of

pytestmark = [pytest.mark.process]
__all__ = ["huge_pages"]

SIZE: Final = 1 << 20
USERFAULTFD: Final = {"x86_64": 323, "aarch64": 282}
SEALABLE: Final = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING


def raw_userfaultfd() -> int:
    """Without UFFDIO_API."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = os.O_CLOEXEC | os.O_NONBLOCK | _native.UFFD_USER_MODE_ONLY
    return int(libc.syscall(USERFAULTFD[platform.machine()], flags))


@dataclass
class Vmm:
    """What this process hands over; a lie changes it."""

    undo: ExitStack
    fds: list[int] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)
    hello: dict[str, Any] = field(default_factory=dict)
    memory: list[mmap.mmap] = field(default_factory=list)

    def add(
        self, flags: int = SEALABLE, share: int = mmap.MAP_SHARED, size: int = SIZE, kib: int = 4
    ) -> None:
        """One region more."""
        memfd, uffd = os.memfd_create("guest", flags), raw_userfaultfd()
        self.undo.callback(os.close, memfd)
        self.undo.callback(os.close, uffd)
        os.ftruncate(memfd, size)
        memory = mmap.mmap(memfd, size, share)
        self.undo.callback(memory.close)
        memory.madvise(mmap.MADV_DONTFORK)
        self.memory.append(memory)
        address = _native.mapping_address(memory)
        place = {"base_host_virt_addr": address, "size": size, "offset": 0, "page_size_kib": kib}
        self.regions.append({"id": f"ram{len(self.regions)}", **place})
        self.fds += [memfd, uffd]

    def line(self) -> bytes:
        said = {"handoff": 1, "running": True, "regions": self.regions, **self.hello}
        return json.dumps(said).encode() + b"\n"


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with ExitStack() as undo:
        made = Vmm(undo)
        made.add()
        yield made


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "door"


@asynccontextmanager
async def attaching(
    path: Path, incoming: bool = False
) -> AsyncIterator[asyncio.Task[ForeignGuest]]:
    """A `serve` that waits for a VMM."""
    task = asyncio.create_task(attach_handoff(str(path), incoming=incoming))
    try:
        async with asyncio.timeout(WAIT_S):
            while not path.is_socket() and not task.done():
                await asyncio.sleep(0.01)
        yield task
    finally:
        task.cancel()
        found = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(found, ForeignGuest):
            await found.quit()


async def say(path: Path, line: bytes, fds: list[int]) -> tuple[socket.socket, dict[str, Any]]:
    """Hand over, and hear what is answered."""
    connection = await connect(path)
    with contextlib.suppress(BrokenPipeError):  # it was refused already, and can read why
        socket.send_fds(connection, [line], fds)
    return connection, json.loads(await hear(connection))


async def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    async with asyncio.timeout(WAIT_S):
        while connection.connect_ex(str(path)):
            await asyncio.sleep(0.01)
    connection.setblocking(False)
    return connection


async def hear(connection: socket.socket) -> bytes:
    buffer = b""
    async with asyncio.timeout(WAIT_S):
        while not buffer.endswith(b"\n"):
            piece = await asyncio.get_running_loop().sock_recv(connection, 4096)
            assert piece, "it hung up without a word"
            buffer += piece
    return buffer


def swap(vmm: Vmm) -> None:
    vmm.fds.reverse()


def drop(vmm: Vmm) -> None:
    vmm.fds.pop()


def double(vmm: Vmm) -> None:
    vmm.fds *= 2


def negotiate(vmm: Vmm) -> None:
    _native.uffd_negotiate(vmm.fds[1], 0)


def shrink(vmm: Vmm) -> None:
    os.ftruncate(vmm.fds[0], SIZE // 2)


def unsealable(vmm: Vmm) -> None:
    vmm.fds, vmm.regions = [], []
    vmm.add(os.MFD_CLOEXEC)


def private(vmm: Vmm) -> None:
    vmm.fds, vmm.regions = [], []
    vmm.add(share=mmap.MAP_PRIVATE)


def read_only(vmm: Vmm) -> None:
    vmm.fds[0] = os.open(f"/proc/self/fd/{vmm.fds[0]}", os.O_RDONLY | os.O_CLOEXEC)
    vmm.undo.callback(os.close, vmm.fds[0])


def elsewhere(vmm: Vmm) -> None:
    vmm.regions[0]["base_host_virt_addr"] += 4096


def same_memory(vmm: Vmm) -> None:
    vmm.add()
    vmm.fds[2] = vmm.fds[0]


def same_userfaultfd(vmm: Vmm) -> None:
    vmm.add()
    vmm.fds[3] = vmm.fds[1]


def for_children(vmm: Vmm) -> None:
    vmm.memory[0].madvise(mmap.MADV_DOFORK)


def pipe(vmm: Vmm) -> None:
    ends = os.pipe()
    for end in ends:
        vmm.undo.callback(os.close, end)
    vmm.fds[0] = ends[0]


def large_pages(vmm: Vmm) -> None:
    vmm.regions[0].update(page_size_kib=2048, size=2 << 20, base_host_virt_addr=2 << 20)
    os.ftruncate(vmm.fds[0], 2 << 20)


def strange_thread(vmm: Vmm) -> None:
    vmm.hello["vcpus"] = [os.getppid()]


def overlap(vmm: Vmm) -> None:
    vmm.regions.append({**vmm.regions[0], "id": "b"})
    vmm.fds *= 2


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (swap, "is no memfd|may not be read"),
        (drop, "1 descriptors beside 1 regions; 2 are needed"),
        (double, "4 descriptors beside 1 regions; 2 are needed"),
        (negotiate, "must be fresh, without UFFDIO_API"),
        (shrink, f"has {SIZE // 2} bytes, and not {SIZE}"),
        (unsealable, "make it with MFD_ALLOW_SEALING"),
        (private, "does not map the memfd of region 'ram0' shared and writable"),
        (read_only, "open it O_RDWR"),
        (elsewhere, "does not map the memfd of region 'ram0' shared and writable at 0x"),
        (same_memory, "does not map the memfd of region 'ram1'"),
        (same_userfaultfd, "the userfaultfd of region 'ram1' cannot track"),
        (for_children, r"madvise\(MADV_DONTFORK\) for that memory"),
        (pipe, "the memory of region 'ram0' is no memfd"),
        (large_pages, "has pages of 4096 bytes, and not 2097152"),
        (strange_thread, "has no thread"),
        (overlap, "two regions overlap"),
    ],
)
def test_a_lie_is_refused_in_one_line_and_the_truth_is_heard_afterwards(
    path: Path, vmm: Vmm, lie: Callable[[Vmm], None], says: str
) -> None:
    async def scenario(lying: Vmm) -> dict[str, Any]:
        async with attaching(path) as task:
            connection, answer = await say(path, lying.line(), lying.fds)
            with connection:
                assert await asyncio.get_running_loop().sock_recv(connection, 1) == b""
            assert not task.done()
            honest = Vmm(lying.undo)
            honest.add()
            connection, welcome = await say(path, honest.line(), honest.fds)
            with connection:
                assert welcome == {"welcome": 1, "role": "source"}
                assert (await task).blocks[0].name == "ram0"
            return answer

    lie(vmm)
    answer = run(scenario(vmm))

    assert list(answer) == ["error"]
    assert re.search(says, answer["error"])


def test_bytes_that_are_no_hello_are_refused(path: Path, vmm: Vmm) -> None:
    async def scenario() -> None:
        async with attaching(path) as task:
            for line, says in (
                (b"GET / HTTP/1.1\r\n", "not a hello"),
                (b"x" * 70_000, "more than 65536 bytes"),
                (vmm.line() + b"{", "speaks before its hello was answered"),
                (json.dumps({"regions": 0}).encode() + b"\n", "not a hello"),
            ):
                connection, answer = await say(path, line, [])
                connection.close()
                assert says in answer["error"]
            assert not task.done()

    run(scenario())


def test_who_says_nothing_is_sent_away_and_the_next_is_heard(path: Path, vmm: Vmm) -> None:
    async def scenario() -> None:
        async with attaching(path) as task:
            with await connect(path) as silent:
                connection, welcome = await say(path, vmm.line(), vmm.fds)
                with connection:
                    assert welcome["role"] == "source"
                    assert json.loads(await hear(silent))["error"] == "no hello within 5 s"
                    await task

    run(scenario())


def test_a_second_vmm_is_refused_while_the_first_is_served(path: Path, vmm: Vmm) -> None:
    async def scenario() -> None:
        async with attaching(path) as task:
            connection, _ = await say(path, vmm.line(), vmm.fds)
            with connection:
                guest = await task
                second, answer = await say(path, vmm.line(), vmm.fds)
                second.close()
                assert answer == {"error": BUSY}
                assert guest.is_alive

    run(scenario())


def test_a_vmm_that_runs_cannot_take_a_guest_over(path: Path, vmm: Vmm) -> None:
    async def scenario() -> None:
        async with attaching(path, incoming=True):
            connection, answer = await say(path, vmm.line(), vmm.fds)
            connection.close()
            assert "start it so that it stands" in answer["error"]

    run(scenario())


def test_only_this_user_may_connect_and_a_taken_path_is_refused(path: Path) -> None:
    async def scenario() -> None:
        async with attaching(path):
            (await connect(path)).close()
            assert path.stat().st_mode & 0o777 == 0o600
            with pytest.raises(UsageError, match="another process listens at"):
                await attach_handoff(str(path), incoming=False)
        assert not path.exists()

    run(scenario())


def test_huge_pages_are_tracked_as_such(path: Path, vmm: Vmm, huge_pages: None) -> None:
    vmm.add(SEALABLE | os.MFD_HUGETLB, size=4 << 20, kib=2048)

    run(check_tracked(path, vmm, {3: set(range(512)), 700: set(range(512, 1024))}))


def test_each_region_is_tracked_page_by_page_as_often_as_wanted(path: Path, vmm: Vmm) -> None:
    vmm.add()

    run(check_tracked(path, vmm, {3: {3}, 200: {200}}))


async def check_tracked(path: Path, vmm: Vmm, touches: dict[int, set[int]]) -> None:
    """Write to pages of the second region, with a tracker for each: those are dirty then."""
    async with attaching(path) as task:
        connection, _ = await say(path, vmm.line(), vmm.fds)
        with connection:
            guest = await task
            assert [block.name for block in guest.blocks] == ["ram0", "ram1"]
            for page, dirty in touches.items():
                tracking = await guest.start_tracking(None)
                harvest(guest, tracking)
                vmm.memory[1][page * 4096] = 7
                found = [pages_of(each) for each in harvest(guest, tracking)]
                assert found == [set(), dirty]
                await guest.stop_tracking()


@pytest.mark.parametrize(
    ("here", "there", "says"),
    [(True, False, "has no device state, and one came"), (False, True, "has a device state")],
)
def test_both_sides_have_a_device_state_or_none_has(
    path: Path, here: bool, there: bool, says: str
) -> None:
    async def answer(connection: socket.socket) -> None:
        while True:
            order = json.loads(await hear(connection))
            reply = {"id": order["id"], "running": False, "size": 3}
            connection.send(json.dumps(reply).encode() + b"\n")

    async def scenario(source: Vmm, destination: Vmm) -> None:
        source.hello, destination.hello = {"state": here}, {"state": there}
        destination.hello["running"] = False
        other = path.with_name("other")
        async with attaching(path) as one, attaching(other, incoming=True) as two:
            ends = [await say(path, source.line(), source.fds)]
            ends += [await say(other, destination.line(), destination.fds)]
            answering = [asyncio.create_task(answer(end)) for end, _ in ends]
            guests = [await one, await two]
            await guests[0].pause(for_migration=True)
            with pytest.raises(GuestError, match=says):
                await guests[1].load_state(await guests[0].save_state())
            for each in answering:
                each.cancel()
            await asyncio.gather(*answering, return_exceptions=True)
            for end, _ in ends:
                end.close()

    with ExitStack() as undo:
        vmms = Vmm(undo), Vmm(undo)
        for each in vmms:
            each.add()
        run(scenario(*vmms))


def test_a_vmm_that_would_not_stand_alone_is_not_handed_over(path: Path, vmm: Vmm) -> None:
    async def answer(connection: socket.socket) -> None:
        runs = True
        while True:
            order = json.loads(await hear(connection))
            if order["execute"] in ("pause", "resume"):
                runs = order["execute"] == "resume"
            reply = {"id": order["id"], "running": runs}
            if order.get("until") == "resume":
                reply["error"] = "never"
            connection.send(json.dumps(reply).encode() + b"\n")

    async def scenario() -> None:
        async with attaching(path) as task:
            connection, _ = await say(path, vmm.line(), vmm.fds)
            with connection:
                answering = asyncio.create_task(answer(connection))
                guest = await task
                await guest.pause(for_migration=True)
                with pytest.raises(NotHandedOver, match="refused 'pause': never"):
                    await guest.give_away()
                await guest.resume(for_migration=True)
                assert guest.is_running
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)

    run(scenario())


def test_a_vmm_that_would_fork_its_memory_meanwhile_is_not_handed_over(
    path: Path, vmm: Vmm
) -> None:
    async def scenario() -> None:
        async with attaching(path) as task:
            connection, _ = await say(path, vmm.line(), vmm.fds)
            with connection:
                guest = await task
                await guest.start_tracking(None)
                for_children(vmm)
                with pytest.raises(MemoryRefused, match="a child of process"):
                    await guest.check_handover()

    run(scenario())


def test_a_vmm_that_hangs_up_is_let_go_and_can_come_again(path: Path, vmm: Vmm) -> None:
    async def scenario() -> None:
        for used in (vmm, again):
            async with attaching(path) as task:
                connection, _ = await say(path, used.line(), used.fds)
                with connection:
                    guest = await task
                    await guest.start_tracking(None)
                    assert is_tracked()
                async with asyncio.timeout(WAIT_S):
                    assert "its agent is gone" in await guest.died()
                assert not is_tracked()

    def is_tracked() -> bool:
        ranges = [(vmm.regions[0]["base_host_virt_addr"], SIZE)]
        return any("uw" in flags for flags in flags_of(os.getpid(), ranges))

    again = Vmm(vmm.undo, [vmm.fds[0], raw_userfaultfd()], vmm.regions)
    vmm.undo.callback(os.close, again.fds[1])
    run(scenario())


@pytest.mark.parametrize("way", ["hangs", "nonsense", "refuses"])
def test_a_vmm_that_does_not_obey_fails_what_was_asked_and_nothing_else(
    path: Path, vmm: Vmm, way: str
) -> None:
    says = {"hangs": "no answer in 10 s", "nonsense": "dead|hung up|something else"}

    async def scenario() -> None:
        async with attaching(path) as task:
            connection, _ = await say(path, vmm.line(), vmm.fds)
            with connection:
                guest = await task
                asking = asyncio.create_task(guest.pause(for_migration=True))
                order = json.loads(await hear(connection))
                assert order["execute"] == "status"
                if way == "nonsense":
                    connection.send(b"lalala\n")
                elif way == "refuses":
                    connection.send(b'{"id":%d,"error":"no"}\n' % order["id"])
                with pytest.raises(GuestError, match=says.get(way, "refused 'status': no")):
                    await asking

    run(scenario())
