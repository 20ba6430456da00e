"""The journal as a file, and what the next process makes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.journal import (
    COMPACT_RECORDS,
    Began,
    Closed,
    Found,
    Journal,
    Moved,
    Promised,
    Record,
    Settled,
)
from engine.control.notifiers import Change, Moment, Side
from engine.control.restart import plan
from engine.control.status import Status
from engine.errors import UsageError
from engine.guest.spec import RamSpec, WorkloadSpec

BEGAN = Began(1234, "ram", None, None, "", False)
RAM = RamSpec(4096)


def read(directory: Path) -> Found | None:
    journal = Journal(str(directory))
    journal.close(in_order=False)
    return journal.found


def moved(side: Side, status: Status) -> Change:
    return Change(side, Status.NONE, status, Moment.BEFORE)


def test_what_was_said_is_found(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "new"))
    journal.begin(BEGAN)
    journal.moved(moved(Side.SOURCE, Status.SETUP))
    journal.moved(Change(Side.SOURCE, Status.SETUP, Status.ACTIVE, Moment.BEFORE))
    journal.moved(Change(Side.SOURCE, Status.SETUP, Status.ACTIVE, Moment.AFTER))
    journal.promised(Side.SOURCE)
    journal.close(in_order=False)

    found = read(tmp_path / "new")
    assert found == Found(BEGAN, Status.ACTIVE, Status.NONE, Side.SOURCE)


@pytest.mark.parametrize("settles", ["settled", "completed", "setup"])
def test_a_promise_holds_until_it_is_settled(tmp_path: Path, settles: str) -> None:
    journal = Journal(str(tmp_path))
    journal.begin(BEGAN)
    journal.promised(Side.DESTINATION)
    journal.moved(moved(Side.DESTINATION, Status.FAILED))
    found = _reread(tmp_path)
    assert found.is_unknown

    if settles == "settled":
        journal.settled(Side.DESTINATION)
    else:
        journal.moved(moved(Side.DESTINATION, Status(settles)))
    found = _reread(tmp_path)
    journal.close(in_order=False)
    assert not found.is_unknown


def _reread(directory: Path) -> Found:
    """While its writer lives: a copy."""
    copy = directory / "copy"
    copy.mkdir(exist_ok=True)
    (copy / "journal").write_bytes((directory / "journal").read_bytes())
    found = read(copy)
    assert found is not None
    return found


def test_an_orderly_end_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.begin(BEGAN)
    journal.close(in_order=True)
    journal.close(in_order=True)

    assert read(tmp_path) is None


def test_it_does_not_grow_with_the_number_of_migrations(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.begin(BEGAN)
    for _ in range(COMPACT_RECORDS):
        for status in (Status.SETUP, Status.ACTIVE, Status.FAILED):
            journal.moved(moved(Side.SOURCE, status))
    journal.close(in_order=False)

    assert (tmp_path / "journal").stat().st_size < 100 * COMPACT_RECORDS
    assert read(tmp_path) == Found(BEGAN, Status.FAILED)


records = st.one_of(
    st.just(BEGAN),
    st.builds(Moved, st.sampled_from(Side), st.sampled_from(Status)),
    st.builds(Promised, st.sampled_from(Side)),
    st.builds(Settled, st.sampled_from(Side)),
    st.just(Closed()),
)


@given(said=st.lists(records, max_size=12), cut=st.integers(0, 60))
def test_a_death_in_the_middle_of_a_line_loses_that_line_only(
    tmp_path_factory: pytest.TempPathFactory, said: list[Record], cut: int
) -> None:
    directory = tmp_path_factory.mktemp("j")
    lines = [_line(record) for record in said]
    text = b"".join(lines)
    kept = text[: max(0, len(text) - cut)]
    whole = kept[: kept.rfind(b"\n") + 1]
    (directory / "journal").write_bytes(kept)
    found = read(directory)
    (directory / "journal").write_bytes(whole)

    assert found == read(directory)


def _line(record: Record) -> bytes:
    import msgspec

    return msgspec.json.encode(record) + b"\n"


@pytest.mark.parametrize(
    "data", [b"{}\n", b"nonsense\n", b'{"record":"moved"}\n', b"\0" * 100 + b"\n"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "journal").write_bytes(data)

    with pytest.raises(UsageError, match="line 1 is no record"):
        Journal(str(tmp_path))
    assert (tmp_path / "journal").read_bytes() == data


def decide(found: Found | None, spec: RamSpec | WorkloadSpec, *, incoming: bool = False) -> str:
    """The plan in a word."""
    made = asyncio.run(plan(found, spec, incoming=incoming))
    if made.is_unknown:
        assert not made.runs
        return "stands"
    return "waits" if made.incoming else "runs"


@pytest.fixture
def kept(tmp_path: Path) -> RamSpec:
    (tmp_path / "ram").write_bytes(b"\0" * 4096)
    return RamSpec(4096, path=str(tmp_path / "ram"))


@pytest.mark.parametrize(
    ("found", "incoming", "expected"),
    [
        (None, False, "runs"),
        (None, True, "waits"),
        (Found(BEGAN), False, "runs"),
        (Found(BEGAN, Status.ACTIVE), False, "runs"),
        (Found(BEGAN, Status.DEVICE), False, "runs"),
        (Found(BEGAN, Status.DEVICE, promised=Side.SOURCE), False, "stands"),
        (Found(BEGAN, Status.FAILED, promised=Side.SOURCE), False, "stands"),
        (Found(BEGAN, destination=Status.ACTIVE), True, "waits"),
        (Found(BEGAN, destination=Status.ACTIVE, promised=Side.DESTINATION), True, "stands"),
        (Found(BEGAN, destination=Status.COMPLETED), True, "runs"),
    ],
)
def test_memory_that_has_a_name_never_runs_twice(
    kept: RamSpec, found: Found | None, incoming: bool, expected: str
) -> None:
    assert decide(found, kept, incoming=incoming) == expected


@pytest.mark.parametrize(
    ("found", "incoming", "expected"),
    [
        (Found(BEGAN, Status.ACTIVE), False, "runs"),
        (Found(BEGAN, Status.DEVICE, promised=Side.SOURCE), False, "stands"),
        (Found(BEGAN, destination=Status.ACTIVE, promised=Side.DESTINATION), True, "waits"),
        (Found(BEGAN, destination=Status.COMPLETED), True, "waits"),
    ],
)
def test_memory_without_a_name_went_with_its_process(
    found: Found, incoming: bool, expected: str
) -> None:
    assert decide(found, RAM, incoming=incoming) == expected


def test_a_guest_that_was_given_away_stays_away() -> None:
    with pytest.raises(UsageError, match="its guest runs at the destination"):
        decide(Found(BEGAN, Status.COMPLETED), RAM)
    with pytest.raises(UsageError, match="of kind 'ram', not 'workload'"):
        decide(Found(BEGAN), WorkloadSpec(4096))
