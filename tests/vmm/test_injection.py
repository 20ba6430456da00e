"""A userfaultfd out of a real QEMU, whatever becomes of the one who wants it."""

from __future__ import annotations

import contextlib
import os
import statistics
from pathlib import Path

import pytest

from engine import _native
from tests.support import eventually
from tests.vmm.killer import run_and_kill
from tests.vmm.machines import Vm, needs_qemu, vm

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu]
WAIT_NS = 20_000_000_000
STOP_NS_MAX = 1_000_000_000  #: how long is typical is measured elsewhere


def left_open(machine: Vm) -> int:
    """Its userfaultfds; other descriptors come and go."""
    found = 0
    for each in Path(f"/proc/{machine.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += "userfaultfd" in os.readlink(each)
    return found


def tracer(machine: Vm) -> str:
    lines = Path(f"/proc/{machine.pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("TracerPid"))


def test_how_long_a_thread_of_qemu_stands_is_told_and_no_descriptor_stays() -> None:
    with vm() as machine:
        assert eventually(lambda: machine.rounds() > 2)
        stops = []
        for _ in range(20):
            obstacle, uffd, left, *_, stopped_ns, _ = _native.inject_userfaultfd(
                machine.pid, _native.UFFD_USER_MODE_ONLY, WAIT_NS
            )
            assert obstacle == _native.INJECT_DONE
            assert left == -1
            os.close(uffd)
            stops.append(stopped_ns)
        assert left_open(machine) == 0
        assert min(stops) > 0
        assert statistics.median(stops) < STOP_NS_MAX
        assert machine.goes_on()


def test_qemu_lives_on_when_the_injector_is_killed_at_any_of_its_calls() -> None:
    with vm() as machine:
        assert eventually(lambda: machine.rounds() > 2)
        calls = 0
        while run_and_kill(machine.pid, calls):
            assert machine.status == "running"
            assert machine.goes_on()
            assert tracer(machine) == "0"
            calls += 1
        assert calls > 20  # two stops a call
        assert left_open(machine) <= calls  # of a kill between opening and closing
        assert machine.goes_on()


def test_a_qemu_in_its_sandbox_is_used_or_refused_but_not_killed() -> None:
    with vm("-sandbox", "on") as machine:
        assert eventually(lambda: machine.rounds() > 2)
        obstacle, uffd, *_ = _native.inject_userfaultfd(
            machine.pid, _native.UFFD_USER_MODE_ONLY, WAIT_NS
        )

        if uffd >= 0:
            os.close(uffd)
        assert obstacle in (_native.INJECT_DONE, _native.INJECT_FILTERED)
        assert machine.goes_on()
