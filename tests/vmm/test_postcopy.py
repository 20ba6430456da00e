"""A real, unmodified QEMU goes on at the destination before its memory is there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import numpy as np
import pytest

import engine
from engine.control.status import Status
from engine.memory.blocks import PAGE_SIZE
from tests.vmm.machines import MIB, Vm, needs_qemu, pair, vm
from tests.vmm.postcopy_rig import (
    couple,
    eventually,
    in_postcopy,
    lacks_pages,
    needs_kernel_faults,
    start_destination,
    until,
)
from tests.vmm.test_end_to_end import is_let_go, stand_as
from tests.vmm.test_injection import left_open

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu, needs_kernel_faults]

#: So fast that a round takes half a second, in which the sweeper writes all again.
ROUNDS: Final = ("max-bandwidth=128M", "downtime-limit=1")
CODECS: Final = {
    "none": ("multifd-compression=none",),
    "lz4": ("multifd-compression=lz4",),
    "xbzrle": ("multifd-compression=none", "xbzrle=on"),
}


async def migrate(
    source: Vm, destination: Vm, *settings: str, rounds: int = 0, runs: bool = True
) -> engine.Statistics:
    """A whole migration by postcopy, with so many precopy rounds before it."""
    async with couple(source.spec, destination.spec, *ROUNDS, *settings, runs=runs) as both:
        async for progress in both.migration.progress(0.01):
            if progress.status is Status.ACTIVE and progress.rounds > rounds:
                break
        await both.migration.start_postcopy()
        return await both.finish()


def is_untouched(source: Vm, destination: Vm) -> bool:
    """Whether all that the sweeper does not write is as in the source, which keeps its memory: the
    words of `sweeper.S`, and below its code the stack."""
    here, there = (
        np.frombuffer(b"".join(each.memory()), np.uint8).reshape(-1, PAGE_SIZE)
        for each in (source, destination)
    )
    differs = here != there
    at = np.arange(PAGE_SIZE)
    is_word = (at < 4) | (at % 64 // 4 == 1)
    differs[MIB // PAGE_SIZE : -MIB // PAGE_SIZE, is_word] = False
    differs[7, 0xB00:0xC00] = False
    return not differs.any()


@pytest.mark.parametrize("rounds", [0, 2], ids=["postcopy", "hybrid"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_guest_arrives_byte_by_byte_and_goes_on(codec: str, rounds: int) -> None:
    """It does not run on its arrival, so that every byte can be compared."""
    with pair(is_filled=True) as (source, destination):
        result = asyncio.run(
            migrate(source, destination, *CODECS[codec], rounds=rounds, runs=False)
        )

        assert source.memory() == destination.memory()
        assert stand_as(source, destination, "paused")
        assert result.rounds >= rounds
        assert is_let_go(source)
        assert not lacks_pages(destination)
        assert left_open(destination) == 0
        before = source.rounds()
        destination.monitor.ask("cont")
        assert destination.goes_on()
        assert 0 <= destination.said()[0][1] - before <= 2  # a line may be halved


@pytest.mark.parametrize("rounds", [0, 2], ids=["postcopy", "hybrid"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_running_guest_finds_no_page_wrong(codec: str, rounds: int) -> None:
    with pair(is_filled=True) as (source, destination):
        asyncio.run(migrate(source, destination, *CODECS[codec], rounds=rounds))

        assert stand_as(source, destination, "running")
        before = source.rounds()
        assert destination.goes_on()
        assert 0 <= destination.said()[0][1] - before <= 2  # a line may be halved
        destination.monitor.ask("stop")
        assert is_untouched(source, destination)


def test_a_guest_with_two_vcpus_two_nodes_a_disk_and_a_network_arrives(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    options = ["-smp", "2", "-drive", f"file={tmp_path}/disk,format=raw,if=none,id=disk"]
    options += ["-device", "virtio-blk-pci,drive=disk", "-netdev", "hubport,id=net,hubid=0"]
    options += ["-device", "virtio-net-pci,netdev=net"]
    with pair(*options, blocks=2, is_filled=True) as (source, destination):
        asyncio.run(migrate(source, destination, "multifd-compression=lz4", rounds=1))

        assert stand_as(source, destination, "running")
        assert len(destination.monitor.ask("query-cpus-fast")) == 2
        assert destination.goes_on()
        destination.monitor.ask("stop")
        assert is_untouched(source, destination)


def test_it_runs_while_pages_are_missing_and_what_it_touches_comes_first() -> None:
    async def scenario(source: Vm, destination: Vm) -> dict[str, int]:
        async with in_postcopy(source.spec, destination.spec, runs=True) as both:
            assert lacks_pages(destination)
            await eventually(lambda: destination.rounds() > 0)
            info = await both.there.execute("query-migrate")
            await both.finish()
            found: dict[str, int] = info["x-postcopy"]
            return found

    with pair() as (source, destination):
        counts = asyncio.run(scenario(source, destination))

        assert counts["faults"] > 0
        assert counts["demand-pages"] + counts["prefetch-pages"] > 0
        assert destination.goes_on()
        assert not lacks_pages(destination)


def test_a_guest_that_has_all_its_pages_goes_on_to_a_third_host() -> None:
    async def scenario(first: Vm, second: Vm, third: Vm) -> None:
        async with couple(first.spec, second.spec, *ROUNDS) as both:
            await both.migration.start_postcopy()
            await both.finish()
            await eventually(second.goes_on)
            async with start_destination(third.spec) as last:
                migration = await both.there.migrate(last, max_bandwidth=128 * MIB)
                await until(both.there, Status.ACTIVE)
                await migration.start_postcopy()
                await migration.result()
                await until(last, Status.COMPLETED)

    with pair() as (first, second), vm("-incoming", "defer") as third:
        asyncio.run(scenario(first, second, third))

        assert stand_as(second, third, "running")
        assert third.goes_on()
        assert is_let_go(second)
        assert not lacks_pages(third)


def test_a_stop_in_postcopy_is_kept_and_cont_ends_it() -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec, runs=True) as both:
            await both.there.execute("stop")
            assert destination.status == "paused"
            await both.finish()
            assert destination.status == "paused"
            await both.there.execute("cont")
            await eventually(lambda: destination.rounds() > 0)

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.goes_on()


def test_a_failure_before_the_token_leaves_the_guest_at_the_source() -> None:
    """The destination has promised nothing yet, and would wait for pages already."""

    async def scenario(source: Vm, destination: Vm) -> str:
        settings = ("pause-before-switchover=on",)
        async with couple(source.spec, destination.spec, *settings) as both:
            await both.migration.start_postcopy()
            await until(both.here, Status.PRE_SWITCHOVER)
            assert source.status == "paused"
            assert lacks_pages(destination)
            await both.migration.cancel()
            await eventually(source.goes_on)
            await both.there.wait()
            assert not lacks_pages(destination)
            return both.there.stderr

    with pair() as (source, destination):
        assert "the source gave up" in asyncio.run(scenario(source, destination))

        assert is_let_go(source)
        assert left_open(destination) == 0
        assert destination.status == "inmigrate"
