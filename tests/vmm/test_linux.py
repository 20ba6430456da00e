"""A Linux guest goes from QEMU to QEMU and never notices."""

from __future__ import annotations

import asyncio
import contextlib
import time
from itertools import cycle, islice
from typing import Final

import numpy as np
import pytest

import engine
from engine.control.status import Status
from engine.memory.blocks import PAGE_SIZE
from tests.support import eventually
from tests.vmm import linux
from tests.vmm.linux import needs_linux
from tests.vmm.machines import Vm, needs_qemu, vm
from tests.vmm.postcopy_rig import couple, needs_kernel_faults, until

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu, needs_kernel_faults, needs_linux]

MIGRATIONS: Final = 20
ROUNDS: Final = {"precopy": 3, "postcopy": 0, "hybrid": 2}  #: at least, before the guest moves
CODECS: Final = (
    ("multifd-compression=none",),
    ("multifd-compression=lz4",),
    ("multifd-compression=zstd",),
    ("multifd-compression=none", "xbzrle=on"),
)
#: The guest writes more in each round than it could be stopped for.
LIMITS: Final = ("max-bandwidth=256M", "downtime-limit=1")
LIMIT_MS: Final = 60_000  #: however slow the machine is, the rounds end
SOME: Final = 16  #: each one that is found takes the guest some time
BOOT_WAIT_S: Final = 240.0  #: it takes 7 s on a machine that does nothing else
POISON: Final = 0xAA  #: what the kernel fills free memory with


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return linux.options(linux.initramfs(tmp_path_factory.mktemp("linux")))


async def migrate(source: Vm, destination: Vm, way: str, *codec: str) -> engine.Statistics:
    async with couple(source.spec, destination.spec, *LIMITS, *codec) as both:
        async for progress in both.migration.progress(0.01):
            if progress.status is Status.ACTIVE and progress.rounds > ROUNDS[way]:
                break
        if way == "precopy":
            await both.here.execute("migrate-set-parameters", downtime_limit=LIMIT_MS)
        else:
            await both.migration.start_postcopy()
        await both.hurry()
        result = await both.migration.result()
        await until(both.there, Status.COMPLETED)
        return result


@pytest.mark.timeout(900)
def test_a_linux_guest_survives_twenty_migrations_back_and_forth(options: tuple[str, ...]) -> None:
    """From each QEMU to a new one, and the old one ends: in each way, with each codec."""
    began_s, serial, log = time.monotonic(), "", ""
    with contextlib.ExitStack() as place:
        here = place.enter_context(vm(*options, mib=linux.MIB))
        assert eventually(lambda: here.rounds() > 2, BOOT_WAIT_S), here.wrote("kernel")
        for way, codec in islice(zip(cycle(ROUNDS), cycle(CODECS), strict=False), MIGRATIONS):
            with contextlib.ExitStack() as other_place:
                there = other_place.enter_context(vm(*options, "-incoming", "defer", mib=linux.MIB))
                result = asyncio.run(migrate(here, there, way, *codec))
                assert bool(result.postcopy) == (way != "precopy")
                assert there.goes_on(), (way, codec, there.status, there.wrote("kernel"))
                serial, log = serial + here.wrote("serial"), log + here.wrote("kernel")
                place.close()
                place.push(other_place.pop_all())
                here = there
        assert here.goes_on()
        elapsed_s = time.monotonic() - began_s
        serial, log = serial + here.wrote("serial"), log + here.wrote("kernel")
    assert linux.check_said(serial, elapsed_s) > 2 * MIGRATIONS
    assert "Run /init" in log
    assert linux.trouble(log) == []


def test_program_and_kernel_tell_when_memory_is_not_theirs(options: tuple[str, ...]) -> None:
    """Who finds nothing wrong in the other test has looked."""
    with vm(*options, mib=linux.MIB) as machine:
        assert eventually(lambda: machine.rounds() > 2, BOOT_WAIT_S)
        assert linux.trouble(machine.wrote("kernel")) == []
        machine.monitor.ask("stop")
        memory = np.fromfile(machine.rams[0], np.uint8).reshape(-1, PAGE_SIZE)
        words = memory.view(np.uint64)
        is_swept = (words >> 28 & 0xFFF == np.arange(PAGE_SIZE // 8)).all(axis=1)
        assert is_swept.sum() > linux.SWEPT_MIB
        memory[np.flatnonzero(is_swept)[::SOME], 1000] ^= 1
        is_free = (memory == POISON).all(axis=1)
        memory[np.flatnonzero(is_free)[::SOME], 1000] ^= 1
        with machine.rams[0].open("r+b") as file:
            memory.tofile(file)
        machine.monitor.ask("cont")

        assert eventually(lambda: any(what == "W" for what, _ in machine.said()))
        assert eventually(lambda: bool(linux.trouble(machine.wrote("kernel"))))
