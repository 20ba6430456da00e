"""What the agent of a VMM by handoff, and control, do where one of them or the VMM goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import GuestError
from engine.guest import datagrams, handoff_agent, messages
from engine.guest.base import Role
from engine.guest.foreignguest import ForeignGuest
from engine.guest.handoff_agent import HandoffAgent
from engine.guest.handoff_machine import HandoffMachine
from engine.guest.handoff_plain import PlainMachine
from tests.guest.support import run
from tests.support import WAIT_S
from tests.vmm.test_foreign_agent import Broken, agent_of
from tests.vmm.test_handoff_liars import Vmm, attaching, hear, path, raw_userfaultfd, say, vmm

pytestmark = pytest.mark.process
__all__ = ["path", "vmm"]


class Obedient:
    """A VMM behind its hello: it does what it is told, but answers no `pause` for good, if deaf."""

    def __init__(self, connection: socket.socket, *, runs: bool, deaf: bool) -> None:
        self._connection, self.runs, self._deaf = connection, runs, deaf
        self.heard: list[str] = []
        self.is_told_for_good = asyncio.Event()

    async def obey(self) -> None:
        while True:
            for line in (await hear(self._connection)).splitlines():
                order = json.loads(line)
                self.heard.append(order["execute"])
                if order["execute"] in ("pause", "resume"):
                    self.runs = order["execute"] == "resume"
                if order.get("until") == "resume":
                    self.is_told_for_good.set()
                    if self._deaf:
                        continue
                reply = {"id": order["id"], "running": self.runs}
                self._connection.send(json.dumps(reply).encode() + b"\n")


@contextlib.asynccontextmanager
async def obeying(
    path: Path, made: Vmm, *, incoming: bool = False, deaf: bool = False
) -> AsyncIterator[tuple[ForeignGuest, Obedient, socket.socket]]:
    """What control has, the VMM, and the VMM's end of the connection."""
    made.hello["running"] = not incoming
    async with attaching(path, incoming) as task:
        connection, _ = await say(path, made.line(), made.fds)
        with connection:
            guest, served = await task, Obedient(connection, runs=not incoming, deaf=deaf)
            obeying = asyncio.create_task(served.obey())
            try:
                yield guest, served, connection
            finally:
                obeying.cancel()
                await asyncio.gather(obeying, return_exceptions=True)


def test_a_vmm_runs_when_its_agent_is_killed_as_it_tells_it_to_stand_for_good(
    path: Path, vmm: Vmm
) -> None:
    """The end of its connection would leave it standing, and nobody else has it."""

    async def scenario() -> None:
        async with obeying(path, vmm, deaf=True) as (guest, served, _):
            watching = asyncio.create_task(guest.died())
            await guest.pause(for_migration=True)
            giving = asyncio.create_task(guest.give_away())
            await served.is_told_for_good.wait()
            os.kill(guest.agent_pid, signal.SIGKILL)
            with pytest.raises(GuestError, match="was killed by SIGKILL"):
                await giving
            await watching
            assert not served.runs
            await guest.settle(taken=False)
            assert served.runs

    run(scenario())


def test_a_vmm_sees_the_end_of_its_connection_when_its_agent_is_killed(
    path: Path, vmm: Vmm
) -> None:
    """Control has a copy, and no reason to keep it."""

    async def scenario() -> None:
        async with obeying(path, vmm) as (guest, served, connection):
            await guest.pause(for_migration=False)
            os.kill(guest.agent_pid, signal.SIGKILL)
            await guest.died()
            async with asyncio.timeout(WAIT_S):
                while not is_over(connection):
                    await asyncio.sleep(0.01)
            assert not served.runs

    def is_over(connection: socket.socket) -> bool:
        with contextlib.suppress(BlockingIOError):
            return connection.recv(1, socket.MSG_PEEK) == b""
        return False

    run(scenario())


def test_nothing_stays_of_a_destination_whose_vmm_dies_as_its_pages_become_missing(
    path: Path, vmm: Vmm, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with obeying(path, vmm, incoming=True) as (guest, served, connection):
            await guest.open_missing()
            assert served.heard[-1] == "hold"
            connection.close()
            assert "ended" in await guest.died()
            assert not path.exists()

    run(scenario())

    said = capfd.readouterr().err
    assert "has ended its connection" in said
    assert "Traceback" not in said


def test_a_vmm_that_hangs_up_behind_its_welcome_is_followed_by_another(
    path: Path, vmm: Vmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's end is heard before it is known as the one that is served."""
    visits: list[Any] = []

    def admit(visitor: Any, *, incoming: bool, on_end: Any) -> HandoffMachine:
        ended = threading.Event()

        def note() -> None:
            on_end()
            ended.set()

        machine = HandoffMachine(visitor, incoming=incoming, on_end=note)
        visits.append(visitor)
        if len(visits) == 1:
            visitor.connection.shutdown(socket.SHUT_RDWR)  # to us the same
            assert ended.wait(WAIT_S)
        return machine

    async def scenario() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        agent = HandoffAgent(theirs)
        running = asyncio.ensure_future(agent.run())
        request = messages.StartHandoff(1, str(path), False, str(path.parent))
        starting = asyncio.create_task(agent._start_handoff(request, []))
        with ours, contextlib.ExitStack() as connections:
            for made in (vmm, again):
                connection, answer = await say(path, made.line(), made.fds)
                connections.enter_context(connection)
                assert "welcome" in answer
            async with asyncio.timeout(WAIT_S):
                started = await starting
            assert isinstance(started.answer, messages.ForeignStarted)
            assert not running.done()
            agent._end.set()
            await running

    again = Vmm(vmm.undo, [vmm.fds[0], raw_userfaultfd()], vmm.regions)
    vmm.undo.callback(os.close, again.fds[1])
    monkeypatch.setattr(handoff_agent, "HandoffMachine", admit)
    run(scenario())


class Stub(Broken):
    """A VMM that takes no order but one to stay."""

    kind = "handoff"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[bool] = []

    def stay(self, stays: bool) -> None:
        self.told.append(stays)

    def arrive(self) -> None:
        raise GuestError("it hangs")

    def pause(self) -> int:
        raise GuestError("never")


def test_a_guest_that_arrives_and_stands_is_told_though_its_vmm_has_gone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def scenario() -> messages.Answer:
        async with agent_of(Stub(), Role.INCOMING, HandoffAgent) as (agent, control):
            agent._run_when_taken = False
            agent._taken()
            return messages.answer_decoder().decode(datagrams.receive(control)[0])

    assert isinstance(run(scenario()), messages.Taken)
    assert "the guest is here, and was not told so: it hangs" in capfd.readouterr().err


def test_a_vmm_that_runs_again_is_not_told_how_to_stand() -> None:
    """What it was to be told when it stood waits until the order to run is done."""

    async def scenario() -> list[bool]:
        stub = Stub()
        async with agent_of(stub, Role.OWNER, HandoffAgent) as (agent, _):
            async with agent._one_at_a_time:
                keeping = asyncio.create_task(agent._keep())
                await asyncio.sleep(0)
                stub.is_running = True
            await keeping
            return stub.told

    assert run(scenario()) == []


def test_what_was_opened_for_a_control_process_that_has_gone_is_ended() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    opened: list[int] = []

    class Slow(Stub):
        def open_missing(self) -> list[int]:
            begun.set()
            assert may_end.wait(WAIT_S)
            opened.append(os.dup(0))
            return list(opened)

        def end_missing(self) -> None:
            ended.set()

    async def scenario() -> None:
        async with agent_of(Slow(), Role.INCOMING, HandoffAgent) as (agent, control):
            datagrams.send(control, messages.OpenMissing(1))
            await asyncio.to_thread(begun.wait, WAIT_S)
            control.close()
            await agent._end.wait()
            may_end.set()

    run(scenario())

    assert ended.is_set()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_who_takes_no_orders_is_not_said_to_be_stopped() -> None:
    class Runs(Stub):
        kind, is_running = PlainMachine.kind, True

        def looks_running(self) -> bool:
            return True

        def resume(self) -> None:
            """It runs."""

    async def scenario() -> None:
        async with agent_of(Runs(), Role.OWNER, HandoffAgent) as (agent, _):
            agent._standing.by_user = False
            with pytest.raises(GuestError, match="never"):
                await agent._pause(messages.Pause(1, False), [])
            assert not agent._standing.by_user

    run(scenario())
