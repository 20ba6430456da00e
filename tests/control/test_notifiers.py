"""Callbacks on status changes: order, veto, and what a wrong callback cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine import wire
from engine.control import machine
from engine.control.conversation import Conversation
from engine.control.host import Host
from engine.control.notifiers import Change, Moment, Notifiers, Side
from engine.control.outgoing import OutgoingMigration
from engine.control.parameters import ParameterStore
from engine.control.process import ControlProcess
from engine.control.status import Status, check_incoming
from engine.control.uri import Address
from engine.errors import MigrationError, StateError, WireError
from engine.guest.base import Handover
from engine.guest.spec import open_guest, parse_guest_spec
from tests.kernel import has_userfaultfd

SETUP = Change(Side.SOURCE, Status.NONE, Status.SETUP, Moment.BEFORE)


def test_everybody_is_told_in_order_until_they_leave() -> None:
    notifiers, heard = Notifiers(), list[tuple[str, Change]]()
    leave = notifiers.add(lambda change: heard.append(("first", change)))
    notifiers.add(lambda change: heard.append(("second", change)))

    assert notifiers.tell(SETUP) is None
    leave()
    leave()
    notifiers.tell(SETUP)

    assert heard == [("first", SETUP), ("second", SETUP), ("second", SETUP)]


def _refuse(_: Change) -> None:
    raise MigrationError("not today")


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("moment", Moment)
@pytest.mark.parametrize("status", [Status.SETUP, Status.ACTIVE])
def test_only_the_setup_of_a_source_can_be_refused(
    side: Side, moment: Moment, status: Status
) -> None:
    notifiers = Notifiers()
    notifiers.add(_refuse)

    veto = notifiers.tell(Change(side, Status.NONE, status, moment))

    is_refusable = (side, status, moment) == (Side.SOURCE, Status.SETUP, Moment.BEFORE)
    assert veto == ("not today" if is_refusable else None)


def test_a_bug_in_a_callback_keeps_nobody_else_from_hearing() -> None:
    notifiers, heard = Notifiers(), list[Change]()
    notifiers.add(lambda _: 1 / 0)  # type: ignore[arg-type]
    notifiers.add(heard.append)

    assert notifiers.tell(SETUP) is None
    assert heard == [SETUP]


LEGAL = {
    (Status.NONE, Status.SETUP), (Status.SETUP, Status.ACTIVE), (Status.SETUP, Status.FAILED),
    (Status.ACTIVE, Status.COMPLETED), (Status.ACTIVE, Status.FAILED),
    (Status.ACTIVE, Status.POSTCOPY_ACTIVE),
    (Status.POSTCOPY_ACTIVE, Status.COMPLETED), (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED),
    (Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER),
    (Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE),
    (Status.POSTCOPY_RECOVER, Status.POSTCOPY_PAUSED),
    *((one, Status.FAILED) for one in (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED,
                                       Status.POSTCOPY_RECOVER)),
}  # fmt: skip


@pytest.mark.parametrize("before", Status)
@pytest.mark.parametrize("after", Status)
def test_a_destination_goes_only_where_qemus_goes(before: Status, after: Status) -> None:
    if (before, after) in LEGAL:
        check_incoming(before, after)
        return
    with pytest.raises(StateError):
        check_incoming(before, after)


class SilentHost:
    """As much of a host as the source's driver needs before it connects."""

    def __init__(self) -> None:
        self.notifiers = Notifiers()
        self.events: list[str] = []
        self.guest: Any = None
        self.parameters = ParameterStore(lambda _: False).values

    def capability(self, _: str) -> bool:
        return False

    def emit(self, _: str, data: dict[str, Any]) -> None:
        self.events.append(data["status"])


def test_a_callback_that_cancels_is_heard_after_the_change_that_it_was_told_of() -> None:
    async def scenario() -> list[str]:
        host = SilentHost()
        outgoing = OutgoingMigration(cast(Host, host), Conversation(Address("127.0.0.1", 1)))
        outgoing._give_back = _nothing  # type: ignore[method-assign,assignment]
        outgoing._connect = _for_ever  # type: ignore[method-assign]
        heard = list[tuple[Status, Moment]]()

        def cancel(change: Change) -> None:
            heard.append((change.status, change.moment))
            if change.status is Status.SETUP and change.moment is Moment.BEFORE:
                outgoing.handle(machine.Cancel())

        host.notifiers.add(cancel)
        outgoing.handle(machine.Start())
        await asyncio.wait_for(outgoing.ended.wait(), 60)
        assert heard == [
            (status, moment)
            for status in (Status.SETUP, Status.CANCELLING, Status.CANCELLED)
            for moment in (Moment.BEFORE, Moment.AFTER)
        ]
        return host.events

    assert asyncio.run(scenario()) == ["setup", "cancelling", "cancelled"]


def test_who_is_told_of_the_end_knows_that_the_outcome_is_unknown() -> None:
    async def scenario() -> list[tuple[Status, bool]]:
        host = SilentHost()
        outgoing = OutgoingMigration(cast(Host, host), Conversation(Address("127.0.0.1", 1)))
        outgoing._give_back = _nothing  # type: ignore[method-assign,assignment]
        outgoing._hand_over = _for_ever  # type: ignore[method-assign]
        outgoing.machine.phase, outgoing.machine.status = machine.Phase.ARMING, Status.DEVICE
        host.guest = SimpleNamespace(is_alive=False)
        outgoing.handle(machine.DestinationArmed())
        seen = [(outgoing.status, outgoing.is_outcome_unknown)]
        host.notifiers.add(lambda _: seen.append((outgoing.status, outgoing.is_outcome_unknown)))
        outgoing.handle(machine.HandedOver(Handover.UNKNOWN))
        seen.append((outgoing.status, outgoing.is_outcome_unknown))
        await asyncio.wait_for(outgoing.ended.wait(), 10)
        return seen

    seen = asyncio.run(scenario())
    assert seen[0] == (Status.DEVICE, False)
    assert {is_unknown for _, is_unknown in seen[1:]} == {True}


@pytest.mark.parametrize("late", [machine.Cancel(), machine.Failure("late"), None])
def test_it_ends_when_all_is_given_back_whatever_comes_late(late: machine.Event | None) -> None:
    """None: giving back fails itself."""

    async def scenario() -> None:
        host, may_end = SilentHost(), asyncio.Event()
        outgoing = OutgoingMigration(cast(Host, host), Conversation(Address("127.0.0.1", 1)))

        async def give_back(_: object) -> None:
            await may_end.wait()
            if late is None:
                raise MigrationError("it does not want to go")

        outgoing._give_back = give_back  # type: ignore[method-assign,assignment]
        outgoing._hand_over = _for_ever  # type: ignore[method-assign]
        outgoing.machine.phase, outgoing.machine.status = machine.Phase.ARMING, Status.DEVICE
        outgoing.handle(machine.DestinationArmed())
        outgoing.handle(machine.HandedOver(Handover.TAKEN))
        assert outgoing.status is Status.COMPLETED
        if late is not None:
            outgoing.handle(late)
        assert not outgoing.ended.is_set()
        may_end.set()
        await asyncio.wait_for(outgoing.ended.wait(), 10)
        assert host.events[-1] == "completed"

    asyncio.run(scenario())


@pytest.mark.parametrize("is_asked", [False, True])
def test_armed_is_an_answer_to_arm_alone(is_asked: bool) -> None:
    async def scenario() -> bool:
        conversation = Conversation(Address("127.0.0.1", 1))
        heard = asyncio.Queue[wire.Message]()
        sent = list[wire.Message]()
        conversation._main = SimpleNamespace(receive=heard.get, send=_keep(sent))  # type: ignore[assignment]
        listening = asyncio.ensure_future(conversation.listen(cast(Any, None)))
        arming = None
        if is_asked:
            arming = asyncio.ensure_future(conversation.arm(cast(Any, None), b"", 1, True))
            while not any(isinstance(one, wire.Arm) for one in sent):
                await asyncio.sleep(0)
        heard.put_nowait(wire.Armed())
        if arming is not None:
            await asyncio.wait_for(arming, 10)
            listening.cancel()
        failed = await asyncio.wait_for(asyncio.gather(listening, return_exceptions=True), 10)
        return isinstance(failed[0], WireError)

    assert asyncio.run(scenario()) is not is_asked


def _keep(sent: list[wire.Message]) -> Callable[[wire.Message], Awaitable[None]]:
    async def send(message: wire.Message) -> None:
        sent.append(message)

    return send


async def _nothing(_: object) -> None:
    """Nothing was taken."""


async def _for_ever() -> None:
    await asyncio.Event().wait()


# -- postcopy, with two control processes in this one ----------------------------------------------

SETTINGS = ("postcopy-ram=on", "max-bandwidth=1M", "downtime-limit=1", "max-postcopy-bandwidth=4k")
GUEST = "workload:size=4M"
HERE = Address("127.0.0.1", 0)


@contextlib.asynccontextmanager
async def control(
    spec: str, *, incoming: bool
) -> AsyncIterator[tuple[ControlProcess, list[Change]]]:
    """One, and all that its notifiers are told."""
    guest = await open_guest(parse_guest_spec(spec), incoming=incoming)
    process, heard = ControlProcess(guest, incoming=incoming), list[Change]()
    try:
        process.notifiers.add(heard.append)
        for setting in SETTINGS:
            process.set(setting)
        yield process, heard
    finally:
        await process.close()


async def told(heard: list[Change], status: Status, times: int = 1) -> None:
    while sum(c.status is status and c.moment is Moment.AFTER for c in heard) < times:
        await asyncio.sleep(0.01)


@pytest.mark.process
@pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")
def test_every_change_of_a_postcopy_is_told_before_and_after_on_both_sides() -> None:
    async def scenario() -> tuple[list[Change], list[Change]]:
        async with (
            control(f"{GUEST},rate=64k", incoming=False) as (source, here),
            control(GUEST, incoming=True) as (destination, there),
            asyncio.timeout(60),
        ):
            await destination.migrate_incoming(HERE, False)
            assert destination.incoming is not None
            await source.migrate(cast(Address, destination.incoming.address), False)
            source.postcopy.start()
            for heard in (here, there):
                await told(heard, Status.POSTCOPY_ACTIVE)
            source.postcopy.pause()
            for heard in (here, there):
                await told(heard, Status.POSTCOPY_PAUSED)
            destination.postcopy.recover(lambda: HERE)
            await source.migrate(cast(Address, destination.incoming.address), True)
            for heard in (here, there):
                await told(heard, Status.POSTCOPY_ACTIVE, 2)
            source.store.set({"max-postcopy-bandwidth": 0})
            for heard in (here, there):
                await told(heard, Status.COMPLETED)
            return here, there

    here, there = asyncio.run(scenario())
    begin = [Status.NONE, Status.SETUP, Status.ACTIVE]
    pause = [Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED]
    end = [Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE, Status.COMPLETED]
    of_source = [*begin, Status.DEVICE, *pause, Status.POSTCOPY_RECOVER_SETUP, *end]
    assert here == _twice(Side.SOURCE, of_source)
    assert there == _twice(Side.DESTINATION, [*begin, *pause, *end])


def _twice(side: Side, statuses: list[Status]) -> list[Change]:
    return [
        Change(side, before, after, moment)
        for before, after in itertools.pairwise(statuses)
        for moment in (Moment.BEFORE, Moment.AFTER)
    ]
