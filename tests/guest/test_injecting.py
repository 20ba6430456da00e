"""How long processes are waited for that shall open a userfaultfd, on a clock that a test plays."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from engine import _native
from engine.errors import MemoryRefused
from engine.guest import foreign_tracking, injecting
from engine.guest.back_ends import BackEnd, track_all
from engine.guest.foreign_missing import open_foreign_missing
from engine.guest.foreignguest import LONG_WAIT_S
from engine.guest.injecting import INJECT_WAIT_NS, CannotInject, Injector
from engine.memory.blocks import PAGE_SIZE, RamBlock
from tests.support import open_descriptors


@dataclass
class Slow:
    """Processes that open a userfaultfd after so many ns of a clock, if there is so much time."""

    costs: dict[int, int]
    now_ns: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_native, "inject_userfaultfd", self.inject)
        monkeypatch.setattr(injecting, "time", SimpleNamespace(monotonic_ns=lambda: self.now_ns))

    def inject(self, pid: int, _flags: int, wait_ns: int, _keeps: bool) -> tuple[int, ...]:
        cost = self.costs.get(pid, 0)
        self.now_ns += min(cost, wait_ns)
        if cost > wait_ns:
            return (_native.INJECT_NO_SAFE_THREAD, -1, -1, 0, 0, 0, 1)
        return (_native.INJECT_DONE, os.open(os.devnull, os.O_RDONLY), -1, 0, 1, 1000, 1)


@pytest.fixture
def several() -> Iterator[list[BackEnd]]:
    with contextlib.ExitStack() as undo:
        found = []
        for _ in range(7):
            child = undo.enter_context(subprocess.Popen(["sleep", "60"]))
            undo.callback(child.kill)
            found.append(undo.enter_context(contextlib.closing(BackEnd.open(child.pid))))
        yield found


@pytest.mark.parametrize("cost_ns", [3_000_000_000, 3_900_000_000])  # at the sixth; in its middle
def test_all_back_ends_together_are_waited_for_no_longer_than_control_waits(
    cost_ns: int, several: list[BackEnd], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow({each.pid: cost_ns for each in several} | {several[1].pid: 4_900_000_000})
    slow.install(monkeypatch)
    monkeypatch.setattr(foreign_tracking, "_negotiate", lambda *_: None)
    before = open_descriptors()

    with pytest.raises(MemoryRefused, match=rf"process {several[1].pid}, took 4\.9 s"):
        track_all(os.getpid(), [], several)

    assert slow.now_ns <= LONG_WAIT_S * 1e9 / 2
    assert open_descriptors() == before


def test_all_blocks_of_a_process_together_are_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Slow({os.getpid(): 4_500_000_000})
    slow.install(monkeypatch)
    before = open_descriptors()

    with pytest.raises(MemoryRefused, match=rf"process {os.getpid()}, took 4\.5 s"):
        open_foreign_missing(os.getpid(), [(RamBlock("ram", PAGE_SIZE, -1), 0)] * 100)

    assert slow.now_ns <= LONG_WAIT_S * 1e9 / 2
    assert open_descriptors() == before


def test_one_process_alone_is_told_of_by_what_is_in_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Slow({1: INJECT_WAIT_NS + 1})
    slow.install(monkeypatch)

    with pytest.raises(CannotInject, match="no thread of process 1 can be stopped"):
        Injector().open(1, 0)

    assert slow.now_ns == INJECT_WAIT_NS
