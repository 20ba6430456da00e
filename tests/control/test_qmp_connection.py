"""A client's socket: descriptors that come with the bytes, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.control.qmp import listener as listener_module
from engine.control.qmp.connection import Connection
from engine.control.qmp.monitor import RECEIVED_MAX, Monitor, current_monitor
from engine.control.qmp.registry import CommandRegistry
from tests.control.qmp_rig import Gate, reached, registry, serving


class Keeper:
    """Commands that look at their client's monitor."""

    def __init__(self) -> None:
        self.monitors: list[Monitor] = []
        self.gate = Gate()

    async def count(self, _: object) -> int:
        monitor = current_monitor.get()
        assert monitor is not None
        if monitor not in self.monitors:
            self.monitors.append(monitor)
        return len(monitor.received)

    async def take_late(self, _: object) -> None:
        monitor = current_monitor.get()
        assert monitor is not None
        await self.gate.pass_through(None)
        monitor.named["late"] = monitor.received.popleft()

    def registry(self) -> CommandRegistry:
        commands = registry()
        commands.add("count", self.count, oob=True)
        commands.add("take-late", self.take_late)
        return commands


class RawClient:
    """A blocking client that can send descriptors; used from a thread."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.line()
        assert self.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}

    def line(self) -> Any:
        return json.loads(self._lines.readline())

    def ask(self, request: bytes, *descriptors: int) -> Any:
        socket.send_fds(self.socket, [request], descriptors)
        return self.line()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


@contextlib.contextmanager
def pipes(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Reading ends and writing ends; the writing ends are closed by whoever was given them."""
    ends = [os.pipe() for _ in range(count)]
    try:
        yield [reading for reading, _ in ends], [writing for _, writing in ends]
    finally:
        for reading, _ in ends:
            os.close(reading)


def give(client: RawClient, request: bytes, descriptors: list[int]) -> Any:
    """Send descriptors, and keep none."""
    answer = client.ask(request, *descriptors)
    for fd in descriptors:
        os.close(fd)
    return answer


def are_closed(readings: list[int]) -> bool:
    """Whether nobody holds the other ends any more."""
    for reading in readings:
        os.set_blocking(reading, False)
    with contextlib.suppress(BlockingIOError):
        return all(os.read(reading, 1) == b"" for reading in readings)
    return False


COUNT = b'{"execute":"count"}'


@pytest.mark.parametrize(("sent", "kept"), [(1, 1), (3, 3), (RECEIVED_MAX, RECEIVED_MAX), (40, 16)])
def test_descriptors_come_with_the_bytes_close_on_exec_and_are_closed_with_the_client(
    tmp_path: Path, sent: int, kept: int
) -> None:
    async def scenario(readings: list[int], writings: list[int]) -> tuple[int, bool]:
        keeper = Keeper()
        async with serving(tmp_path / "qmp", keeper.registry()) as server:
            one = await asyncio.to_thread(RawClient, tmp_path / "qmp")
            answer = await asyncio.to_thread(give, one, COUNT, writings)
            (monitor,) = keeper.monitors
            assert not any(os.get_inheritable(fd) for fd in monitor.received)
            assert are_closed(readings[:1]) is False
            one.close()
            await reached(lambda: not server._sessions)
            return answer["return"], are_closed(readings)

    with pipes(sent) as (readings, writings):
        assert asyncio.run(scenario(readings, writings)) == (kept, True)


def test_descriptors_that_nobody_took_are_closed_when_others_come(tmp_path: Path) -> None:
    async def scenario(readings: list[int], writings: list[int]) -> tuple[list[Any], list[bool]]:
        keeper = Keeper()
        async with serving(tmp_path / "qmp", keeper.registry()):
            one = await asyncio.to_thread(RawClient, tmp_path / "qmp")
            answers = [
                await asyncio.to_thread(give, one, COUNT, writings[:2]),
                await asyncio.to_thread(give, one, COUNT, writings[2:]),
            ]
            closed = [are_closed([reading]) for reading in readings]
            one.close()
            return [answer["return"] for answer in answers], closed

    with pipes(3) as (readings, writings):
        assert asyncio.run(scenario(readings, writings)) == ([2, 1], [True, True, False])


def test_descriptors_wait_for_the_commands_that_came_before_them(tmp_path: Path) -> None:
    async def scenario(readings: list[int], writings: list[int]) -> tuple[list[Any], bool]:
        keeper = Keeper()
        async with serving(tmp_path / "qmp", keeper.registry()):
            one = await asyncio.to_thread(RawClient, tmp_path / "qmp")
            for request, fd in zip((b'{"execute":"take-late"}', COUNT), writings, strict=True):
                socket.send_fds(one.socket, [request], [fd])
                os.close(fd)
            async with asyncio.timeout(60):
                await keeper.gate.begun.acquire()
            for _ in range(100):  # what could come now, would
                await asyncio.sleep(0)
            keeper.gate.may_end.set()
            answers = [await asyncio.to_thread(one.line) for _ in range(2)]
            are_both_open = not are_closed(readings[:1]) and not are_closed(readings[1:])
            one.close()
            return answers, are_both_open

    with pipes(2) as (readings, writings):
        answers, are_both_open = asyncio.run(scenario(readings, writings))
    assert answers == [{"return": {}}, {"return": 1}]
    assert are_both_open


def test_each_client_has_its_own_descriptors_and_its_commands_see_them_alone(
    tmp_path: Path,
) -> None:
    async def scenario(writings: list[int]) -> list[Any]:
        keeper = Keeper()
        async with serving(tmp_path / "qmp", keeper.registry()):
            one = await asyncio.to_thread(RawClient, tmp_path / "qmp")
            other = await asyncio.to_thread(RawClient, tmp_path / "qmp")
            got = [await asyncio.to_thread(give, one, COUNT, writings)]
            got.append(await asyncio.to_thread(other.ask, COUNT))
            got.append(await asyncio.to_thread(one.ask, COUNT))
            assert current_monitor.get() is None
            one.close()
            other.close()
            return [answer["return"] for answer in got]

    with pipes(2) as (_, writings):
        assert asyncio.run(scenario(writings)) == [2, 0, 2]


def test_what_a_command_still_names_when_its_client_is_gone_is_closed_when_it_ends(
    tmp_path: Path,
) -> None:
    async def scenario(readings: list[int], writings: list[int]) -> tuple[bool, bool]:
        keeper = Keeper()
        async with serving(tmp_path / "qmp", keeper.registry()) as server:
            one = await asyncio.to_thread(RawClient, tmp_path / "qmp")
            socket.send_fds(one.socket, [b'{"execute":"take-late"}'], writings)
            for fd in writings:
                os.close(fd)
            async with asyncio.timeout(60):
                await keeper.gate.begun.acquire()
            one.close()
            await reached(lambda: not server._sessions)
            before = are_closed(readings)
            keeper.gate.may_end.set()
            await reached(lambda: are_closed(readings))
            return before, are_closed(readings)

    with pipes(1) as (readings, writings):
        assert asyncio.run(scenario(readings, writings)) == (False, True)


def test_a_client_that_never_pauses_leaves_the_others_their_turn() -> None:
    async def scenario() -> tuple[int, int]:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.closing(Connection(ours)) as connection:
            theirs.setblocking(False)
            sent = theirs.send(b" " * 1_000_000)
            turns: list[None] = []
            received = ours_count = 0
            while received < sent:
                asyncio.get_running_loop().call_soon(turns.append, None)
                received += len(await connection.receive(lambda data: data) or b"")
                ours_count += 1
            return len(turns), ours_count

    turns, ours_count = asyncio.run(scenario())
    assert turns == ours_count > 10


def test_a_listener_without_descriptors_pauses_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener_module, "PAUSE_S", 0.0)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def scenario() -> bytes:
        async with serving(tmp_path / "qmp"):
            with socket.socket(socket.AF_UNIX) as one:
                one.setblocking(False)
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, usual[1]))
                try:
                    one.connect(str(tmp_path / "qmp"))
                    await reached(lambda: len(caplog.messages) > 1)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, usual)
                async with asyncio.timeout(60):
                    return await asyncio.get_running_loop().sock_recv(one, 100)

    assert asyncio.run(scenario()).startswith(b'{"QMP"')
    assert set(caplog.messages) == {"a monitor cannot accept a client: Too many open files"}
