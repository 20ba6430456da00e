"""A real, unmodified QEMU goes to another one while its guest sweeps its memory."""

from __future__ import annotations

import asyncio

import pytest

import engine
from tests.vmm.machines import Vm, needs_qemu, pair

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu]


async def migrate(source: Vm, destination: Vm, **parameters: object) -> engine.Statistics:
    """One whole migration; QEMU's own monitor stops the guest as soon as it is there."""
    here = engine.Control.start(source.spec)
    there = engine.Control.start(destination.spec, "tcp:127.0.0.1:0")
    async with here, there:
        migration = await here.migrate(
            there, multifd_channels=2, max_bandwidth=0, downtime_limit=2000, **parameters
        )
        return await migration.result()


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_guest_that_was_stopped_arrives_byte_by_byte_and_stays_stopped(blocks: int) -> None:
    with pair(blocks=blocks) as (source, destination):
        source.monitor.ask("stop")

        result = asyncio.run(migrate(source, destination))

        assert source.memory() == destination.memory()
        assert (source.status, destination.status) == ("postmigrate", "paused")
        assert result.tracker == "uffd-wp"
        destination.monitor.ask("cont")
        assert destination.goes_on()


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_guest_that_runs_goes_on_and_finds_no_page_wrong(blocks: int) -> None:
    with pair(blocks=blocks) as (source, destination):
        result = asyncio.run(migrate(source, destination))

        assert (source.status, destination.status) == ("postmigrate", "running")
        before = source.rounds()
        assert destination.goes_on()
        assert destination.said()[0][1] in (before, before + 1)
        assert destination.rounds() > before
        assert result.rounds >= 2
        assert result.downtime_ms is not None
