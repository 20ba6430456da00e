"""Postcopy's second misfortunes: what is lost while it is recovered, who ends, who asks twice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

import engine
from engine import wire
from engine.control.pool import REPORT_WAIT_S
from engine.control.status import Status
from engine.errors import UsageError
from tests.kernel import has_userfaultfd
from tests.survival.postcopy_rig import (
    DEADLINE_S,
    EVERYTHING,
    HANDOVER,
    MAIN,
    PAUSED,
    SIDES,
    Duel,
    duel,
    instant_count,
)
from tests.survival.proxy import LISTEN, Hold
from tests.survival.rig import is_right, is_running, is_still, kill
from tests.survival.test_kills_postcopy import LOST, SELF_HEALING, TAKE, TAKEN, lose

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]

#: Generous: others may use the machine too.
END_S = 40.0


@contextlib.asynccontextmanager
async def paused(directory: Path) -> AsyncIterator[Duel]:
    """In postcopy, and cut off."""
    async with duel(directory) as both:
        await both.in_postcopy()
        await both.missing_at_most(0.8)
        both.cut(EVERYTHING)
        await both.pause_known()
        yield both


async def finish(both: Duel) -> None:
    with contextlib.suppress(engine.MigrationError):
        await both.hurry()
    assert await both.settle() == "destination", both.story
    await both.check("destination")


#: What is held back when something is struck: each message of a recovery.
STEPS = {"asked": b"Resume", "answered": b"Resumed", "told": b"GoOn", "agreed": b"GoesOn"}
RECOVERIES = [(kind, step) for kind in (*SELF_HEALING, *LOST) for step in STEPS]
if instant_count(0) < len(RECOVERIES):
    RECOVERIES = random.Random("recoveries").sample(RECOVERIES, 10)


async def strike(both: Duel, kind: str, dice: random.Random) -> None:
    """What is not there yet cannot be struck."""
    if kind in LOST:
        for name in ("source", "destination"):
            if kind in (f"{name}-control", "both-controls"):
                await lose(both, f"{name}-control")
        if kind == "everything-cut":
            both.cut(EVERYTHING)
        return
    what = dice.choice(SELF_HEALING[kind])
    if isinstance(what, int):
        both.cut([what])
    elif (pid := (await both.workers()).get(what)) is not None:
        kill(psutil.Process(pid))


@pytest.mark.parametrize(("kind", "step"), RECOVERIES)
def test_what_is_struck_in_a_recovery_is_recovered_by_the_next(
    tmp_path: Path, kind: str, step: str
) -> None:
    async def scenario() -> None:
        async with paused(tmp_path) as both:
            hold = both.between.hold(both.base + MAIN, STEPS[step])
            await both.recover()
            await hold.reached.wait()
            await strike(both, kind, random.Random(f"{kind} {step}"))
            hold.released.set()
            await finish(both)

    asyncio.run(scenario())


def test_pauses_from_both_sides_without_end_lose_nothing(tmp_path: Path) -> None:
    async def pause(control: engine.Control) -> None:
        for _ in range(5):
            with contextlib.suppress(UsageError):  # it is paused, or not there yet
                await control.execute("migrate-pause")

    async def scenario() -> None:
        async with duel(tmp_path) as both:
            await both.in_postcopy()
            for _ in range(5):
                pauses = [pause(control) for control in (*both.lives.values(),) * 3]
                await asyncio.gather(*pauses)
                await both.repair()
            await both.hurry()
            assert await both.settle() == "destination"
            assert both.seen.count(f"{PAUSED}/{PAUSED}") == 0  # no pause of before came later
            await both.check("destination")

    asyncio.run(scenario())


def test_pauses_in_a_recovery_lose_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with paused(tmp_path) as both:
            for _ in range(3):
                hold = both.between.hold(both.base + MAIN, b"GoOn")
                await both.recover()
                await hold.reached.wait()
                for control in both.lives.values():
                    await control.execute("migrate-pause")
                hold.released.set()
                await both.pause_known()
            await finish(both)

    asyncio.run(scenario())


def test_a_pause_comes_at_once_where_a_recovery_waits_for_a_service_that_hangs(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with paused(tmp_path) as both:
            psutil.Process((await both.workers())["fault-service"]).suspend()
            await both.recover()
            await both.until("destination", Status.POSTCOPY_RECOVER)
            async with asyncio.timeout(REPORT_WAIT_S / 2):
                await both.destination.execute("migrate-pause")
                await both.pause_known()
            await finish(both)

    asyncio.run(scenario())


def test_a_destination_asked_twice_waits_at_the_second_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with paused(tmp_path) as both:
            await both.destination.recover("tcp:127.0.0.1:0")
            first = await both.destination.address()
            with pytest.raises(UsageError, match="Failed to listen"):
                await both.destination.recover("tcp:192.0.2.1:1")
            await both.recover()
            await both.until("source", Status.POSTCOPY_ACTIVE)
            with pytest.raises(UsageError, match="when postcopy is paused"):
                await both.destination.recover(first)
            with pytest.raises(UsageError, match="no paused migration"):
                await both.source.execute("migrate", uri=first, resume=True)
            await finish(both)

    asyncio.run(scenario())


def test_a_source_at_the_wrong_destination_is_refused_and_may_try_again(tmp_path: Path) -> None:
    async def scenario() -> str:
        async with (
            engine.Control.start("workload:size=16M,fill=off", "tcp:127.0.0.1:0") as wrong,
            paused(tmp_path) as both,
        ):
            uri = await wrong.address()
            await both.source.execute("migrate", uri=uri, resume=True)
            while "refused" not in (info := await both.info("source")).get("error-desc", ""):
                await asyncio.sleep(0.01)
            assert await wrong.address() == uri
            await both.until("source", Status.POSTCOPY_PAUSED)
            await finish(both)
            return str(info["error-desc"])

    assert "where none is paused" in asyncio.run(scenario())


# -- the end of a side -----------------------------------------------------------------------------


@contextlib.contextmanager
def nobody_answers() -> Iterator[str]:
    """Where a connection is neither made nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def in_state(directory: Path, state: str) -> AsyncIterator[Duel]:
    """Source and destination in a status of postcopy, as far as that side can be in it."""
    async with contextlib.AsyncExitStack() as stack:
        if state == "postcopy-active":
            both = await stack.enter_async_context(duel(directory))
            await both.in_postcopy()
        else:
            both = await stack.enter_async_context(paused(directory))
        if state == "postcopy-recover-setup":
            uri = stack.enter_context(nobody_answers())
            await both.destination.recover("tcp:127.0.0.1:0")
            await both.source.execute("migrate", uri=uri, resume=True)
            await both.until("source", Status.POSTCOPY_RECOVER_SETUP)
        hold: Hold | None = None
        if state == "postcopy-recover":
            hold = both.between.hold(both.base + MAIN, b"GoOn")
            await both.recover()
            await hold.reached.wait()
            for side in SIDES:
                assert await both.status(side) == state
        yield both


STATES = ["postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("who", SIDES)
def test_a_side_that_is_told_to_quit_ends_soon_and_the_other_too(
    tmp_path: Path, who: str, state: str
) -> None:
    async def scenario() -> float:
        async with in_state(tmp_path, state) as both:
            other = SIDES[1 - SIDES.index(who)]
            began = time.monotonic()
            await both.lives[who].execute("quit")
            assert await both.lives[who].wait() == 0
            took = time.monotonic() - began
            both.between.release()  # or its end is held back as well
            await both.until(other, Status.POSTCOPY_PAUSED)
            await both.lives[other].execute("quit")
            assert await both.lives[other].wait() == 0
            return took

    assert asyncio.run(scenario()) < END_S


def test_ctrl_c_ends_both_sides(tmp_path: Path) -> None:
    async def scenario() -> list[int]:
        async with in_state(tmp_path, "postcopy-active") as both, asyncio.timeout(END_S):
            for control in both.lives.values():
                psutil.Process(control.pid).send_signal(signal.SIGINT)
            return [await control.wait() for control in both.lives.values()]

    assert asyncio.run(scenario()) == [128 + signal.SIGINT] * 2


@pytest.mark.parametrize("state", ["postcopy-active", "postcopy-paused"])
def test_a_destination_guest_that_is_killed_ends_postcopy_and_the_source_learns(
    tmp_path: Path, state: str
) -> None:
    async def scenario() -> str:
        async with in_state(tmp_path, state) as both:
            kill(both.guests["destination"])
            assert await both.destination.wait() == 1
            assert "guest died" in both.destination.stderr
            assert "Traceback" not in both.destination.stderr
            info = await both.until("source", Status.POSTCOPY_PAUSED)
            await both.source.execute("quit")
            assert await both.source.wait() == 0
            return str(info["error-desc"])

    said = asyncio.run(scenario())
    if state == "postcopy-active":
        assert "guest died" in said


@pytest.mark.parametrize("state", STATES)
def test_a_source_guest_that_is_killed_is_missed_by_nobody(tmp_path: Path, state: str) -> None:
    """Its memory is its control process's as well."""

    async def scenario() -> None:
        async with in_state(tmp_path, state) as both:
            kill(both.guests["source"])
            while (await both.source.execute("query-status"))["status"] != "internal-error":
                await asyncio.sleep(0.01)
            both.between.release()
            with contextlib.suppress(engine.MigrationError):
                await both.hurry()
            assert await both.settle() == "destination"
            await both.until_running(both.destination)
            assert await is_right(both.destination)

    asyncio.run(scenario())


# -- who does not know -----------------------------------------------------------------------------


def test_a_source_that_has_not_heard_of_the_last_page_is_told_when_it_asks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with duel(tmp_path) as both:
            hold = both.between.hold(both.base + MAIN, b"HasAll")
            await both.in_postcopy()
            await both.hurry()
            await hold.reached.wait()
            both.cut([MAIN])
            hold.released.set()
            await both.until("destination", Status.COMPLETED)
            await both.until("source", Status.POSTCOPY_PAUSED)
            await both.source.execute("migrate", uri=f"tcp:{LISTEN}:{both.base}", resume=True)
            while "this side can quit" not in (await both.info("source")).get("error-desc", ""):
                await asyncio.sleep(0.01)
            await both.until("source", Status.POSTCOPY_PAUSED)
            await both.recover()
            await both.until("source", Status.COMPLETED)
            assert await both.status("destination") == "completed"
            await both.check("destination")

    asyncio.run(scenario())


def test_a_source_cut_off_with_the_token_on_its_way_is_let_run_by_its_operator(
    tmp_path: Path,
) -> None:
    """The destination has given up and ended, but across a network that is no proof."""

    async def scenario() -> None:
        async with duel(tmp_path) as both, asyncio.timeout(DEADLINE_S):
            hold = both.between.hold(both.base + HANDOVER, TAKE)
            await both.begin()
            await hold.reached.wait()
            both.between.cut([both.base + one for one in EVERYTHING], for_good=True)
            assert await both.destination.wait() == 1
            hold.released.set()
            info = await both.until("source", Status.POSTCOPY_PAUSED)
            assert info["x-handover"] == "unknown"
            assert await is_still(both.source)
            await both.source.execute("cont")
            await both.until("source", Status.FAILED)
            assert await is_running(both.source)
            assert await is_right(both.source)
            assert "x-handover" not in await both.info("source")

    asyncio.run(scenario())


def test_a_destination_that_has_all_pages_before_the_switch_leaves_the_guest_where_it_is(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with duel(tmp_path) as both:
            hold = both.between.hold(both.base + MAIN, b"StaleDiscarded")
            has_all = wire.encode(wire.HasAll())
            hold.before = wire.FRAME.pack(len(has_all)) + has_all
            hold.released.set()
            await both.begin()
            info = await both.until("source", Status.FAILED)
            assert hold.reached.is_set()
            assert "unexpected HasAll" in info["error-desc"]
            assert (await both.source.execute("query-status"))["status"] == "running"
            assert await is_running(both.source)
            await both.source.execute("stop")
            await both.source.execute("cont")
            assert await is_running(both.source)
            assert await is_right(both.source)

    asyncio.run(scenario())


def test_a_word_that_comes_late_settles_who_has_the_guest(tmp_path: Path) -> None:
    """Guests do not say what became of the token, and control says it after the wait for that."""

    async def scenario() -> None:
        async with duel(tmp_path) as both:
            token = both.between.hold(both.base + HANDOVER, TAKEN)
            word = both.between.hold(both.base + MAIN, b"TookOver")
            await both.begin()
            await token.reached.wait()
            both.between.cut([both.base + HANDOVER], for_good=True)
            while (await both.info("source")).get("x-handover") != "unknown":
                await asyncio.sleep(0.01)
            assert word.reached.is_set()
            word.released.set()
            async with asyncio.timeout(DEADLINE_S):
                while "x-handover" in (info := await both.info("source")):
                    await asyncio.sleep(0.01)
            assert info["status"] == Status.POSTCOPY_ACTIVE.value  # long before the end says it
            assert await is_still(both.source)
            await both.hurry()
            assert await both.settle() == "destination"
            await both.check("destination")

    asyncio.run(scenario())
