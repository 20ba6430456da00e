"""kill -9 and cut connections at random instants of postcopy: every page arrives, and one guest
runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from pathlib import Path
from typing import Any

import psutil
import pytest

import engine
from engine.control.status import Status
from engine.guest.token import Kind, encode
from tests.hugepages import huge_pages
from tests.kernel import has_userfaultfd
from tests.survival.postcopy_rig import (
    CHANNELS,
    EVERYTHING,
    FAULTS,
    GUEST,
    HANDOVER,
    MAIN,
    PAGES,
    SIDES,
    Duel,
    duel,
    instant_count,
    measure,
)
from tests.survival.rig import kill

__all__ = ["huge_pages"]

log = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]

#: Instants of one migration: what is healed may be struck again. The last leaves enough to be seen
#: that it was healed.
STRIKES = 3
FIRST, LAST = 1.0, 0.25
#: "Within a second" is for a machine that has nothing else to do: an interpreter starts in it.
HEALED_WITHIN_S = 20.0

#: What is struck: ports that are cut, or workers that are killed.
SELF_HEALING: dict[str, list[int | str]] = {
    "fault-channel": [FAULTS],
    "multifd-channel": [*CHANNELS],
    "sender": ["multifdsend_0", "multifdsend_1"],
    "receiver": ["multifdrecv_0", "multifdrecv_1"],
    "fault-service": ["fault-service"],
    "page-service": ["page-service"],
}
BACKGROUND = ("multifd-channel", "sender", "receiver")
#: Answers that may have been on their way when something was struck: one fault's, and prefetched.
ON_THE_WAY = 70


async def strike(both: Duel, what: int | str) -> None:
    if isinstance(what, int):
        assert both.cut([what]) == 1
    else:
        kill(psutil.Process((await both.workers())[what]))


async def healing_s(both: Duel, kind: str, what: int | str) -> float:
    """Strike a part; seconds until it works again."""
    info, there = await both.info("source"), await both.info("destination")
    workers = await both.workers()
    await strike(both, what)
    channels, faults = info["x-channels"], there["x-postcopy"]
    index = what - CHANNELS[0] if isinstance(what, int) else int(what[-1]) if "_" in what else 0

    async def works() -> bool:
        if isinstance(what, str) and (await both.workers()).get(what) in (None, workers[what]):
            return False
        if kind in BACKGROUND:
            now = (await both.info("source"))["x-channels"][index]
            return bool(now["incarnation"] > channels[index]["incarnation"] and now["open"])
        now = (await both.info("destination"))["x-postcopy"]
        causes = ("demand-pages", "prefetch-pages")
        return bool(sum(now[one] - faults[one] for one in causes) > ON_THE_WAY)

    try:
        return await measure(works, HEALED_WITHIN_S)
    except TimeoutError:
        now = await both.info("source"), await both.info("destination"), await both.workers()
        said = f"{both.source.stderr}{both.destination.stderr}"
        raise AssertionError(f"{what} is lost: {channels}, {now}, {said}") from None


@pytest.mark.parametrize("kind", SELF_HEALING)
@pytest.mark.parametrize("index", range(-(-instant_count(6) // STRIKES)))
def test_a_lost_part_comes_back_by_itself(tmp_path: Path, kind: str, index: int) -> None:
    dice = random.Random(f"{kind} {index}")
    parts = sorted((dice.uniform(LAST, FIRST) for _ in range(STRIKES)), reverse=True)

    async def scenario() -> list[float]:
        took = []
        async with duel(tmp_path) as both:
            await both.in_postcopy()
            for part in parts:
                await both.missing_at_most(part)
                took.append(await healing_s(both, kind, dice.choice(SELF_HEALING[kind])))
            await both.hurry()
            assert await both.settle() == "destination"
            await both.check("destination")
            for side in ("source", "destination"):
                assert Status.POSTCOPY_PAUSED.value not in both.events[side]
        return took

    took = asyncio.run(scenario())
    assert max(took) < HEALED_WITHIN_S
    log.info("healed %s: %s s", kind, " ".join(f"{one:.2f}" for one in took))


LOST = ("everything-cut", "source-control", "destination-control", "both-controls")


async def lose(both: Duel, kind: str) -> None:
    if kind == "everything-cut":
        assert both.cut(EVERYTHING) >= 4
    for side in SIDES:
        if kind in (f"{side}-control", "both-controls"):
            await both.kill_control(side)


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("index", range(instant_count(6) // 2))
def test_what_cannot_come_back_by_itself_is_recovered(
    tmp_path: Path, kind: str, index: int
) -> None:
    dice = random.Random(f"{kind} {index}")
    parts = sorted((dice.uniform(0.1, FIRST) for _ in range(2)), reverse=True)

    async def scenario() -> None:
        async with duel(tmp_path) as both:
            await both.in_postcopy()
            for number, part in enumerate(parts):
                await both.missing_at_most(part)
                await lose(both, kind)
                if number + 1 < len(parts):
                    await both.repair()
            assert await both.settle() == "destination"
            await both.check("destination")

    asyncio.run(scenario())


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("kind", ["destination-control", "both-controls"])
def test_huge_pages_are_all_asked_for_again_and_those_that_are_here_are_kept(
    tmp_path: Path, kind: str
) -> None:
    """hugetlbfs does not say what is a hole: what was received is lost with the control process."""

    async def scenario() -> None:
        # The guest stays in its first huge page, and has written there when control is killed.
        async with duel(tmp_path, f"{GUEST},hugetlb=2M", "rate=200k,pattern=sweep") as both:
            await both.in_postcopy()
            assert await both.missing_at_most(1 - 1 / PAGES) > 0
            await both.until_running(both.destination)
            await lose(both, kind)
            await both.start("destination")
            info: dict[str, Any] = {}
            async with asyncio.timeout(HEALED_WITHIN_S):
                while "x-postcopy" not in info:
                    info = await both.until("destination", Status.POSTCOPY_PAUSED)
            assert info["x-postcopy"]["missing-pages"] == PAGES
            assert await both.settle() == "destination"
            await both.check("destination")

    asyncio.run(scenario())


TAKE, TAKEN = (encode(kind, b"x" * 16)[:8] for kind in (Kind.TAKE, Kind.TAKEN))
#: What is held back when something is struck: each message of the switch.
MOMENTS = {
    "asked-to-prepare": (MAIN, b"BeginPostcopy"),
    "prepared": (MAIN, b"PostcopyReady"),
    "told-what-is-stale": (MAIN, b"DiscardStale"),
    "discarded": (MAIN, b"StaleDiscarded"),
    "armed": (MAIN, b"Armed"),
    "token": (HANDOVER, TAKE),
    "taken": (HANDOVER, TAKEN),
    "told-so": (MAIN, b"TookOver"),
}
SWITCHES = [(kind, moment) for kind in (*SELF_HEALING, *LOST) for moment in MOMENTS]
if instant_count(0) < len(SWITCHES):
    SWITCHES = random.Random("switches").sample(SWITCHES, 16)


@pytest.mark.parametrize(("kind", "moment"), SWITCHES)
def test_what_is_struck_in_the_switch_leaves_one_guest_on_the_right_side(
    tmp_path: Path, kind: str, moment: str
) -> None:
    dice = random.Random(f"{kind} {moment}")
    offset, word = MOMENTS[moment]

    async def scenario() -> None:
        async with duel(tmp_path) as both:
            hold = both.between.hold(both.base + offset, word)
            await both.begin()
            await hold.reached.wait()
            if kind in LOST:
                await lose(both, kind)
            else:
                what = dice.choice(SELF_HEALING[kind])
                if isinstance(what, int):
                    both.cut([what])
                elif (pid := (await both.workers()).get(what)) is not None:  # else not yet
                    kill(psutil.Process(pid))
            hold.released.set()
            with contextlib.suppress(engine.MigrationError):
                await both.hurry()
            where = await both.settle()
            log.info("%s, %s: %s; %s", kind, moment, where, both.story)
            await both.check(where)

    asyncio.run(scenario())
