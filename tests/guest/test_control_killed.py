"""kill -9 of the control process in every state of its guest."""

from __future__ import annotations

import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from engine.errors import GuestError, UsageError
from engine.guest.base import Handover
from engine.guest.token import Kind
from tests.guest.support import (
    SECOND_NS,
    SESSION,
    adopted,
    ended_within,
    judged,
    peer,
    run,
    socket_of,
    stub,
    workload,
)
from tests.guest.support import writes_reach as reach
from tests.support import eventually


def test_a_running_guest_goes_on_unthrottled_untracked_and_can_be_adopted(rundir: Path) -> None:
    spec = f"workload:size=4M,rate=20M,vcpus=2,words=8,rundir={rundir},path={rundir}/ram"
    with stub(spec) as control:
        control.do(do="throttle", percent=99)
        control.do(do="track", name="guest-bitmap")
        control.kill()
        path = socket_of(control)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

        async def scenario() -> None:
            async with adopted(path) as guest:
                assert guest.pid == control.guest_pid
                assert guest.is_running
                assert guest.blocks[0].size == 4 << 20
                assert not os.path.exists(path)  # one control process at a time
                await reach(guest, (await guest.writes() or 0) + 2000)
                async with judged(guest) as judgement:
                    assert judgement.is_right

        run(scenario())
        assert ended_within(control.guest_pid)
        assert list(rundir.iterdir()) == []


def test_a_guest_that_was_stopped_for_the_migration_runs_again(rundir: Path) -> None:
    with stub(f"workload:size=1M,rundir={rundir}") as control:
        control.do(do="pause", for_migration=True)
        control.kill()

        async def scenario() -> None:
            async with adopted(socket_of(control)) as guest:
                assert guest.is_running
                await reach(guest, (await guest.writes() or 0) + 100)

        run(scenario())


def test_a_guest_that_the_user_stopped_stays_stopped(rundir: Path) -> None:
    with stub(f"workload:size=1M,rundir={rundir}") as control:
        control.do(do="pause", for_migration=False)
        control.do(do="pause", for_migration=True)
        writes = control.do(do="writes")
        control.kill()

        async def scenario() -> None:
            async with adopted(socket_of(control)) as guest:
                assert not guest.is_running
                assert await guest.writes() == writes
                await guest.resume(for_migration=False)
                await reach(guest, writes + 100)

        run(scenario())


@pytest.mark.parametrize("is_armed", [False, True])
def test_an_incoming_guest_ends_frees_and_the_source_is_refused(
    rundir: Path, is_armed: bool
) -> None:
    with stub(f"workload:size=1M,rundir={rundir},path={rundir}/ram", incoming=True) as control:
        endpoint = control.do(do="listen", uri=f"unix:{rundir}/token")
        if is_armed:
            control.do(do="arm", session=SESSION.hex(), run=True)

        async def scenario() -> None:
            async with workload("size=1M") as source:
                await source.connect_handover(endpoint, SESSION)
                await source.pause(for_migration=True)
                control.kill()

                if is_armed:
                    assert ended_within(control.guest_pid)
                assert await source.hand_over(20 * SECOND_NS) is Handover.REFUSED

                await source.resume(for_migration=True)

        run(scenario())
        assert ended_within(control.guest_pid)
        assert list(rundir.iterdir()) == []


def test_a_guest_that_has_taken_over_goes_on(rundir: Path) -> None:
    with stub(f"workload:size=1M,rundir={rundir}", incoming=True) as control:
        endpoint = control.do(do="listen", uri="tcp:127.0.0.1:0")
        control.do(do="arm", session=SESSION.hex(), run=True)

        async def scenario() -> None:
            async with workload("size=1M") as source:
                await source.connect_handover(endpoint, SESSION)
                await source.pause(for_migration=True)
                assert await source.hand_over(20 * SECOND_NS) is Handover.TAKEN
            control.kill()
            async with adopted(socket_of(control)) as guest:
                assert guest.is_running
                await reach(guest, 100)

        run(scenario())


def test_a_guest_that_was_handed_over_ends(rundir: Path) -> None:
    answers = {Kind.HELLO: Kind.WAITING, Kind.TAKE: Kind.TAKEN}
    with (
        stub(f"workload:size=1M,rundir={rundir},path={rundir}/ram") as control,
        peer(answers, threading.Event()) as endpoint,
    ):
        control.do(do="connect", endpoint=endpoint, session=SESSION.hex())
        control.do(do="pause", for_migration=True)
        assert control.do(do="hand_over", wait_ns=20 * SECOND_NS) == "taken"
        control.kill()

        assert ended_within(control.guest_pid)
        assert list(rundir.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "wait_ns", "expected"),
    [
        pytest.param(Kind.TAKEN, 20 * SECOND_NS, "ends", id="taken-ends"),
        pytest.param(Kind.VOID, 20 * SECOND_NS, "runs", id="void-runs-again"),
        pytest.param(None, 3 * SECOND_NS // 2, "stands", id="no-answer-stays-stopped"),
    ],
)
def test_a_guest_in_the_middle_of_a_handover_finishes_it_by_itself(
    rundir: Path, answer: Kind | None, wait_ns: int, expected: str
) -> None:
    asked = threading.Event()
    answers = {Kind.HELLO: Kind.WAITING, Kind.TAKE: None, Kind.ASK: answer}
    with (
        stub(f"workload:size=1M,rundir={rundir}") as control,
        peer(answers, asked) as endpoint,
    ):
        control.do(do="connect", endpoint=endpoint, session=SESSION.hex())
        control.do(do="pause", for_migration=True)
        control.order(do="hand_over", wait_ns=wait_ns)
        assert asked.wait(60)
        control.kill()

        if expected == "ends":
            assert ended_within(control.guest_pid)
            return

        async def scenario() -> None:
            async with adopted(socket_of(control)) as guest:
                assert guest.is_running is (expected == "runs")
                before = await guest.writes() or 0
                await guest.resume(
                    for_migration=False
                )  # for the unknown outcome this is the operator's word
                await reach(guest, before + 100)

        run(scenario())


def test_a_guest_that_is_being_filled_ends(rundir: Path) -> None:
    with stub(f"workload:size=2G,contents=text,rundir={rundir},path={rundir}/ram", wait=False) as (
        control
    ):
        ram = rundir / "ram"
        assert eventually(lambda: ram.exists() and ram.stat().st_blocks > 1000)
        control.kill()

        assert eventually(lambda: not ram.exists())


def test_an_orphan_is_orphaned_again_and_again_and_ends_on_sigterm(rundir: Path) -> None:
    with stub(f"workload:size=1M,rundir={rundir},path={rundir}/ram") as first:
        first.kill()
        path = socket_of(first)
        with stub(f"workload:socket={path}") as second:
            assert second.guest_pid == first.guest_pid
            second.kill()
            assert eventually(lambda: os.path.exists(path))
            os.kill(first.guest_pid, signal.SIGINT)  # Ctrl-C is not for it

            async def scenario() -> None:
                with pytest.raises(UsageError, match="cannot wait for a migration"):
                    async with workload(f"socket={path}", incoming=True):
                        raise AssertionError("adopted")

            run(scenario())
            os.kill(first.guest_pid, signal.SIGTERM)
            assert ended_within(first.guest_pid)
            assert list(rundir.iterdir()) == []


def test_adopting_nobody_is_refused_in_one_line(rundir: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(UsageError, match="no guest waits at"):
            async with workload(f"socket={rundir}/guest-1.sock"):
                raise AssertionError("adopted")

    run(scenario())


def test_a_run_directory_of_others_is_not_used(rundir: Path) -> None:
    open_to_all = rundir / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with stub(f"workload:size=1M,rundir={open_to_all}") as control:
        control.kill()

        assert "nobody can adopt it" in control.line_of_guest()
        assert list(open_to_all.iterdir()) == []


def test_a_dead_guest_cannot_be_asked(rundir: Path) -> None:
    async def scenario() -> None:
        async with workload(f"size=1M,rundir={rundir}") as guest:
            os.kill(guest.pid, signal.SIGTERM)
            assert "ended" in await guest.died()
            with pytest.raises(GuestError, match="dead"):
                await guest.pause(for_migration=True)

    run(scenario())
