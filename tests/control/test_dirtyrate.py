"""Measured dirty rates: of a guest that writes at a known rate, beside a migration, and refused."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

import engine
from engine.control.dirtyrate import MIB, DirtyRate, Mode, RateStatus, TimeUnit, mib_per_s
from engine.control.sampling import BATCH_PAGES, AllPages, SampledPages, Stopped
from engine.errors import UsageError
from engine.guest.base import Guest
from engine.guest.spec import open_guest, parse_guest_spec
from engine.memory.blocks import PAGE_SIZE, RamBlock

SIZE_MIB = 256
#: Each vCPU sweeps over its half many times a second: in some seconds all pages are dirtied, also
#: when it gets little CPU, and when the measurement's first look at RAM takes a second of them.
WRITING = f"workload:size={SIZE_MIB}M,pattern=sweep,rate=0,words=8,vcpus=2"


def block_of(size: int) -> RamBlock:
    """RAM without a guest; its descriptor is the caller's."""
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return RamBlock("ram", size, fd, PAGE_SIZE)


def allocated_bytes(block: RamBlock) -> int:
    return os.fstat(block.fd).st_blocks * 512


async def measured(control: engine.Control, **asked: Any) -> dict[str, Any]:
    """Measure, and the answer when it is there."""
    assert await control.execute("calc-dirty-rate", **asked) == {}
    return await answer_of(control)


async def answer_of(control: engine.Control) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            info: dict[str, Any] = await control.execute("query-dirty-rate")
            if info["status"] == "measured":
                return info
            assert info["status"] == "measuring"
            assert "dirty-rate" not in info
            await asyncio.sleep(0.02)


def is_rate_of(info: dict[str, Any], changed_mib: int) -> bool:
    """Whether the rate is that of so much in the time that was really taken, which is told in ms;
    the rate is rounded."""
    return bool(abs(info["dirty-rate"] - changed_mib * 1000 / info["calc-time"]) <= 1)


@pytest.mark.process
@pytest.mark.parametrize(
    ("asked", "sample_pages"),
    [
        ({"mode": "page-sampling", "sample-pages": 16_384, "calc-time": 3}, 16_384),
        ({"mode": "dirty-bitmap", "calc-time": 3}, 0),
        ({"mode": "dirty-bitmap", "calc-time": 3500, "calc-time-unit": "millisecond"}, 0),
    ],
    ids=["page-sampling", "dirty-bitmap", "milliseconds"],
)
def test_the_rate_is_of_all_that_was_dirtied_in_the_time_that_was_taken(
    asked: dict[str, Any], sample_pages: int
) -> None:
    async def scenario() -> tuple[dict[str, Any], dict[str, Any]]:
        async with engine.Control.start(WRITING) as guest:
            info = await measured(guest, **asked)
            exact = await guest.execute("query-dirty-rate", **{"calc-time-unit": "millisecond"})
            return info, exact

    info, exact = asyncio.run(scenario())
    assert is_rate_of(exact, SIZE_MIB), exact
    assert info["sample-pages"] == sample_pages
    assert info["calc-time"] == exact["calc-time"] // 1000 >= 3
    assert "vcpu-dirty-rate" not in info


@pytest.mark.process
def test_the_ring_counts_each_page_once_a_second_for_its_vcpu() -> None:
    async def scenario() -> dict[str, Any]:
        async with engine.Control.start(WRITING) as guest:
            await measured(guest, **{"mode": "dirty-ring", "calc-time": 3})
            info: dict[str, Any] = await guest.execute(
                "query-dirty-rate", **{"calc-time-unit": "millisecond"}
            )
            return info

    info = asyncio.run(scenario())
    took_s = info["calc-time"] / 1000
    assert took_s >= 3
    vcpus = info["vcpu-dirty-rate"]
    assert [vcpu["id"] for vcpu in vcpus] == [0, 1]
    for vcpu in vcpus:  # three seconds begin and end at least one of the ring's, and in its course
        assert SIZE_MIB / 2 - took_s <= vcpu["dirty-rate"] * took_s, info
        assert vcpu["dirty-rate"] * took_s <= SIZE_MIB / 2 * (took_s + 2) + took_s, info
    assert abs(info["dirty-rate"] - sum(vcpu["dirty-rate"] for vcpu in vcpus)) <= 1


@pytest.mark.process
def test_a_paused_guest_dirties_nothing() -> None:
    async def scenario() -> list[dict[str, Any]]:
        async with engine.Control.start(WRITING) as guest:
            await guest.execute("stop")
            return [
                await measured(
                    guest, **{"mode": mode.value, "calc-time": 100, "calc-time-unit": "millisecond"}
                )
                for mode in Mode
            ]

    for info in asyncio.run(scenario()):
        assert info["dirty-rate"] == 0
        assert sum(vcpu["dirty-rate"] for vcpu in info.get("vcpu-dirty-rate", [])) == 0


@pytest.mark.process
def test_a_migration_ends_a_measurement_by_tracking_and_loses_no_page() -> None:
    async def scenario() -> tuple[dict[str, Any], Any, str]:
        source = engine.Control.start("workload:size=64M,rate=20M,vcpus=2,contents=random")
        destination = engine.Control.start("workload:size=64M", "tcp:127.0.0.1:0")
        async with source, destination:
            await source.execute("calc-dirty-rate", **{"mode": "dirty-bitmap", "calc-time": 8})
            migration = await source.migrate(destination, max_bandwidth=2_000_000)
            async for progress in migration.progress(0.02):
                if progress.transferred_bytes:
                    break
            info = await answer_of(source)
            with pytest.raises(engine.UsageError) as refused:
                await source.execute("calc-dirty-rate", **{"mode": "dirty-bitmap", "calc-time": 1})
            beside = await measured(source, **{"mode": "dirty-ring", "calc-time": 1})
            assert beside["dirty-rate"] > 0
            await source.execute("migrate-set-parameters", **{"max-bandwidth": 0})
            await migration.result()
            await destination.execute("stop")
            return info, await destination.execute("x-judge"), str(refused.value)

    info, judgement, refused = asyncio.run(scenario())
    assert info["dirty-rate"] == -1
    assert "while a migration tracks" in refused
    assert judgement["wrong-pages"] == 0
    assert judgement["page-writes"] == judgement["vcpu-writes"]


@pytest.mark.process
def test_all_of_a_guests_ram_is_compared_where_nothing_tracks_it() -> None:
    async def scenario() -> dict[str, Any]:
        guest = await open_guest(parse_guest_spec("ram:size=64M"), incoming=False)
        rate = DirtyRate(lambda: guest, lambda: False)
        try:
            rate.start(200, TimeUnit.MILLISECOND, None, Mode.DIRTY_BITMAP)
            page_count, number = 10 * MIB // PAGE_SIZE, 0
            while (info := rate.query(TimeUnit.MILLISECOND))["status"] != "measured":
                number += 1  # whenever the looks are, they see other contents
                for page in range(page_count):
                    where = page * PAGE_SIZE + 7
                    os.pwrite(guest.blocks[0].fd, number.to_bytes(8, "little"), where)
                await asyncio.sleep(0)
            assert info["calc-time"] >= 200
            return info
        finally:
            await rate.close()
            await guest.quit()

    info = asyncio.run(scenario())
    assert is_rate_of(info, 10), info


def unguarded(guest: object = None) -> DirtyRate:
    async def make() -> DirtyRate:
        return DirtyRate(lambda: guest, lambda: False)  # type: ignore[arg-type,return-value]

    return asyncio.run(make())


@pytest.mark.parametrize(
    ("calc_time", "unit", "pages", "mode", "said"),
    [
        (0, TimeUnit.SECOND, None, Mode.PAGE_SAMPLING, "Calculation time is out of range"),
        (49, TimeUnit.MILLISECOND, None, Mode.PAGE_SAMPLING, "Calculation time is out of range"),
        (60_001, TimeUnit.MILLISECOND, None, Mode.PAGE_SAMPLING, "Calculation time is out of"),
        (61, TimeUnit.SECOND, None, Mode.PAGE_SAMPLING, "Calculation time is out of range"),
        (1, TimeUnit.SECOND, 127, Mode.PAGE_SAMPLING, r"sample-pages is out of range\[128, 16384"),
        (1, TimeUnit.SECOND, 16_385, Mode.PAGE_SAMPLING, "sample-pages is out of range"),
        (1, TimeUnit.SECOND, 512, Mode.DIRTY_BITMAP, "sample-pages is used only in page-sampling"),
        (1, TimeUnit.SECOND, None, Mode.DIRTY_RING, "mode dirty-ring is not enabled, use other"),
    ],
)
def test_what_is_out_of_range_is_refused_and_starts_nothing(
    calc_time: int, unit: TimeUnit, pages: int | None, mode: Mode, said: str
) -> None:
    rate = unguarded()
    with pytest.raises(UsageError, match=said):
        rate.start(calc_time, unit, pages, mode)
    assert rate.query(TimeUnit.SECOND)["status"] == RateStatus.UNSTARTED.value


def test_a_measurement_that_is_given_up_leaves_nothing() -> None:
    async def scenario() -> None:
        guest: Guest = await open_guest(parse_guest_spec("ram:size=256M"), incoming=False)
        rate = DirtyRate(lambda: guest, lambda: False)
        for mode in (Mode.PAGE_SAMPLING, Mode.DIRTY_BITMAP):
            rate.start(60, TimeUnit.SECOND, None, mode)
            with pytest.raises(UsageError, match="the dirty rate is already being measured"):
                rate.start(1, TimeUnit.SECOND, None, mode)
            await asyncio.sleep(0)
            await rate.close()
        await guest.quit()

    asyncio.run(scenario())


def test_sampled_pages_tell_the_share_that_has_changed_and_allocate_nothing() -> None:
    block, small = block_of(256 * MIB), block_of(124 * 1024)
    try:
        os.pwrite(block.fd, b"x" * MIB, 64 * MIB)
        before = allocated_bytes(block)
        pages = SampledPages([block, small], 4096)
        assert pages.sample_count == 1024
        assert pages.sampled_bytes == block.size
        pages.begin()
        assert pages.count_changed() == 0
        assert allocated_bytes(block) == before
        os.pwrite(block.fd, b"y" * (block.size // 2), 0)
        assert 0.4 * 1024 <= pages.count_changed() <= 0.6 * 1024
        os.pwrite(block.fd, b"y" * block.size, 0)
        assert pages.count_changed() == 1024
        pages.close()
        pages.close()
    finally:
        os.close(block.fd)
        os.close(small.fd)


@pytest.mark.parametrize(
    ("size", "pages_per_gib", "count"),
    [(32 * MIB, 512, 16), (258048, 4161, 0), (MIB, 1024, 1), (MIB, 1023, 0), (128 * 1024, 16384, 2),
     (124 * 1024, 16384, 0)],
)  # fmt: skip
def test_a_small_guest_is_sampled_as_qemu_samples_it(
    size: int, pages_per_gib: int, count: int
) -> None:
    block = block_of(size)
    try:
        pages = SampledPages([block], pages_per_gib)
        assert pages.sample_count == count
        assert pages.sampled_bytes == (size if count else 0)
        pages.begin()
        os.pwrite(block.fd, b"y" * size, 0)
        assert pages.count_changed() == count
        pages.close()
    finally:
        os.close(block.fd)


def test_all_pages_tell_exactly_which_have_changed() -> None:
    page_count = BATCH_PAGES * 2 + 3
    block = block_of(page_count * PAGE_SIZE)
    try:
        os.pwrite(block.fd, b"x" * 3 * PAGE_SIZE, 5 * PAGE_SIZE)
        pages = AllPages([block])
        pages.begin()
        assert pages.count_changed() == 0
        assert allocated_bytes(block) == 3 * PAGE_SIZE
        os.pwrite(block.fd, b"y", 5 * PAGE_SIZE)
        os.pwrite(block.fd, b"x", 6 * PAGE_SIZE)  # what was there already
        os.pwrite(block.fd, bytes(PAGE_SIZE), 9 * PAGE_SIZE)  # zeros into a hole
        os.pwrite(block.fd, b"z", (page_count - 1) * PAGE_SIZE + PAGE_SIZE - 1)
        assert pages.count_changed() == 2
        pages.stop()
        with pytest.raises(Stopped):
            pages.count_changed()
        pages.close()
    finally:
        os.close(block.fd)


def test_a_rate_is_rounded_to_the_nearest() -> None:
    assert mib_per_s(10.4 * MIB, 1_000_000_000) == 10
    assert mib_per_s(10.6 * MIB, 1_000_000_000) == 11
    assert mib_per_s(MIB, 0) > 0
