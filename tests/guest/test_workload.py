"""The workload guest in its own process: pause, writes, throttle, trackers, state, handover."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from pathlib import Path

import pytest

from engine import _native
from engine.errors import GuestError, MemoryRefused, UsageError
from engine.guest.base import Handover, TrackerName, Tracking
from engine.guest.judgement import WRONG, Judgement, compare
from engine.guest.workload import WorkloadGuest
from engine.memory.blocks import PAGE_SIZE
from tests.guest.support import (
    SESSION,
    copy_ram,
    ended_within,
    judged,
    run,
    workload,
    writes_reach,
)
from tests.kernel import has_pagemap_scan, has_userfaultfd

SECOND_NS = 1_000_000_000
COUNTER_OFFSET = 16  #: of the write counter in a page


def pages_of(guest: WorkloadGuest) -> int:
    return guest.blocks[0].page_count


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param("rate=0", id="full-speed"),
        pytest.param("rate=1M", id="rate"),
        pytest.param("rate=1,vcpus=3", id="sleeps-of-an-hour"),
        pytest.param("rate=80M,vcpus=2", id="short-sleeps"),
    ],
)
def test_a_pause_does_not_wait_for_the_next_write_and_no_write_follows_it(spec: str) -> None:
    async def scenario() -> None:
        async with workload(f"size=16M,{spec}") as guest:
            for _ in range(20):
                began_ns = time.monotonic_ns()
                stood_ns = await guest.pause(for_migration=False)
                assert began_ns < stood_ns <= time.monotonic_ns()
                async with judged(guest) as judgement:
                    assert judgement.is_right
                    assert await guest.writes() == judgement.vcpu_writes_sum
                await guest.resume(for_migration=False)

    run(scenario())


def test_a_throttled_guest_writes_less_pauses_at_once_and_recovers() -> None:
    free = 40 * 2**20 / PAGE_SIZE  #: writes per second

    async def writes_per_s(guest: WorkloadGuest, span_s: float) -> float:
        began, before = time.monotonic(), await guest.writes() or 0
        await asyncio.sleep(span_s)
        return ((await guest.writes() or 0) - before) / (time.monotonic() - began)

    async def is_free(guest: WorkloadGuest) -> None:
        """A busy machine's guest is at full speed now and then."""
        while await writes_per_s(guest, 0.5) < 0.6 * free:
            pass

    async def pause_s(guest: WorkloadGuest) -> float:
        began = time.monotonic()
        await guest.pause(for_migration=False)
        took_s = time.monotonic() - began
        await guest.resume(for_migration=False)
        return took_s

    async def scenario() -> None:
        async with workload("size=16M,rate=40M,words=8") as guest:
            await is_free(guest)
            await guest.throttle(99)
            assert await writes_per_s(guest, 2.0) < 0.4 * free
            assert min([await pause_s(guest) for _ in range(5)]) < 0.5  # half a throttle's sleep
            await guest.throttle(0)
            await is_free(guest)
            for percent in (-1, 100):
                with pytest.raises(GuestError, match="0 to 99"):
                    await guest.throttle(percent)

    run(scenario())


def test_judging_a_running_guest_lets_it_run_on() -> None:
    async def scenario() -> None:
        async with workload("size=16M") as guest:
            async with judged(guest) as judgement:
                assert judgement.is_right
            await writes_reach(guest, judgement.vcpu_writes_sum + 1000)
            assert guest.is_running

    run(scenario())


# -- trackers ------------------------------------------------------------------------------------


def harvest(guest: WorkloadGuest, tracking: Tracking) -> list[bool]:
    """One harvest of the whole block: which pages were written since the last one."""
    fd, part = tracking.fds[0], guest.blocks[0].slice_of(0, 1)
    dirty = bytearray(-(-pages_of(guest) // 64) * 8)
    if tracking.name is TrackerName.BITMAP:
        with mmap.mmap(fd, 0) as bitmap:
            _native.bitmap_move_slice(bitmap, dirty, part)
    else:
        _native.pagemap_scan(fd, tracking.pieces[0].address, dirty, part)
    return [bool(dirty[i // 8] >> i % 8 & 1) for i in range(pages_of(guest))]


def counters(judgement: Judgement) -> list[int]:
    with mmap.mmap(judgement.counters_fd, 0, access=mmap.ACCESS_READ) as mapping:
        return memoryview(mapping[:]).cast("Q").tolist()


async def tracked(guest: WorkloadGuest, name: TrackerName) -> Tracking:
    if name is TrackerName.UFFD and not (has_pagemap_scan() and has_userfaultfd()):
        pytest.skip("uffd-wp needs Linux 6.7 and userfaultfd")
    tracking = await guest.start_tracking(name)
    assert tracking.name is name
    assert tracking.reason
    return tracking


@pytest.mark.parametrize("name", [TrackerName.UFFD, TrackerName.BITMAP])
@pytest.mark.parametrize("contents", ["zero", "mixed"])
def test_a_tracker_sees_exactly_the_pages_that_were_written(
    name: TrackerName, contents: str
) -> None:
    async def scenario() -> None:
        spec = f"size=8M,pattern=hotspot,vcpus=2,words=8,rate=20M,contents={contents}"
        async with workload(spec, start=False) as guest:
            tracking = await tracked(guest, name)
            for _ in range(5):
                async with judged(guest) as before:
                    old = counters(before)
                await guest.resume(for_migration=False)
                await writes_reach(guest, before.vcpu_writes_sum + 500)
                await guest.pause(for_migration=False)
                found = harvest(guest, tracking)
                async with judged(guest) as after:
                    written = [a != b for a, b in zip(old, counters(after), strict=True)]
                assert found == written
                assert 0 < sum(written) < pages_of(guest)
            await guest.stop_tracking()
            await guest.stop_tracking()

    run(scenario())


@pytest.mark.parametrize("name", [TrackerName.UFFD, TrackerName.BITMAP])
def test_every_write_is_in_some_harvest_while_the_guest_runs_at_full_speed(
    name: TrackerName,
) -> None:
    async def scenario() -> None:
        async with workload("size=8M,pattern=random,vcpus=2,words=8", start=False) as guest:
            tracking = await tracked(guest, name)
            async with judged(guest) as before:
                seen = counters(before)
            with guest.blocks[0].map() as ram:
                await guest.resume(for_migration=False)
                while (await guest.writes() or 0) < 20 * pages_of(guest):
                    for page, is_dirty in enumerate(harvest(guest, tracking)):
                        if is_dirty:  # look at it after it was re-armed, as a sender does
                            start = page * PAGE_SIZE + COUNTER_OFFSET
                            seen[page] = int.from_bytes(ram[start : start + 8], "little")
            await guest.pause(for_migration=False)
            left = harvest(guest, tracking)
            async with judged(guest) as after:
                unseen = [
                    page
                    for page, counter in enumerate(counters(after))
                    if seen[page] != counter and not left[page]
                ]
            assert unseen == []

    run(scenario())


def test_an_unusable_tracker_is_refused_with_those_that_work() -> None:
    async def scenario() -> None:
        async with workload("size=1M,tracker=content-hash") as guest:
            assert (await guest.start_tracking(None)).name is TrackerName.HASH
            assert (await guest.start_tracking(TrackerName.BITMAP)).name is TrackerName.BITMAP
            with pytest.raises(MemoryRefused, match=r"'none' does not work here.*guest-bitmap"):
                await guest.start_tracking(TrackerName.NONE)
            with pytest.raises(MemoryRefused, match="not tracked by soft-dirty"):
                await guest.clear_soft_dirty()

    run(scenario())


# -- handover ------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:{}/token.sock"])
def test_a_guest_goes_on_at_the_destination_and_never_again_here(uri: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            workload("size=8M,vcpus=2,pattern=hotspot,seed=9") as source,
            workload("size=8M", incoming=True) as destination,
        ):
            taken = asyncio.get_running_loop().create_future()

            async def note(at_ns: int) -> None:
                taken.set_result(at_ns)

            endpoint = await destination.listen_handover(uri.format(tmp_path))
            await source.connect_handover(endpoint, SESSION)
            await writes_reach(source, 1000)
            with pytest.raises(GuestError, match="pause it"):
                await source.hand_over(SECOND_NS)
            await source.pause(for_migration=True)
            copy_ram(source, destination)
            await destination.load_state(await source.save_state())
            await destination.arm(SESSION, True, note)

            assert await source.hand_over(10 * SECOND_NS) is Handover.TAKEN

            assert (await taken) <= time.monotonic_ns()
            assert destination.is_running
            assert await destination.disarm() is False
            await writes_reach(destination, (await source.writes()) + 1000)
            with pytest.raises(GuestError, match="runs at the destination"):
                await source.resume(for_migration=True)
            async with judged(source) as there, judged(destination) as here:
                assert there.is_right
                assert here.is_right
                assert compare(there, here).is_right
            await source.close_handover()
            await destination.close_handover()

    run(scenario())


def test_a_disarmed_destination_refuses_and_the_source_runs_again() -> None:
    async def scenario() -> None:
        async with (
            workload("size=1M") as source,
            workload("size=1M", incoming=True) as destination,
        ):

            async def never(_at_ns: int) -> None:
                raise AssertionError("it was not taken")

            await source.connect_handover(
                await destination.listen_handover("tcp:127.0.0.1:0"), SESSION
            )
            await source.pause(for_migration=True)
            await destination.arm(SESSION, True, never)
            assert await destination.disarm() is True

            assert await source.hand_over(10 * SECOND_NS) is Handover.REFUSED

            await source.resume(for_migration=True)
            before = await source.writes()
            await writes_reach(source, before + 100)
            assert not destination.is_running
            with pytest.raises(GuestError, match="waits for an incoming"):
                await destination.resume(for_migration=True)

    run(scenario())


def test_a_state_that_is_not_one_is_refused_in_one_line() -> None:
    async def scenario() -> None:
        async with workload("size=1M", incoming=True) as guest:
            for state in (b"", b"\x80", b"x" * 100, bytes(2**20)):
                with pytest.raises(GuestError, match="device state") as caught:
                    await guest.load_state(state)
                assert "\n" not in str(caught.value)
        async with workload("size=1M", start=False) as guest:
            with pytest.raises(GuestError, match="only a guest that waits"):
                await guest.load_state(await guest.save_state())

    run(scenario())


# -- life and death ------------------------------------------------------------------------------


def test_the_death_of_the_guest_is_noticed_and_named() -> None:
    async def scenario() -> None:
        async with workload("size=1M") as guest:
            watching = asyncio.ensure_future(guest.died())
            os.kill(guest.pid, 9)

            assert "SIGKILL" in await watching
            with pytest.raises(GuestError, match="SIGKILL"):
                await guest.writes()

    run(scenario())


def test_a_guest_that_hangs_is_killed_by_quit_and_its_file_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "ram"
        async with workload(f"size=1M,path={path}") as guest:
            assert path.stat().st_size == 1 << 20
            os.kill(guest.pid, 19)  # SIGSTOP
            await guest.quit()
            assert ended_within(guest.pid, 0.0)
            assert not path.exists()
            await guest.quit()

    run(scenario())


def test_a_file_that_was_there_before_stays_and_must_have_the_size(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "ram"
        path.write_bytes(bytes(1 << 20))
        async with workload(f"size=1M,path={path},contents=text") as guest:
            await writes_reach(guest, 10)
        assert path.exists()
        with pytest.raises(UsageError, match="size=1048576"):
            async with workload(f"size=2M,path={path}"):
                raise AssertionError("opened")
        assert path.stat().st_size == 1 << 20

    run(scenario())


def test_a_started_guest_that_shall_not_run_waits_for_resume() -> None:
    async def scenario() -> None:
        async with workload("size=1M,fill=off", start=False) as guest:
            assert not guest.is_running
            assert await guest.writes() == 0
            assert guest.blocks[0].allocated_bytes() == 0
            await guest.resume(for_migration=False)
            await writes_reach(guest, 300)
            async with judged(guest) as judgement:
                assert judgement.is_right
                assert WRONG not in counters(judgement)

    run(scenario())


def test_a_sweep_of_full_pages_at_full_speed_touches_every_page() -> None:
    async def scenario() -> None:
        async with workload("size=4M,pattern=sweep") as guest:
            await writes_reach(guest, 2 * pages_of(guest))
            async with judged(guest) as judgement:
                assert min(counters(judgement)) > 0

    run(scenario())
