"""A VMM's machine at the other end of its connection, without an agent: this process is both."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from engine import _native
from engine.errors import MemoryRefused
from engine.guest.datagrams import close_all
from engine.guest.handoff_door import Visitor
from engine.guest.handoff_machine import STATE, HandoffMachine
from engine.guest.mappings import flags_of
from tests.support import WAIT_S
from tests.vmm.test_handoff_liars import SEALABLE, SIZE, Vmm

pytestmark = [pytest.mark.process]
ROOT: Final = Path(__file__).parents[2]

#: What a VMM does with an order and the descriptors beside it; what it answers besides.
Obey = Callable[[dict[str, Any], list[int]], dict[str, Any]]


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with ExitStack() as undo:
        made = Vmm(undo)
        made.hello["running"] = False
        made.add()
        yield made


def stand(_order: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
    return {}


@contextlib.contextmanager
def welcomed(vmm: Vmm, obey: Obey = stand, *, incoming: bool = False) -> Iterator[HandoffMachine]:
    """It stands, and a thread of its own answers for it."""
    ours, theirs = socket.socketpair()
    visitor = Visitor(ours, os.getpid(), vmm.line(), [os.dup(fd) for fd in vmm.fds])
    thread = threading.Thread(target=_answer, args=(theirs, obey))
    with theirs:
        try:
            machine = HandoffMachine(visitor, incoming=incoming, on_end=lambda: None)
        except BaseException:
            visitor.close()
            raise
        thread.start()
        try:
            yield machine
        finally:
            machine.close()
            thread.join()


def _answer(connection: socket.socket, obey: Obey) -> None:
    buffer = b""
    while True:
        piece, fds, _, _ = socket.recv_fds(connection, 4096, 4)
        if not piece:
            return
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "id" in order:
                said = {"id": order["id"], "running": False, **obey(order, fds)}
                with contextlib.suppress(ConnectionError):
                    connection.sendall(json.dumps(said).encode() + b"\n")
        close_all(fds)


def test_a_state_that_is_written_and_read_at_the_file_position_arrives(vmm: Vmm) -> None:
    """Descriptors that are sent share their position with ours."""
    content, found = b"registers" * 1000, bytearray()

    def obey(order: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if order["execute"] == "save":
            return {"size": os.write(fds[0], content)}
        if order["execute"] == "load":
            found.extend(os.read(fds[0], order["size"]))
        return {}

    vmm.hello["state"] = True
    with welcomed(vmm, obey) as machine:
        state, size = machine.save()
        try:
            assert os.pread(state, size + 1, 0) == STATE + content
            machine.load(state, size)
        finally:
            os.close(state)

    assert bytes(found) == content


# -- memory that is another than at the hello ----------------------------------------------------


def fork_later(vmm: Vmm) -> None:
    vmm.memory[0].madvise(mmap.MADV_DOFORK)


def map_again(vmm: Vmm) -> None:
    vmm.undo.callback(mmap.mmap(vmm.fds[0], SIZE).close)


def share(vmm: Vmm) -> None:
    """Another process maps it, until the test ends."""
    program = (
        f"import mmap,sys; m = mmap.mmap({vmm.fds[0]}, {SIZE}); print(1, flush=True); "
        "sys.stdin.read()"
    )
    other = vmm.undo.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[vmm.fds[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (fork_later, r"madvise\(MADV_DONTFORK\) for that memory"),
        (map_again, "does not map|more than once"),
        (share, "other processes map the memory"),
    ],
)
def test_memory_that_others_would_write_is_not_tracked(
    vmm: Vmm, change: Callable[[Vmm], None], says: str
) -> None:
    with welcomed(vmm) as machine:
        machine.start_tracking(None)  # as at the hello
        change(vmm)

        with pytest.raises(MemoryRefused, match=says):
            machine.start_tracking(None)
        assert not flags_in(vmm) & {"uw", "um"}


def flags_in(vmm: Vmm) -> set[str]:
    """Of all mappings of the first region."""
    address = _native.mapping_address(vmm.memory[0])
    return set().union(*flags_of(os.getpid(), [(address, SIZE)]))


def test_missing_pages_are_waited_for_and_given_up(vmm: Vmm) -> None:
    with welcomed(vmm, incoming=True) as machine:
        uffds = machine.open_missing()
        assert "um" in flags_in(vmm)
        machine.end_missing()
        close_all(uffds)

        assert "um" not in flags_in(vmm)


#: Maps memory at ADDRESS, and sends a userfaultfd of its own.
STRANGER: Final = """
import socket, sys
from tests.vmm.test_handoff_liars import raw_userfaultfd
from tests.vmm.test_handoff_machine import map_at
connection = socket.socket(fileno=int(sys.argv[1]))
map_at(int(sys.argv[2]), int(sys.argv[3]))
socket.send_fds(connection, [b"!"], [raw_userfaultfd()])
connection.recv(1)
"""
PLACE: Final = 1 << 44  #: where no process has anything
FIXED_NOREPLACE: Final = 0x100000


def map_at(address: int, memfd: int) -> None:
    """For as long as the process lives, or somebody unmaps it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_SHARED | FIXED_NOREPLACE
    assert libc.mmap(address, SIZE, rights, flags, memfd, 0) == address
    assert libc.madvise(ctypes.c_void_p(address), SIZE, mmap.MADV_DONTFORK) == 0


@pytest.fixture
def stranger(vmm: Vmm) -> None:
    """The VMM sends a userfaultfd of another process, which has memory at the same place."""
    memfd, theirs = os.memfd_create("guest", SEALABLE), os.memfd_create("stranger")
    for each in (memfd, theirs):
        vmm.undo.callback(os.close, each)
        os.ftruncate(each, SIZE)
    map_at(PLACE, memfd)
    vmm.undo.callback(ctypes.CDLL(None).munmap, ctypes.c_void_p(PLACE), SIZE)
    ours, end = socket.socketpair()
    vmm.undo.enter_context(ours)
    with end:
        passed = [end.fileno(), theirs]
        arguments = [str(end.fileno()), str(PLACE), str(theirs)]
        process = subprocess.Popen(
            [sys.executable, "-c", STRANGER, *arguments], pass_fds=passed, cwd=ROOT
        )
    vmm.undo.callback(process.wait)
    vmm.undo.callback(process.kill)
    ours.settimeout(WAIT_S)
    _, uffds, _, _ = socket.recv_fds(ours, 1, 1)
    vmm.undo.callback(close_all, uffds)
    vmm.regions[0]["base_host_virt_addr"] = PLACE
    vmm.fds = [memfd, *uffds]


@pytest.mark.usefixtures("stranger")
def test_a_userfaultfd_of_another_process_makes_nobody_wait(vmm: Vmm) -> None:
    with welcomed(vmm, incoming=True) as machine:
        with pytest.raises(MemoryRefused, match="they must be its own"):
            machine.open_missing()
        with pytest.raises(MemoryRefused, match="tracking process"):
            machine.start_tracking(None)
