"""Pages pushed to who waits at a userfaultfd of its own, as Firecracker does."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from engine import _native
from engine.guest.handoff_hello import Region
from engine.guest.handoff_pages import PagePusher, main
from engine.guest.handoff_serving import READY, SERVE, YOURS, is_wanted
from tests.kernel import has_userfaultfd
from tests.support import WAIT_S

PAGE = 4096
PAGES = 256
EVENT_REMOVE = 1 << 3
DONTNEED = 4
libc = ctypes.CDLL(None)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not has_userfaultfd(_native.UFFD_USER_MODE_ONLY), reason="needs userfaultfd"
    ),
]


@dataclass
class World:
    """Received memory, and two regions of who waits, in the other order there."""

    memfd: int
    uffd: int
    waiting: mmap.mmap
    regions: list[Region]
    address: int

    def push(self) -> None:
        pusher = PagePusher(self.uffd, self.memfd, self.regions)
        try:
            pusher.run()
        finally:
            pusher.close()

    def expected(self) -> bytes:
        whole = os.pread(self.memfd, 2 * PAGES * PAGE, 0)
        return whole[PAGES * PAGE :] + whole[: PAGES * PAGE]


@pytest.fixture
def world() -> Iterator[World]:
    size = PAGES * PAGE
    with contextlib.ExitStack() as undo:
        memfd = os.memfd_create("received", os.MFD_CLOEXEC)
        undo.callback(os.close, memfd)
        os.ftruncate(memfd, 2 * size)
        for page in range(2 * PAGES):
            if page % 8:  # else a hole
                os.pwrite(memfd, os.urandom(64) * 64, page * PAGE)
        uffd = _native.uffd_open(_native.UFFD_USER_MODE_ONLY, EVENT_REMOVE)
        undo.callback(os.close, uffd)
        waiting = mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        undo.callback(waiting.close)
        address = _native.mapping_address(waiting)
        _native.uffd_register(uffd, address, 2 * size, _native.UFFD_REGISTER_MISSING)
        regions = [Region(address + size, size, 0), Region(address, size, size)]
        yield World(memfd, uffd, waiting, regions, address)


def test_all_pages_come_and_holes_are_zero(world: World) -> None:
    world.push()

    assert world.waiting[:] == world.expected()


def test_who_waits_gets_what_is_its_own(world: World) -> None:
    found = ctypes.create_string_buffer(PAGE)
    page = PAGES + 9
    source = world.address + page * PAGE
    thread = threading.Thread(target=libc.memcpy, args=(found, source, PAGE))
    thread.start()
    assert select.select([world.uffd], [], [], WAIT_S)[0]

    world.push()

    thread.join(WAIT_S)
    assert found.raw == world.expected()[page * PAGE : (page + 1) * PAGE]
    assert world.waiting[:] == world.expected()


def test_what_is_given_back_meanwhile_is_zero_and_nothing_else(world: World) -> None:
    """Before it has come, and after: its giver waits for us to hear of it."""
    begin, size = 100 * PAGE, 50 * PAGE
    thread = threading.Thread(target=libc.madvise, args=(world.address + begin, size, DONTNEED))
    thread.start()
    assert select.select([world.uffd], [], [], WAIT_S)[0]

    world.push()

    thread.join(WAIT_S)
    assert not thread.is_alive()
    expected = bytearray(world.expected())
    expected[begin : begin + size] = bytes(size)
    assert world.waiting[:] == expected


def test_a_giver_never_waits_for_ever_nor_brings_old_pages_back(world: World) -> None:
    """Again and again, at any time: what was given back last reads as zero."""
    ended = threading.Event()

    def give() -> None:
        while not ended.is_set():
            libc.madvise(world.address + 30 * PAGE, 90 * PAGE, DONTNEED)

    thread = threading.Thread(target=give)
    thread.start()
    assert select.select([world.uffd], [], [], WAIT_S)[0]
    world.push()
    ended.set()
    thread.join(WAIT_S)

    assert not thread.is_alive()
    assert world.waiting[30 * PAGE : 120 * PAGE] == bytes(90 * PAGE)
    assert world.waiting[: 30 * PAGE] == world.expected()[: 30 * PAGE]
    assert world.waiting[120 * PAGE :] == world.expected()[120 * PAGE :]


def test_a_place_where_nobody_waits_is_an_error(world: World) -> None:
    world.regions[0] = Region(world.address + 2 * PAGES * PAGE, PAGE, PAGE)

    with pytest.raises(OSError, match="No such file"):
        world.push()


# -- the process ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "is_served"), [(b"", False), (SERVE, True), (YOURS, True), (YOURS + SERVE, True)]
)
def test_pages_are_served_to_whose_guest_it_is_also_when_nobody_is_left(
    said: bytes, is_served: bool
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.send(said)
        assert is_wanted(theirs) is is_served


def test_nobody_is_served_before_it_is_said() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    with ours, theirs:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(is_wanted(theirs)))
        thread.start()
        assert ours.recv(1) == READY
        ours.send(YOURS)
        thread.join(0.2)
        assert not found
        ours.send(SERVE)
        thread.join(WAIT_S)
        assert found == [True]


#: Waits for its memory at a userfaultfd, which it sends.
GONE = """
import mmap, os, socket, sys
from engine import _native
memory = mmap.mmap(-1, 4096 * 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
uffd = _native.uffd_open(_native.UFFD_USER_MODE_ONLY, 0)
address = _native.mapping_address(memory)
_native.uffd_register(uffd, address, 4096 * 4, _native.UFFD_REGISTER_MISSING)
connection = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(connection, [b"%d" % address], [uffd])
"""


@pytest.mark.parametrize("holes", [False, True])
def test_a_vmm_that_has_gone_does_not_wait_for_ever(
    holes: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.enter_context(ours)
        with theirs:
            number = theirs.fileno()
            subprocess.run([sys.executable, "-c", GONE, str(number)], pass_fds=[number], check=True)
        address, uffds, _, _ = socket.recv_fds(ours, 100, 1)
        undo.callback(os.close, uffds[0])
        memfd = os.memfd_create("received", os.MFD_CLOEXEC)
        undo.callback(os.close, memfd)
        os.ftruncate(memfd, 4 * PAGE)
        if not holes:
            os.pwrite(memfd, b"x" * PAGE, 0)
        agent, server = socket.socketpair()
        with agent:
            agent.send(SERVE)
            region = msgspec.json.encode([Region(int(address), 4 * PAGE, 0)]).decode()
            main(server.detach(), memfd, uffds[0], region)

    assert capfd.readouterr().err == ""
