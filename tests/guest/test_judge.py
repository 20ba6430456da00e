"""Judging: one changed byte anywhere, an old page, a lost page, all show."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _native
from engine.errors import GuestError
from engine.guest.judgement import WRONG, Judgement, Verdict, compare, verdict
from engine.guest.messages import Options
from engine.guest.vcpus import Machine
from engine.memory.blocks import PAGE_SIZE
from tests.support import eventually

PAGES = 640
CONTENTS = ("zero", "text", "heap", "random", "mixed")


def new_ram() -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    return fd


def options(contents: str = "mixed", pattern: str = "random", words: int = 8) -> Options:
    return Options(2, pattern, 0, words, contents, 5)


def written_machine(contents: str = "mixed", pattern: str = "random") -> Machine:
    """Filled, written some thousand times, paused."""
    machine = Machine(new_ram(), PAGES * PAGE_SIZE, options(contents, pattern))
    machine.fill()
    machine.resume()
    assert eventually(lambda: machine.writes() > 5000)
    machine.pause()
    return machine


def judge(machine: Machine) -> Judgement:
    judgement = machine.judge()
    return Judgement(
        judgement.wrong_pages,
        judgement.first_wrong,
        judgement.page_writes_sum,
        machine.writes(),
        judgement.counters_fd,
    )


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("pattern", ["sweep", "random", "hotspot", "append"])
def test_a_written_guest_is_right_whatever_its_contents_and_pattern(
    contents: str, pattern: str
) -> None:
    machine = written_machine(contents, pattern)

    judgement = judge(machine)

    assert judgement.is_right
    assert judgement.page_writes_sum > 5000
    assert compare(judgement, judgement).is_right
    judgement.close()
    machine.close()


def test_one_changed_byte_anywhere_shows_and_in_the_right_page() -> None:
    machine = written_machine()
    right = judge(machine)

    @settings(max_examples=200, deadline=None)
    @given(
        st.integers(min_value=0, max_value=PAGES * PAGE_SIZE - 1),
        st.integers(min_value=1, max_value=255),
    )
    def change(offset: int, change: int) -> None:
        with mmap.mmap(machine.ram_fd, 0) as ram:
            ram[offset] ^= change
            judgement = judge(machine)
            ram[offset] ^= change
        assert judgement.wrong_pages == 1
        assert judgement.first_wrong == offset // PAGE_SIZE
        assert not judgement.is_right
        assert compare(right, judgement).wrong_pages == 1
        judgement.close()

    change()
    right.close()
    machine.close()


def test_a_page_that_is_older_than_at_the_source_shows_though_it_is_right_by_itself() -> None:
    machine = written_machine("random", "sweep")
    with mmap.mmap(machine.ram_fd, 0) as ram:
        old = ram[7 * PAGE_SIZE : 8 * PAGE_SIZE]
        machine.resume()
        assert eventually(lambda: ram[7 * PAGE_SIZE : 8 * PAGE_SIZE] != old)
        machine.pause()
        source = judge(machine)
        ram[7 * PAGE_SIZE : 8 * PAGE_SIZE] = old

        destination = judge(machine)

    assert destination.wrong_pages == 0
    assert not destination.is_right
    assert compare(source, destination).wrong_pages == 1
    assert compare(source, destination).lost_writes > 0
    for judgement in (source, destination):
        judgement.close()
    machine.close()


@pytest.mark.parametrize("contents", ["text", "mixed"])
def test_a_lost_page_shows_though_it_is_a_hole_that_is_not_touched(contents: str) -> None:
    machine = written_machine(contents, "sweep")
    source = judge(machine)
    with mmap.mmap(machine.ram_fd, 0) as ram:
        lost = next(
            i for i in range(PAGES) if ram[i * PAGE_SIZE + 8 : (i + 1) * PAGE_SIZE].strip(b"\0")
        )
    allocated = os.fstat(machine.ram_fd).st_blocks
    _native.punch_hole(machine.ram_fd, lost * PAGE_SIZE, PAGE_SIZE)

    destination = judge(machine)

    assert not destination.is_right
    assert compare(source, destination).wrong_pages == 1
    assert os.fstat(machine.ram_fd).st_blocks == allocated - 8
    for judgement in (source, destination):
        judgement.close()
    machine.close()


def test_a_guest_of_another_size_is_another_guest() -> None:
    small, large = os.memfd_create("small"), os.memfd_create("large")
    os.ftruncate(small, 8 * 10)
    os.ftruncate(large, 8 * 11)

    with pytest.raises(GuestError, match="10 pages at the source, 11 at the destination"):
        compare(Judgement(0, -1, 0, 0, small), Judgement(0, -1, 0, 0, large))

    os.close(small)
    os.close(large)


@pytest.mark.parametrize(
    ("before", "after", "page_writes", "right_verdict"),
    [
        ([1, 2], [1, 3], 4, Verdict(2, 0, 0)),
        ([1, 2], [1, 1], 4, Verdict(2, 1, 0)),
        ([1, WRONG], [1, 3], 4, Verdict(2, 1, 0)),
        ([1, 2], [WRONG, 3], 4, Verdict(2, 1, 0)),
        ([WRONG, WRONG], [WRONG, 0], 4, Verdict(2, 2, 0)),
        ([1, 2], [1, 3], 3, Verdict(2, 0, 1)),
        ([1, 2], [1, 3], 5, Verdict(2, 0, 1)),
    ],
)
def test_wrong_on_either_side_older_or_lost_is_not_right(
    tmp_path: Path, before: list[int], after: list[int], page_writes: int, right_verdict: Verdict
) -> None:
    for name, counters in (("before", before), ("after", after)):
        (tmp_path / name).write_bytes(struct.pack("2Q", *counters))

    found = verdict(tmp_path / "before", tmp_path / "after", page_writes, 4)

    assert found == right_verdict
    assert found.is_right is (right_verdict == Verdict(2, 0, 0))


def test_a_never_touched_guest_stays_unallocated_when_it_is_judged() -> None:
    machine = Machine(new_ram(), PAGES * PAGE_SIZE, options("zero"))
    machine.fill()

    judgement = judge(machine)

    assert judgement.is_right
    assert os.fstat(machine.ram_fd).st_blocks == 0
    judgement.close()
    machine.close()


def test_a_state_moves_to_a_machine_with_other_options_and_the_sum_goes_on() -> None:
    source = written_machine("heap", "hotspot")
    destination = Machine(new_ram(), PAGES * PAGE_SIZE, Options(1, "sweep", 1, 1, "zero", 9))
    with mmap.mmap(source.ram_fd, 0) as here, mmap.mmap(destination.ram_fd, 0) as there:
        there[:] = here[:]

    destination.load(source.save())
    destination.resume()

    assert eventually(lambda: destination.writes() > source.writes() + 1000)
    destination.pause()
    first, second = judge(source), judge(destination)
    assert destination.options == source.options
    assert second.is_right
    assert compare(first, second).is_right
    for judgement in (first, second):
        judgement.close()
    source.close()
    destination.close()


def test_a_hostile_state_is_refused_and_changes_nothing() -> None:
    source = written_machine()
    state = source.save()
    destination = Machine(new_ram(), PAGES * PAGE_SIZE, options())

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def load(data: st.DataObject) -> None:
        index = data.draw(st.integers(min_value=0, max_value=len(state) - 1))
        damaged = bytearray(
            state[: data.draw(st.integers(min_value=index + 1, max_value=len(state)))]
        )
        damaged[index] ^= data.draw(st.integers(min_value=1, max_value=255))
        before = destination.save()

        with pytest.raises(GuestError) as caught:
            destination.load(bytes(damaged))

        assert "\n" not in str(caught.value)
        assert destination.save() == before

    load()
    source.close()
    destination.close()
