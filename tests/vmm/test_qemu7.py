"""QEMU 7.2, the one of Debian 12: unmodified, beside the newer one and together with it.

It maps memory where nothing but its files tells, and leaves shared RAM without a name to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Final

import pytest

from tests.vmm import machines, test_end_to_end, test_postcopy
from tests.vmm.machines import FETCHED, QEMU, SETTINGS, Vm, needs_qemu
from tests.vmm.postcopy_rig import lacks_pages, needs_kernel_faults
from tests.vmm.test_end_to_end import is_let_go, stand_as
from tests.vmm.test_injection import left_open

QEMU7: Final = os.environ.get("RAMFERRY_QEMU7", f"{FETCHED}/qemu7/usr/bin/{QEMU}")
MEMFD: Final = ["-object", "memory-backend-memfd,id=ram0,size=64M,share=on", "-m", "64"]
pytestmark = [
    pytest.mark.guest,
    pytest.mark.process,
    pytest.mark.skipif(
        not os.access(QEMU7, os.X_OK),
        reason="needs a QEMU 7.2: run tests/vmm/fetch.sh, or name one in RAMFERRY_QEMU7",
    ),
    needs_kernel_faults,
]


@contextlib.contextmanager
def pair(
    *options: str, newer: str = QEMU7, memory: list[str] | None = None, is_filled: bool = False
) -> Iterator[tuple[Vm, Vm]]:
    """A QEMU 7.2, and another one or a newer one that waits."""
    how = machines.pair(*options, memory=memory, is_filled=is_filled, qemus=(QEMU7, newer))
    with how as (source, destination):
        assert source.monitor.ask("query-version")["qemu"]["major"] == 7
        yield source, destination


def migrate(source: Vm, destination: Vm, way: str, *, runs: bool = True) -> None:
    if way == "precopy":
        asyncio.run(test_end_to_end.migrate(source, destination, stands=not runs))
    else:
        rounds = 2 if way == "hybrid" else 0
        asyncio.run(test_postcopy.migrate(source, destination, rounds=rounds, runs=runs))


def check_goes_on(source: Vm, destination: Vm, way: str) -> None:
    """Migrate a guest that runs on its arrival."""
    migrate(source, destination, way)
    assert stand_as(source, destination, "running")
    assert destination.goes_on()


@pytest.mark.parametrize("way", ["precopy", "postcopy", "hybrid"])
def test_a_guest_arrives_byte_by_byte_and_nothing_is_left_behind(way: str) -> None:
    with pair(is_filled=True) as (source, destination):
        before = []
        for each in (source, destination):
            before += [each.monitor.ask(f"query-migrate-{what}") for what in SETTINGS]

        migrate(source, destination, way, runs=False)

        assert source.memory() == destination.memory()
        assert stand_as(source, destination, "paused")
        assert is_let_go(source)
        assert not lacks_pages(destination)
        assert left_open(destination) == 0
        after = []
        for each in (source, destination):
            after += [each.monitor.ask(f"query-migrate-{what}") for what in SETTINGS]
        assert after == before
        destination.monitor.ask("cont")
        assert destination.goes_on()


@pytest.mark.parametrize("way", ["precopy", "hybrid"])
def test_a_guest_in_a_memfd_goes_on(way: str) -> None:
    with pair("-machine", "memory-backend=ram0", memory=MEMFD) as (source, destination):
        check_goes_on(source, destination, way)


@needs_qemu
@pytest.mark.parametrize("way", ["precopy", "postcopy"])
def test_a_guest_goes_to_a_newer_qemu(way: str) -> None:
    with pair("-machine", "pc-i440fx-7.2", newer=QEMU) as (source, destination):
        check_goes_on(source, destination, way)
