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
    machine.StartPostcopy: [machine.StartPostcopy()],
    machine.PostcopyPrepared: [machine.PostcopyPrepared()],
    machine.DestinationComplete: [machine.DestinationComplete()],
    machine.Suspended: [machine.Suspended()],
    machine.Recover: [machine.Recover()],
    machine.Reconnected: [machine.Reconnected()],
    machine.Resynced: [machine.Resynced()],
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


# -- postcopy --------------------------------------------------------------------------------------

#: From the wish for postcopy to a guest that runs at the destination.
TO_POSTCOPY: list[machine.Event] = [
    machine.Start(),
    machine.Connected(),
    machine.StartPostcopy(),
    machine.RoundAcknowledged(),
    machine.PostcopyPrepared(),
    machine.PausedAndHarvested(10**9, False),
    machine.DestinationArmed(),
    machine.HandedOver(Handover.TAKEN),
]


def walked(events: list[machine.Event]) -> tuple[Outgoing, list[Status]]:
    """A machine after these events, and the statuses that it showed."""
    outgoing, statuses = Outgoing(), [Status.NONE]
    for event in events:
        outgoing.handle(event)
        if outgoing.status is not statuses[-1]:
            statuses.append(outgoing.status)
    return outgoing, statuses


def test_postcopy_goes_through_qemus_statuses() -> None:
    _, statuses = walked([*TO_POSTCOPY, machine.DestinationComplete()])

    assert statuses == [
        Status.NONE, Status.SETUP, Status.ACTIVE, Status.DEVICE, Status.POSTCOPY_ACTIVE,
        Status.COMPLETED,
    ]  # fmt: skip


def test_postcopy_wished_for_in_mid_round_ends_the_round() -> None:
    outgoing, _ = walked(TO_POSTCOPY[:2])

    assert outgoing.handle(machine.StartPostcopy()) == (Effect.END_ROUND,)
    assert outgoing.handle(machine.RoundAcknowledged()) == (Effect.PREPARE_POSTCOPY,)


def test_postcopy_wished_for_during_setup_sends_no_round_before() -> None:
    outgoing, _ = walked([machine.Start(), machine.StartPostcopy()])

    assert outgoing.handle(machine.Connected()) == (Effect.PREPARE_POSTCOPY,)


def test_a_migration_that_fits_completes_without_postcopy() -> None:
    outgoing = at(Phase.HARVESTING)
    outgoing.handle(machine.StartPostcopy())

    assert outgoing.handle(machine.Harvested(0, True)) == (Effect.PAUSE_AND_HARVEST,)
    assert outgoing.handle(machine.PausedAndHarvested(0, True)) == (Effect.SEND_ROUND,)


def test_a_pause_that_was_too_long_goes_to_postcopy_if_that_is_wanted() -> None:
    outgoing = at(Phase.PAUSING)
    outgoing.handle(machine.StartPostcopy())

    assert outgoing.handle(machine.PausedAndHarvested(10**9, False)) == (Effect.RESUME_AND_PREPARE,)


def test_pause_before_switchover_holds_postcopy_too() -> None:
    outgoing = Outgoing(pauses_before_switchover=True)
    for event in TO_POSTCOPY[:6]:
        outgoing.handle(event)

    assert outgoing.status is Status.PRE_SWITCHOVER
    assert outgoing.handle(machine.Continue()) == (Effect.HARVEST_AND_ARM_POSTCOPY,)


@pytest.mark.parametrize("event", [machine.Failure("cut"), machine.Cancel()])
@pytest.mark.parametrize("steps", range(3, 7))
def test_before_the_token_is_sent_postcopy_gives_the_guest_back(
    steps: int, event: machine.Event
) -> None:
    outgoing, _ = walked(TO_POSTCOPY[:steps])

    assert outgoing.handle(event) == (Effect.ABANDON,)


def test_postcopy_pauses_and_recovers_through_qemus_statuses() -> None:
    outgoing, statuses = walked(
        [
            *TO_POSTCOPY,
            machine.Failure("cut"), machine.Suspended(),
            machine.Recover(), machine.Failure("nobody there"), machine.Suspended(),
            machine.Recover(), machine.Reconnected(), machine.Failure("cut again"),
            machine.Suspended(), machine.Recover(), machine.Reconnected(), machine.Resynced(),
            machine.DestinationComplete(),
        ]
    )  # fmt: skip

    paused, setup, recover = (
        Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER,
    )  # fmt: skip
    assert statuses[4:] == [
        Status.POSTCOPY_ACTIVE, paused, setup, paused, setup, recover, paused, setup, recover,
        Status.POSTCOPY_ACTIVE, Status.COMPLETED,
    ]  # fmt: skip
    assert outgoing.error is None


def test_a_channel_lost_while_nothing_heals_is_healed_when_pages_are_pushed() -> None:
    outgoing, _ = walked(TO_POSTCOPY[:-1])

    assert outgoing.handle(machine.ChannelLost(1, "cut")) == ()
    assert outgoing.handle(TO_POSTCOPY[-1]) == (Effect.PUSH, Heal(1))


def test_too_many_lost_channels_pause_postcopy() -> None:
    outgoing, _ = walked(TO_POSTCOPY)
    outgoing.heal_limit = 1

    assert outgoing.handle(machine.ChannelLost(0, "cut")) == (Heal(0),)
    assert outgoing.handle(machine.ChannelLost(0, "cut")) == (Effect.SUSPEND,)
    assert outgoing.status is Status.POSTCOPY_PAUSED


def test_where_nobody_knows_who_runs_pages_are_pushed_and_nothing_runs_here() -> None:
    outgoing, _ = walked(TO_POSTCOPY[:-1])

    assert outgoing.handle(machine.HandedOver(Handover.UNKNOWN)) == (Effect.PUSH,)


def test_a_source_that_ends_in_postcopy_leaves_its_guest_stopped() -> None:
    outgoing, _ = walked(TO_POSTCOPY)

    assert outgoing.handle(machine.Cancel()) == (Effect.LEAVE,)
    outgoing.handle(machine.Abandoned())
    assert outgoing.status is Status.FAILED


# -- walks -----------------------------------------------------------------------------------------

any_event = st.one_of([st.sampled_from(many) for many in EXAMPLES.values()])


#: Walks that get far: most events that come are the ones that were waited for.
likely_event = st.one_of(any_event, st.sampled_from(TO_POSTCOPY + HAPPY))


@given(st.lists(likely_event, max_size=80))
def test_random_walks_resume_the_guest_exactly_when_it_is_ours(events: list[machine.Event]) -> None:
    """The guest's side of every walk: never both given away and resumed, never forgotten."""
    outgoing = Outgoing()
    given_away = resumed = stopped_unknown = left = False
    for event in events:
        try:
            effects = outgoing.handle(event)
        except StateError:
            continue
        given_away |= Effect.FINISH in effects or Effect.PUSH in effects
        resumed |= Effect.ABANDON in effects
        stopped_unknown |= Effect.ABANDON_STOPPED in effects
        left |= Effect.LEAVE in effects
        assert given_away + resumed + stopped_unknown <= 1
        assert given_away or not left
        if outgoing.phase is Phase.ENDED:
            assert outgoing.status in ENDED
            assert (given_away and not left) is (outgoing.status is Status.COMPLETED)
            assert (resumed or stopped_unknown or left) is (outgoing.status is not Status.COMPLETED)
