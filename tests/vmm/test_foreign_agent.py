"""What the agent of a process that knows nothing of us does where that process fails it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.errors import GuestError, MemoryRefused, NotHandedOver
from engine.guest import datagrams, foreign_agent, messages
from engine.guest.base import Role
from engine.guest.foreign_agent import ForeignAgent
from engine.guest.sharers import family_of
from engine.memory.tracking import TrackerName
from tests.guest.support import run

pytestmark = pytest.mark.process


class Broken:
    """A process that answers nothing, and has nothing to be given back."""

    kind, qmp_path, what = "process", "", "process 1"
    pid = 1
    is_running = False

    def __init__(self) -> None:
        self.blocks: list[Any] = []

    def looks_running(self) -> bool:
        raise GuestError("it hangs")

    def resume(self) -> None:
        raise GuestError("it hangs")

    def count_vcpus(self) -> int:
        return 0

    def confirm(self) -> None:
        """Nothing was ordered."""

    end = close = check_all_wait = confirm


@contextlib.asynccontextmanager
async def agent_of(
    process: Broken, role: Role, kind: type[ForeignAgent] = ForeignAgent
) -> AsyncIterator[tuple[Any, socket.socket]]:
    """An agent that runs in this process, and control's end of its connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent = kind(theirs)
    agent._foreign, agent.role = process, role  # type: ignore[assignment]
    task = asyncio.ensure_future(agent.run())
    with ours:
        await asyncio.sleep(0)  # it serves
        try:
            yield agent, ours
        finally:
            agent._end.set()
            await task


def test_a_guest_that_may_run_is_not_handed_over() -> None:
    async def scenario() -> None:
        async with agent_of(Broken(), Role.OWNER) as (agent, _):
            with pytest.raises(NotHandedOver, match="nobody can say whether the guest stands"):
                await agent._hand_over(messages.HandOver(1, 1), [])
            assert agent.role is Role.OWNER

    run(scenario())


def test_a_token_that_has_come_is_told_though_the_process_does_not_go_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def scenario() -> messages.Answer:
        async with agent_of(Broken(), Role.INCOMING) as (agent, control):
            agent._run_when_taken = True
            agent._taken()
            assert agent.role is Role.OWNER
            return messages.answer_decoder().decode(datagrams.receive(control)[0])

    assert isinstance(run(scenario()), messages.Taken)
    assert "the guest is here and stands: it hangs" in capfd.readouterr().err


def test_what_was_opened_for_a_control_process_that_has_gone_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes while a thread of the agent has the process open its userfaultfds."""
    begun, may_end = threading.Event(), threading.Event()
    ended: list[int] = []

    def open_slowly(*_: object) -> list[int]:
        begun.set()
        assert may_end.wait(10)
        return [os.dup(0)]

    def note(_pid: int, uffds: list[int], _ranges: object) -> None:
        ended.extend(uffds)

    async def scenario() -> None:
        async with agent_of(Broken(), Role.INCOMING) as (agent, control):
            datagrams.send(control, messages.OpenMissing(1))
            await asyncio.to_thread(begun.wait, 10)
            control.close()
            await agent._end.wait()
            may_end.set()

    monkeypatch.setattr(foreign_agent, "open_foreign_missing", open_slowly)
    monkeypatch.setattr(foreign_agent, "end_missing", note)
    run(scenario())

    assert len(ended) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ended[0])


def test_forks_do_not_wait_for_a_tracker_whose_successor_is_refused() -> None:
    """Nobody hears of them any more when another tracker is asked for."""
    done: list[str] = []

    class Refusing(Broken):
        def stop_tracking(self) -> None:
            done.append("stop")

        def start_tracking(self, _wanted: TrackerName | None) -> None:
            done.append("start")
            raise MemoryRefused("not that one")

    async def scenario() -> None:
        async with agent_of(Refusing(), Role.OWNER) as (agent, _):
            with pytest.raises(MemoryRefused, match="not that one"):
                await agent._start_tracking(messages.StartTracking(1, "soft-dirty"), [])

    run(scenario())

    assert done == ["stop", "start"]


def test_children_are_found_though_a_thread_ends_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_one_that_ended(path: str) -> list[str]:
        return ["0", *listed(path)]

    listed = os.listdir
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr(os, "listdir", with_one_that_ended)
        found = family_of(os.getpid())
        child.kill()

    assert {os.getpid(), child.pid} <= found
    assert family_of(child.pid) == frozenset()


def test_who_gives_pages_up_that_are_being_given_up_waits_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the first who wanted it does not wait any more: the descriptors stay open."""
    begun, may_end = threading.Event(), threading.Event()
    seen: list[int] = []

    def end_missing(_pid: int, uffds: list[int], _ranges: object) -> None:
        begun.set()
        assert may_end.wait(60)
        seen.extend(os.fstat(uffd).st_ino for uffd in uffds)

    async def scenario() -> None:
        async with agent_of(Broken(), Role.OWNER) as (agent, _):
            agent._missing = [os.memfd_create("stands for a userfaultfd")]
            inode = os.fstat(agent._missing[0]).st_ino
            first = asyncio.ensure_future(agent._close_missing(messages.CloseMissing(1), []))
            await asyncio.to_thread(begun.wait, 60)
            first.cancel()
            second = asyncio.ensure_future(agent._close_missing(messages.CloseMissing(2), []))
            assert not (await asyncio.wait({second}, timeout=0.2))[0]
            may_end.set()
            await second
            assert seen == [inode]

    monkeypatch.setattr(foreign_agent, "end_missing", end_missing)
    run(scenario())
