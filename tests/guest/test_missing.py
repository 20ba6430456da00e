"""A guest whose pages are missing: it waits where it touches one, and nobody waits with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.errors import GuestError, MemoryRefused, NotHandedOver
from engine.guest.base import Handover, Missing, TrackerName
from engine.guest.judgement import compare
from engine.guest.spec import open_guest, parse_guest_spec
from engine.guest.token import Kind
from engine.guest.workload import WorkloadGuest
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE
from engine.memory.insertion import Inserter
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
    writes_reach,
)
from tests.kernel import has_userfaultfd
from tests.native.support import table_of
from tests.support import eventually

needs_uffd = pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")
SPEC = "size=1M,words=8,pattern=sweep,vcpus=2"
WAIT_S = 20.0


async def nobody(_at_ns: int) -> None:
    """Taken: nobody to tell."""


async def touched(missing: Missing) -> None:
    """Wait until somebody waits for a page."""
    uffds = list(missing.uffds)
    ready, _, _ = await asyncio.to_thread(select.select, uffds, [], [], WAIT_S)
    assert ready, "nobody waits for a page"


def read_fault(missing: Missing) -> int:
    """The page that somebody waits for (struct uffd_msg of linux/userfaultfd.h)."""
    event, address = struct.unpack_from("<B15xQ", os.read(missing.uffds[0], 32))
    assert event == 0x12  # UFFD_EVENT_PAGEFAULT
    return int(address - missing.addresses[0]) // PAGE_SIZE


@dataclass
class Source:
    """Who stands, and has the pages; `received` is the destination's."""

    guest: WorkloadGuest
    received: PageBitmaps

    def place(self, missing: Missing, first: int = 0, count: int | None = None) -> int:
        """Place its pages at the destination; return how many were new."""
        block = self.guest.blocks[0]
        count = block.page_count if count is None else count
        payload = os.pread(block.fd, count * PAGE_SIZE, first * PAGE_SIZE)
        inserter = Inserter([block], missing.uffds, missing.addresses, self.received)
        return inserter.place(0, memoryview(payload), table_of([(first, count)]), 1)


@contextlib.asynccontextmanager
async def source_of(spec: str = SPEC) -> AsyncIterator[Source]:
    """A guest that has written and is held."""
    async with workload(spec) as guest:
        await writes_reach(guest, 1000)
        await guest.pause(for_migration=True)
        received = PageBitmaps.create("received", guest.blocks)
        try:
            yield Source(guest, received)
        finally:
            received.close()


@contextlib.asynccontextmanager
async def taken_over(*, runs: bool = True) -> AsyncIterator[tuple[Source, WorkloadGuest, Missing]]:
    """Both sides after the switch to postcopy, with no page at the destination."""
    async with source_of() as source, workload("size=1M,fill=off", incoming=True) as guest:
        endpoint = await guest.listen_handover("tcp:127.0.0.1:0")
        await source.guest.connect_handover(endpoint, SESSION)
        await guest.load_state(await source.guest.save_state())
        missing = await guest.open_missing()
        await guest.arm(SESSION, runs, nobody)
        outcome = await source.guest.hand_over(20 * SECOND_NS, keeps_ram=True)
        assert outcome is Handover.TAKEN
        yield source, guest, missing


async def check(source: Source, guest: WorkloadGuest) -> None:
    """Every page is right, and no write is lost."""
    async with judged(source.guest) as there, judged(guest) as here:
        assert here.is_right
        assert compare(there, here).is_right


@needs_uffd
def test_a_vcpu_waits_for_its_page_goes_on_with_it_and_every_page_is_right() -> None:
    async def scenario() -> None:
        async with taken_over() as (source, guest, missing):
            before = await source.guest.writes() or 0
            await touched(missing)
            assert missing.vcpus == 2
            assert await guest.writes() == before
            page = read_fault(missing)

            assert source.place(missing, page, 1) == 1

            await writes_reach(guest, before + 1)
            source.place(missing)
            await writes_reach(guest, before + 2000)
            await guest.close_missing()
            await writes_reach(guest, before + 4000)
            await check(source, guest)
            await guest.close_missing()
            await source.guest.release_ram()

    run(scenario())


@needs_uffd
def test_judging_waits_for_missing_pages_and_does_not_take_them_for_holes() -> None:
    async def scenario() -> None:
        async with taken_over(runs=False) as (source, guest, missing):
            judging = asyncio.ensure_future(guest.judge())
            await touched(missing)
            assert read_fault(missing) == 0
            assert (await guest.writes()) == await source.guest.writes()  # it answers meanwhile
            assert not judging.done()

            source.place(missing)

            (await judging).close()
            await check(source, guest)

    run(scenario())


@needs_uffd
def test_a_guest_that_waits_for_a_page_cannot_be_stopped_and_runs_on_when_it_comes() -> None:
    async def scenario() -> None:
        async with taken_over() as (source, guest, missing):
            await touched(missing)
            before = await guest.writes() or 0
            stopping = asyncio.ensure_future(guest.pause(for_migration=False))
            assert await guest.writes() == before  # it answers meanwhile

            with pytest.raises(GuestError, match="a vCPU still waits for a missing page"):
                await stopping

            assert guest.is_running
            assert not guest.is_stopped_by_user
            source.place(missing)
            await writes_reach(guest, before + 1000)
            await guest.pause(for_migration=False)
            assert not guest.is_running
            await check(source, guest)

    run(scenario())


@needs_uffd
def test_a_stop_that_is_under_way_is_done_when_the_page_comes() -> None:
    async def scenario() -> None:
        async with taken_over() as (source, guest, missing):
            await touched(missing)
            stopping = asyncio.ensure_future(guest.pause(for_migration=False))
            await guest.writes()  # answered after the pause has begun

            source.place(missing)

            await stopping
            assert not guest.is_running
            await check(source, guest)

    run(scenario())


@needs_uffd
def test_nothing_tracks_or_hands_on_a_guest_whose_pages_are_missing() -> None:
    async def scenario() -> None:
        async with (
            taken_over() as (source, guest, missing),
            workload("size=1M", incoming=True) as third,
        ):
            for name in (None, *TrackerName):
                with pytest.raises(MemoryRefused, match="while pages of it are missing"):
                    await guest.start_tracking(name)
            with pytest.raises(MemoryRefused, match="while pages of it are missing"):
                await guest.start_counting()
            await guest.stop_tracking()
            source.place(missing)
            endpoint = await third.listen_handover("tcp:127.0.0.1:0")
            await guest.connect_handover(endpoint, SESSION)
            await guest.pause(for_migration=True)
            with pytest.raises(NotHandedOver, match="have not come yet"):
                await guest.hand_over(SECOND_NS)
            with pytest.raises(NotHandedOver, match="have not come yet"):
                await guest.give_away()

            await guest.close_missing()

            assert (await guest.start_tracking(None)).name is not TrackerName.NONE
            await guest.stop_tracking()

    run(scenario())


@needs_uffd
def test_opening_ends_tracking_lends_the_same_again_and_is_for_incoming_guests_alone() -> None:
    async def scenario() -> None:
        async with workload("size=1M,vcpus=3", incoming=True) as guest:
            await guest.start_counting()
            missing = await guest.open_missing()
            assert await guest.open_missing() is missing
            assert missing.vcpus == 3
            assert guest.is_missing_open
            with pytest.raises(MemoryRefused, match="a migration has begun"):
                await guest.count_written()
            await guest.close_missing()
            assert not guest.is_missing_open
        async with workload("size=1M") as guest:
            with pytest.raises(GuestError, match="only a guest that waits"):
                await guest.open_missing()
            await guest.close_missing()
            await guest.release_ram()

    run(scenario())


@needs_uffd
@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
def test_a_guest_whose_vcpus_and_judge_wait_for_pages_ends_when_it_is_told(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with taken_over() as (_, guest, missing):
            with contextlib.closing(os.fdopen(os.dup(missing.uffds[0]))):  # a fault service's
                await touched(missing)
                judging = asyncio.ensure_future(guest.judge())
                await guest.writes()  # answered after the judging has begun
                if how == "quit":
                    await guest.quit()
                else:
                    os.kill(guest.pid, 15)
                    await guest.died()
                assert ended_within(guest.pid)
                with pytest.raises(GuestError):
                    await judging

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "killing it" not in caplog.text


def test_a_ram_guest_has_no_userfaultfd_to_lend() -> None:
    async def scenario() -> None:
        guest = await open_guest(parse_guest_spec("ram:size=1M"), incoming=True)
        try:
            with pytest.raises(MemoryRefused, match="such as workload") as caught:
                await guest.open_missing()
            assert "\n" not in str(caught.value)
            await guest.close_missing()
            await guest.release_ram()
        finally:
            await guest.quit()

    run(scenario())


# -- control is killed ---------------------------------------------------------------------------


@needs_uffd
@pytest.mark.parametrize("is_judging", [False, True])
def test_an_owner_outlives_its_control_and_lends_the_same_userfaultfd_to_the_next(
    rundir: Path, is_judging: bool
) -> None:
    async def scenario() -> None:
        async with source_of() as source:
            spec = f"workload:size=1M,fill=off,rundir={rundir}"
            with stub(spec, incoming=True) as control:
                endpoint = control.do(do="listen", uri="tcp:127.0.0.1:0")
                await source.guest.connect_handover(endpoint, SESSION)
                control.do(do="load", state=(await source.guest.save_state()).hex())
                assert control.do(do="open_missing") == 2
                control.do(do="arm", session=SESSION.hex(), run=not is_judging)
                assert await source.guest.hand_over(20 * SECOND_NS, keeps_ram=True) is (
                    Handover.TAKEN
                )
                if is_judging:
                    assert control.do(do="begin_judging") == 1
                control.kill()
                async with adopted(socket_of(control)) as guest:
                    assert guest.is_missing_open
                    assert not guest.is_gone
                    assert guest.is_running is not is_judging
                    missing = await guest.open_missing()
                    await touched(missing)
                    assert missing.vcpus == 2
                    before = await guest.writes() or 0
                    assert before == await source.guest.writes()
                    if is_judging:
                        await guest.resume(for_migration=False)
                    source.place(missing)
                    await writes_reach(guest, before + 1000)
                    await guest.close_missing()
                    await check(source, guest)

    run(scenario())


@needs_uffd
def test_an_incoming_guest_that_misses_pages_ends_with_its_control(rundir: Path) -> None:
    with stub(f"workload:size=1M,fill=off,rundir={rundir}", incoming=True) as control:
        control.do(do="open_missing")
        control.kill()

        assert ended_within(control.guest_pid)
        assert list(rundir.iterdir()) == []


@contextlib.contextmanager
def gone(rundir: Path, answers: dict[Kind, Kind | None]) -> Iterator[tuple[str, int]]:
    """Where a guest can be adopted, and its pid, whose control was killed after TAKE."""
    asked = threading.Event()
    with (
        stub(f"workload:{SPEC},rundir={rundir},path={rundir}/ram") as control,
        peer(answers, asked) as endpoint,
    ):
        control.do(do="connect", endpoint=endpoint, session=SESSION.hex())
        control.do(do="pause", for_migration=True)
        control.order(do="hand_over", wait_ns=20 * SECOND_NS, keeps_ram=True)
        assert asked.wait(WAIT_S)
        if answers[Kind.TAKE] is not None:
            assert control.read()["result"] == "taken"
        control.kill()
        yield socket_of(control), control.guest_pid


TOLD = {Kind.HELLO: Kind.WAITING, Kind.TAKE: Kind.TAKEN}
ASKED = {Kind.HELLO: Kind.WAITING, Kind.TAKE: None, Kind.ASK: Kind.TAKEN}


@pytest.mark.parametrize("answers", [TOLD, ASKED], ids=["after the answer", "before it"])
@pytest.mark.parametrize("end", ["release", "quit"])
def test_a_guest_that_was_handed_over_keeps_its_ram_until_it_is_released(
    rundir: Path, answers: dict[Kind, Kind | None], end: str
) -> None:
    async def scenario(path: str, pid: int) -> None:
        async with adopted(path) as guest:
            assert guest.is_gone
            assert not guest.is_running
            with pytest.raises(GuestError, match="runs at the destination"):
                await guest.resume(for_migration=False)
            async with judged(guest) as judgement:
                assert judgement.is_right
            await guest.leave()
        assert eventually(lambda: os.path.exists(path))
        async with adopted(path) as guest:  # again and again
            assert guest.is_gone
            if end == "release":
                await guest.release_ram()
                await guest.release_ram()
                assert guest.is_alive
                await guest.leave()
                assert ended_within(pid)
        assert ended_within(pid)
        assert list(rundir.iterdir()) == []

    with gone(rundir, answers) as (path, pid):
        run(scenario(path, pid))


@pytest.mark.parametrize("taken", [True, False])
def test_an_unknown_handover_is_settled_by_the_word_of_the_destinations_control(
    taken: bool,
) -> None:
    async def scenario(endpoint: str) -> None:
        async with workload("size=1M") as guest:
            await guest.connect_handover(endpoint, SESSION)
            await guest.pause(for_migration=True)
            outcome = await guest.hand_over(SECOND_NS // 2, keeps_ram=True)
            assert outcome is Handover.UNKNOWN

            await guest.settle(taken=taken)

            await guest.settle(taken=not taken)  # it is known for ever
            if taken:
                with pytest.raises(GuestError, match="runs at the destination"):
                    await guest.resume(for_migration=True)
            else:
                await guest.resume(for_migration=True)
                await writes_reach(guest, (await guest.writes() or 0) + 100)

    answers: dict[Kind, Kind | None] = {Kind.HELLO: Kind.WAITING, Kind.TAKE: None, Kind.ASK: None}
    with peer(answers, threading.Event()) as endpoint:
        run(scenario(endpoint))
