"""A VMM's machine at the other end of its connection, without an agent: this process is both."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from engine.guest.handoff_door import Visitor
from engine.guest.handoff_machine import STATE, HandoffMachine
from engine.guest.messages import close_all
from tests.vmm.test_handoff_liars import Vmm

pytestmark = [pytest.mark.process]

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
