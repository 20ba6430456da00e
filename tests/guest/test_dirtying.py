"""What a workload guest tells of the pages it dirties, and how it is limited in it."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os

import pytest

from engine.errors import GuestError, MemoryRefused
from engine.guest.base import DirtyMeter, TrackerName
from engine.guest.messages import Options
from engine.guest.tracker import OPENERS, count_written, open_tracker
from engine.guest.vcpus import Machine
from engine.guest.workload import WorkloadGuest
from engine.memory.blocks import PAGE_SIZE
from tests.guest.support import run, workload, writes_reach
from tests.support import eventually

PAGE_COUNT = 1000  #: not a multiple of 64
SPEC = "size=16M,rate=0,vcpus=2"


def meter(guest: WorkloadGuest) -> DirtyMeter:
    """The guest as control sees it; a type checker sees that it fits."""
    return guest


async def dirty_pages(guest: WorkloadGuest) -> list[int]:
    return [one.pages for one in await meter(guest).dirtied()]


async def dirtied_reach(guest: WorkloadGuest, vcpu: int, pages: int) -> None:
    async with asyncio.timeout(60):
        while (await dirty_pages(guest))[vcpu] < pages:
            await asyncio.sleep(0.005)


def test_every_tracker_that_works_here_counts_what_was_written() -> None:
    written = (0, 63, 64, 500, PAGE_COUNT - 1)
    counted = {}
    for name in OPENERS:
        if name is TrackerName.HASH:
            continue
        with mmap.mmap(-1, PAGE_COUNT * PAGE_SIZE) as ram:
            ram.write(b"x" * PAGE_COUNT * PAGE_SIZE)
            with contextlib.suppress(MemoryRefused):
                tracker = open_tracker(name, ram, PAGE_COUNT)
                tracker.arm()
                for page in written:
                    ram[page * PAGE_SIZE] = 7
                    if tracker.bitmap is not None:  # as a vCPU does it
                        tracker.bitmap[page // 8] |= 1 << page % 8
                counted[name] = count_written(tracker, PAGE_COUNT)
                tracker.close()
    assert TrackerName.BITMAP in counted
    assert set(counted.values()) == {len(written)}


def test_a_period_counts_each_page_once_and_the_next_begins_anew() -> None:
    async def scenario() -> None:
        async with workload("size=16M,rate=0,pattern=sweep") as guest:
            page_count = guest.blocks[0].page_count
            for _ in range(2):
                await guest.start_counting()
                await writes_reach(guest, (await guest.writes() or 0) + 3 * page_count)
                await guest.pause(for_migration=False)
                assert await guest.count_written() == page_count
                await guest.start_counting()
                assert await guest.count_written() == 0
                await guest.resume(for_migration=False)
            with pytest.raises(MemoryRefused, match="a migration has begun"):
                await guest.count_written()

    run(scenario())


def test_a_migrations_tracking_ends_the_counting_and_never_the_other_way_round() -> None:
    async def scenario() -> None:
        async with workload(SPEC) as guest:
            await guest.start_counting()
            await guest.start_tracking(None)
            with pytest.raises(MemoryRefused, match="a migration has begun"):
                await guest.count_written()
            with pytest.raises(MemoryRefused, match="tracked for a migration"):
                await guest.start_counting()
            await guest.stop_tracking()
            await guest.start_counting()
            await guest.count_written()

    run(scenario())


def test_each_vcpu_counts_its_own_pages_and_only_when_it_is_asked_to() -> None:
    async def scenario() -> None:
        async with workload(f"{SPEC},pattern=sweep") as guest:
            share = guest.blocks[0].page_count // 2
            await writes_reach(guest, 2 * share)
            assert await dirty_pages(guest) == [0, 0]
            await guest.count_dirty(True)
            for vcpu in (0, 1):
                await dirtied_reach(guest, vcpu, share)  # each page of it, at least once
            await guest.count_dirty(False)
            await guest.pause(for_migration=False)  # now none is in a write that it counts
            before = await dirty_pages(guest)
            await guest.resume(for_migration=False)
            await writes_reach(guest, (await guest.writes() or 0) + 2 * share)
            assert await dirty_pages(guest) == before

    run(scenario())


def test_a_limit_makes_its_vcpu_sleep_and_a_pause_does_not_wait_for_it() -> None:
    async def scenario() -> None:
        async with workload(SPEC) as guest:
            await guest.limit_dirty(0, 1)
            async with asyncio.timeout(60):
                while (await dirty_pages(guest))[1] == 0:  # has no limit, and does not count
                    await guest.count_dirty(True)
            await dirtied_reach(guest, 0, 1)  # one page; the next one in an hour
            await guest.pause(for_migration=False)
            await guest.resume(for_migration=False)
            await guest.limit_dirty(None, 0)
            await dirtied_reach(guest, 0, 100)
            with pytest.raises(GuestError, match="there is no vCPU 2; the guest has 2"):
                await guest.limit_dirty(2, 1)

    run(scenario())


def test_a_limit_stays_with_the_process_when_a_state_arrives() -> None:
    async def scenario() -> None:
        async with workload(SPEC) as source, workload("size=16M", incoming=True) as destination:
            await destination.limit_dirty(0, 1)
            await destination.count_dirty(True)
            await source.pause(for_migration=True)
            await destination.load_state(await source.save_state())
            assert await dirty_pages(destination) == [0, 0]  # the source's two vCPUs
            with pytest.raises(GuestError, match="there is no vCPU 2"):
                await destination.limit_dirty(2, 1)

    run(scenario())


def test_an_orphan_is_free_of_what_its_control_process_put_upon_it() -> None:
    ram_fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(ram_fd, 64 * PAGE_SIZE)
    machine = Machine(ram_fd, 64 * PAGE_SIZE, Options(1, "sweep", 0, 8, "zero", 1))
    try:
        machine.limit_dirty(None, 1)
        machine.count_dirty(True)
        machine.throttle(99)
        machine.start_counting()
        machine.resume()
        assert eventually(lambda: machine.dirtied()[0][0] == 1)  # the next one in an hour
        machine.go_free()
        before = machine.writes()
        assert eventually(lambda: machine.writes() > before + 10_000)
        assert machine.dirtied()[0][0] <= 64 + 1
        with pytest.raises(MemoryRefused):
            machine.count_written()
    finally:
        machine.close()
