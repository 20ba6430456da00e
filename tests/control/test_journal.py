"""The journal as a file, and what the next process makes of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
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
    Postcopy,
    Promised,
    Record,
    Settled,
)
from engine.control.notifiers import Change, Moment, Side
from engine.control.restart import Paused, Plan, paused_of, plan
from engine.control.status import Status
from engine.errors import GuestError, NotHandedOver, UsageError
from engine.guest.base import Handover
from engine.guest.ram import RamGuest
from engine.guest.spec import RamSpec, WorkloadSpec, open_guest

BEGAN = Began(1234, "ram", None, None, "", False)
ARRIVING = Began(1234, "ram", None, None, "", True)
RAM = RamSpec(4096)
SESSION = bytes(range(16))


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
    copy.mkdir(mode=0o700, exist_ok=True)
    (copy / "journal").write_bytes((directory / "journal").read_bytes())
    found = read(copy)
    assert found is not None
    return found


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("end", ["completed", "failed", "setup", "settled"])
def test_a_postcopy_is_found_with_its_session_until_it_ends(
    tmp_path: Path, side: Side, is_known: bool, end: str
) -> None:
    journal = Journal(str(tmp_path))
    journal.begin(BEGAN)
    journal.promised(side, SESSION)
    if is_known:
        journal.postcopy(side, SESSION)
    for status in (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER):
        journal.moved(moved(side, status))
        found = _reread(tmp_path)
        assert found.is_unknown is not is_known
        sessions = {Side.SOURCE: found.source_session, Side.DESTINATION: found.destination_session}
        assert sessions.pop(side) == SESSION
        assert set(sessions.values()) == {None}
        assert f"in '{status.value}'" in found.story

    if end == "settled":
        journal.settled(side)
    else:
        journal.moved(moved(side, Status(end)))

    found = _reread(tmp_path)
    journal.close(in_order=False)
    assert found.source_session is None
    assert found.destination_session is None


def test_a_life_in_which_nobody_resumed_a_postcopy_says_so(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.begin(BEGAN, None, (Side.DESTINATION, SESSION))
    journal.close(in_order=False)

    found = read(tmp_path)
    assert found == Found(BEGAN, destination_session=SESSION)
    assert found.story.endswith("was killed; nobody had resumed its postcopy")


def test_a_promise_of_precopy_has_no_session(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.begin(BEGAN)
    journal.promised(Side.SOURCE)
    journal.close(in_order=False)

    assert read(tmp_path) == Found(BEGAN, promised=Side.SOURCE)


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
            journal.postcopy(Side.SOURCE, SESSION)
    journal.close(in_order=False)

    assert (tmp_path / "journal").stat().st_size < 100 * COMPACT_RECORDS
    assert read(tmp_path) == Found(BEGAN, Status.FAILED, source_session=SESSION)


records = st.one_of(
    st.just(BEGAN),
    st.builds(Moved, st.sampled_from(Side), st.sampled_from(Status)),
    st.builds(Promised, st.sampled_from(Side), st.sampled_from(["", SESSION.hex()])),
    st.builds(Postcopy, st.sampled_from(Side), st.just(SESSION.hex())),
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
    if not cut:
        began = [index for index, record in enumerate(said) if isinstance(record, Began)]
        closed = [index for index, record in enumerate(said) if isinstance(record, Closed)]
        assert (found is not None) == bool(began and began[-1] > max(closed, default=-1))


def _line(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


@pytest.mark.parametrize(
    "data",
    [
        b"{}\n",
        b"nonsense\n",
        b'{"record":"moved"}\n',
        b'{"record":"postcopy","side":"source","session":"0g"}\n',
        b"\0" * 100 + b"\n",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "journal").write_bytes(data)

    with pytest.raises(UsageError, match="line 1 is no record"):
        Journal(str(tmp_path))
    assert (tmp_path / "journal").read_bytes() == data


def decide(found: Found | None, spec: RamSpec | WorkloadSpec, *, incoming: bool = False) -> str:
    """The plan in a word."""
    try:
        made = asyncio.run(plan(found, spec, incoming=incoming))
    except UsageError:
        return "refused"
    if made.is_unknown:
        assert not made.runs
        assert made.given_up is Handover.UNKNOWN
        return "stands"
    if made.given_up is Handover.TAKEN:
        assert not made.runs
        assert made.paused == Paused(Side.SOURCE, SESSION)
        return "is gone"
    assert made.paused is None
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
        (Found(ARRIVING, destination=Status.ACTIVE), True, "waits"),
        (Found(ARRIVING, destination=Status.FAILED), True, "waits"),
        (Found(ARRIVING, destination=Status.ACTIVE), False, "refused"),
        (Found(ARRIVING, destination=Status.FAILED), False, "refused"),
        (Found(ARRIVING, destination=Status.ACTIVE, promised=Side.DESTINATION), True, "stands"),
        (Found(ARRIVING, destination=Status.COMPLETED), True, "runs"),
        (Found(BEGAN), True, "runs"),  # the third life of one that had arrived
        (Found(BEGAN, promised=Side.SOURCE), True, "stands"),
        (Found(BEGAN, Status.COMPLETED), False, "refused"),
        (Found(BEGAN, Status.POSTCOPY_PAUSED, source_session=SESSION), False, "is gone"),
        (Found(BEGAN, source_session=SESSION), True, "is gone"),  # the third life
        (
            Found(BEGAN, Status.DEVICE, promised=Side.SOURCE, source_session=SESSION),
            False,
            "stands",
        ),
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
        (Found(BEGAN, Status.DEVICE, promised=Side.SOURCE), False, "refused"),
        (Found(ARRIVING, destination=Status.ACTIVE, promised=Side.DESTINATION), True, "waits"),
        (Found(ARRIVING, destination=Status.COMPLETED), True, "waits"),
        (Found(BEGAN, Status.POSTCOPY_ACTIVE, source_session=SESSION), False, "refused"),
    ],
)
def test_memory_without_a_name_went_with_its_process(
    found: Found, incoming: bool, expected: str
) -> None:
    assert decide(found, RAM, incoming=incoming) == expected


def test_a_guest_that_its_user_had_stopped_stays_stopped(tmp_path: Path, kept: RamSpec) -> None:
    Path(str(kept.path)).touch()
    journal = Journal(str(tmp_path / "state"))
    journal.begin(BEGAN, is_stopped=True)
    for by_user, runs in ((None, False), (False, True), (True, False)):
        if by_user is not None:
            journal.stood(by_user=by_user)
        found = _reread(tmp_path / "state")
        made = asyncio.run(plan(found, kept, incoming=False))
        assert (made.runs, made.is_unknown) == (runs, False)
    for _ in range(2 * COMPACT_RECORDS):
        journal.stood(by_user=True)
    assert (tmp_path / "state" / "journal").stat().st_size < 100 * COMPACT_RECORDS
    assert _reread(tmp_path / "state").is_stopped
    journal.close(in_order=False)


def test_a_guest_that_was_given_away_stays_away() -> None:
    with pytest.raises(UsageError, match="its guest runs at the destination"):
        asyncio.run(plan(Found(BEGAN, Status.COMPLETED), RAM, incoming=False))
    with pytest.raises(UsageError, match="of kind 'ram', not 'workload'"):
        asyncio.run(plan(Found(BEGAN), WorkloadSpec(4096), incoming=False))
    gone = Began(1234, "workload", 2**22, 5, "/nonexistent", False)
    with pytest.raises(UsageError, match="its guest runs at the destination"):
        asyncio.run(
            plan(Found(gone, Status.FAILED, promised=Side.SOURCE), WorkloadSpec(4096),
                 incoming=False)
        )  # fmt: skip


def test_a_part_that_was_lost_in_postcopy_is_said(tmp_path: Path) -> None:
    gone = Began(1234, "workload", 2**22, 5, "/nonexistent", False)
    found = Found(gone, Status.POSTCOPY_ACTIVE, source_session=SESSION)
    with pytest.raises(UsageError, match="the part of its memory that was still here is lost"):
        asyncio.run(plan(found, WorkloadSpec(4096), incoming=False))
    arriving = Began(1234, "workload", 2**22, 5, "/nonexistent", True)
    found = Found(arriving, destination=Status.POSTCOPY_ACTIVE, destination_session=SESSION)
    made = asyncio.run(plan(found, WorkloadSpec(4096), incoming=True))
    assert made.incoming
    assert made.paused is None


@pytest.mark.parametrize("given_up", [Handover.TAKEN, Handover.UNKNOWN])
def test_memory_that_was_handed_over_stands_and_is_read(kept: RamSpec, given_up: Handover) -> None:
    async def scenario() -> None:
        guest = await open_guest(kept, incoming=False, run=False, given_up=given_up)
        assert isinstance(guest, RamGuest)
        start = Plan(kept, False, given_up=given_up, paused=Paused(Side.SOURCE, SESSION))
        paused, text = paused_of(start, guest)
        assert paused == start.paused
        assert "'migrate-recover' at the destination, and then 'migrate' with resume=true here" in (
            text
        )
        await guest.pause(for_migration=True)
        with pytest.raises(NotHandedOver):
            await guest.give_away()
        if given_up is Handover.UNKNOWN:
            await guest.settle(taken=True)  # the destination has said so
        with pytest.raises(GuestError, match="has been handed over"):
            await guest.resume(for_migration=False)
        await guest.quit()

    asyncio.run(scenario())


#: What a source and a destination of a `ram:` guest write, in this order, and who then runs.
SOURCE_LIFE: list[tuple[Record, str]] = [
    (Moved(Side.SOURCE, Status.SETUP), "runs"),
    (Moved(Side.SOURCE, Status.ACTIVE), "runs"),
    (Moved(Side.SOURCE, Status.DEVICE), "runs"),
    (Promised(Side.SOURCE), "stands"),
    (Moved(Side.SOURCE, Status.COMPLETED), "refused"),
]
POSTCOPY_LIFE: list[tuple[Record, str]] = [
    *SOURCE_LIFE[:3],
    (Promised(Side.SOURCE, SESSION.hex()), "stands"),
    (Moved(Side.SOURCE, Status.POSTCOPY_ACTIVE), "stands"),
    (Postcopy(Side.SOURCE, SESSION.hex()), "is gone"),
    (Moved(Side.SOURCE, Status.POSTCOPY_PAUSED), "is gone"),
    (Moved(Side.SOURCE, Status.POSTCOPY_RECOVER), "is gone"),
    (Moved(Side.SOURCE, Status.COMPLETED), "refused"),
]
DESTINATION_LIFE: list[tuple[Record, str]] = [
    (Moved(Side.DESTINATION, Status.SETUP), "waits"),
    (Moved(Side.DESTINATION, Status.ACTIVE), "waits"),
    (Promised(Side.DESTINATION), "stands"),
    (Moved(Side.DESTINATION, Status.COMPLETED), "runs"),
]


@pytest.mark.parametrize(
    ("began", "life"),
    [(BEGAN, SOURCE_LIFE), (ARRIVING, DESTINATION_LIFE), (BEGAN, POSTCOPY_LIFE)],
)
def test_killed_after_any_record_and_killed_again(
    tmp_path: Path, kept: RamSpec, began: Began, life: list[tuple[Record, str]]
) -> None:
    """Two lives later the answer is the same: nothing is forgotten by looking."""
    for count in range(1, len(life) + 1):
        directory = tmp_path / f"state-{count}"
        directory.mkdir(mode=0o700)
        lines = [_line(began), *(_line(record) for record, _ in life[:count])]
        (directory / "journal").write_bytes(b"".join(lines))
        expected = life[count - 1][1]
        for _ in range(2):
            journal = Journal(str(directory))
            found = journal.found
            assert decide(found, kept, incoming=began.incoming) == expected
            if expected != "refused":  # a control process begins, and is killed
                waits = expected == "waits"
                promised = Side.SOURCE if expected == "stands" else None
                session = found.source_session if found is not None else None
                postcopy = None if session is None else (Side.SOURCE, session)
                journal.begin(Began(1, "ram", None, None, "", waits), promised, postcopy)
            journal.close(in_order=False)


def test_what_cannot_be_put_on_record_is_not_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(str(tmp_path / "j"))
    journal.begin(BEGAN)
    before = (tmp_path / "j" / "journal").read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))  # a disk that fills up
        with pytest.raises(NotHandedOver):
            journal.promised(Side.SOURCE)
    assert (tmp_path / "j" / "journal").read_bytes() == before

    journal.promised(Side.SOURCE)
    journal.close(in_order=True)
    found = read(tmp_path / "j")
    assert found is not None
    assert found.is_unknown
