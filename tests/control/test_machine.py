"""The source's state machine: every pair of phase and event, and random walks."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control import machine
from engine.control.machine import TRANSITIONS, Effect, Heal, Outgoing, Phase
from engine.control.status import ENDED, Status
from engine.errors import StateError
from engine.guest.base import Handover

EXAMPLES: dict[type, list[machine.Event]] = {
    machine.Start: [machine.Start()],
    machine.Connected: [machine.Connected()],
    machine.RoundAcknowledged: [machine.RoundAcknowledged()],
    machine.Harvested: [machine.Harvested(4096, False), machine.Harvested(0, True)],
    machine.PausedAndHarvested: [
        machine.PausedAndHarvested(4096, False),
        machine.PausedAndHarvested(0, True),
    ],
    machine.Continue: [machine.Continue()],
    machine.DestinationArmed: [machine.DestinationArmed()],
    machine.HandedOver: [machine.HandedOver(outcome) for outcome in Handover],
    machine.ChannelLost: [machine.ChannelLost(0, "cut")],
    machine.Failure: [machine.Failure("broken")],
    machine.Cancel: [machine.Cancel()],
    machine.Abandoned: [machine.Abandoned()],
}
HAPPY: list[machine.Event] = [
    machine.Start(),
    machine.Connected(),
    machine.RoundAcknowledged(),
    machine.Harvested(0, True),
    machine.PausedAndHarvested(0, True),
    machine.RoundAcknowledged(),
    machine.DestinationArmed(),
]


def at(phase: Phase, status: Status = Status.ACTIVE) -> Outgoing:
    return Outgoing(phase=phase, status=status)


def test_the_examples_cover_every_event() -> None:
    assert set(EXAMPLES) == set(typing.get_args(machine.Event))


@pytest.mark.parametrize("event", [e for many in EXAMPLES.values() for e in many], ids=repr)
@pytest.mark.parametrize("phase", Phase)
def test_every_pair_is_in_the_table_or_raises_with_the_story(
    phase: Phase, event: machine.Event
) -> None:
    outgoing = at(phase)

    if (phase, type(event)) in TRANSITIONS:
        outgoing.handle(event)
        assert outgoing.story[-1].endswith(repr(event))
        return
    with pytest.raises(StateError):
        outgoing.handle(event)
    assert outgoing.phase is phase


def test_a_migration_that_converges_goes_through_qemus_statuses() -> None:
    outgoing, statuses = Outgoing(), [Status.NONE]

    events: list[machine.Event] = [*HAPPY, machine.HandedOver(Handover.TAKEN)]
    for event in events:
        outgoing.handle(event)
        if outgoing.status is not statuses[-1]:
            statuses.append(outgoing.status)

    assert statuses == [
        Status.NONE, Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.COMPLETED,
    ]  # fmt: skip


def test_pause_before_switchover_waits_for_the_word_and_collects_again() -> None:
    outgoing = Outgoing(pauses_before_switchover=True, phase=Phase.PAUSING, status=Status.ACTIVE)

    assert outgoing.handle(machine.PausedAndHarvested(4096, fits=True)) == ()
    assert outgoing.status is Status.PRE_SWITCHOVER

    assert outgoing.handle(machine.Continue()) == (Effect.HARVEST_AND_SEND_ROUND,)
    assert (outgoing.phase, outgoing.status) == (Phase.FINISHING, Status.DEVICE)


def test_a_pause_that_would_be_too_long_is_undone() -> None:
    outgoing = at(Phase.PAUSING)

    effects = outgoing.handle(machine.PausedAndHarvested(10**9, fits=False))

    assert effects == (Effect.RESUME_AND_SEND_ROUND,)
    assert outgoing.status is Status.ACTIVE


@pytest.mark.parametrize(
    "phase", [Phase.CONNECTING, Phase.SENDING, Phase.HARVESTING, Phase.PAUSING, Phase.WAITING,
              Phase.FINISHING, Phase.ARMING],
)  # fmt: skip
@pytest.mark.parametrize(
    ("event", "end"),
    [(machine.Cancel(), Status.CANCELLED), (machine.Failure("broken"), Status.FAILED)],
)
def test_until_the_token_is_sent_every_end_gives_the_guest_back(
    phase: Phase, event: machine.Event, end: Status
) -> None:
    outgoing = at(phase)

    assert outgoing.handle(event) == (Effect.ABANDON,)
    outgoing.handle(machine.Abandoned())

    assert outgoing.status is end


@pytest.mark.parametrize("event", [machine.Cancel(), machine.Failure("main channel lost")])
@pytest.mark.parametrize(
    ("outcome", "effect"),
    [
        (Handover.TAKEN, Effect.FINISH),
        (Handover.REFUSED, Effect.ABANDON),
        (Handover.UNKNOWN, Effect.ABANDON_STOPPED),
    ],
)
def test_while_the_token_is_on_its_way_only_its_outcome_decides(
    event: machine.Event, outcome: Handover, effect: Effect
) -> None:
    outgoing = at(Phase.HANDING_OVER, Status.DEVICE)

    assert outgoing.handle(event) == ()
    assert outgoing.handle(machine.HandedOver(outcome)) == (effect,)


def test_lost_channels_heal_up_to_the_limit_and_then_fail() -> None:
    outgoing = Outgoing(heal_limit=2, phase=Phase.SENDING, status=Status.ACTIVE)

    assert outgoing.handle(machine.ChannelLost(1, "cut")) == (Heal(1),)
    assert outgoing.handle(machine.ChannelLost(0, "cut")) == (Heal(0),)
    assert outgoing.handle(machine.ChannelLost(1, "cut")) == (Effect.ABANDON,)
    assert outgoing.error == "cut (made anew 2 times already)"


any_event = st.one_of([st.sampled_from(many) for many in EXAMPLES.values()])


@given(st.lists(any_event, max_size=60))
def test_random_walks_resume_the_guest_exactly_when_it_is_ours(events: list[machine.Event]) -> None:
    """The guest's side of every walk: never both given away and resumed, never forgotten."""
    outgoing = Outgoing()
    given_away = resumed = stopped_unknown = False
    for event in events:
        try:
            effects = outgoing.handle(event)
        except StateError:
            continue
        taken = event == machine.HandedOver(Handover.TAKEN)
        given_away |= taken and Effect.FINISH in effects
        resumed |= Effect.ABANDON in effects
        stopped_unknown |= Effect.ABANDON_STOPPED in effects
        assert given_away + resumed + stopped_unknown <= 1
        if outgoing.phase is Phase.ENDED:
            assert outgoing.status in ENDED
            assert given_away is (outgoing.status is Status.COMPLETED)
            assert (resumed or stopped_unknown) is (outgoing.status is not Status.COMPLETED)
