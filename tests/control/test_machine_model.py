"""The source's machine with a driver, a user and a destination that are models.

In any order of ends, losses and commands there are never two running guests, never none without a
word why, and nothing is kept at the end.

The driver's model gives each effect the end that machine.py names, or a failure, and no other: an
event that the machine refuses is a defect of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine.control import machine
from engine.control.driver import GIVING_UP
from engine.control.machine import Effect, Heal, Outgoing, Phase
from engine.control.status import Status
from engine.guest.base import Handover

CONNECTIONS: Final = frozenset({"main channel", "senders", "page service"})
#: What an effect takes when it begins; it may fail with a part of it, which is held as the whole.
TAKES: Final = {
    Effect.CONNECT: {"main channel", "senders", "tracking"},
    Effect.PREPARE_POSTCOPY: {"page service"},
    Effect.RESUME_AND_PREPARE: {"page service"},
    Effect.RECONNECT: {"main channel"},
    Effect.RESYNC: {"senders", "page service"},
}
#: What works need no more than to be done.
ENDS: Final[dict[Effect, type]] = {
    Effect.CONNECT: machine.Connected,
    Effect.SEND_ROUND: machine.RoundAcknowledged,
    Effect.RESUME_AND_SEND_ROUND: machine.RoundAcknowledged,
    Effect.HARVEST_AND_SEND_ROUND: machine.RoundAcknowledged,
    Effect.ARM_DESTINATION: machine.DestinationArmed,
    Effect.ARM_POSTCOPY: machine.DestinationArmed,
    Effect.HARVEST_AND_ARM_POSTCOPY: machine.DestinationArmed,
    Effect.PREPARE_POSTCOPY: machine.PostcopyPrepared,
    Effect.RESUME_AND_PREPARE: machine.PostcopyPrepared,
    Effect.RECONNECT: machine.Reconnected,
    Effect.RESYNC: machine.Resynced,
    Effect.PUSH: machine.DestinationComplete,
    Effect.SUSPEND: machine.Suspended,
    Effect.ABANDON: machine.Abandoned,
    Effect.ABANDON_STOPPED: machine.Abandoned,
    Effect.LEAVE: machine.Abandoned,
}
#: Nothing that the world does makes these fail.
SURE: Final = GIVING_UP | {Effect.HAND_OVER, Effect.FINISH}

#: What a migration waits for in a phase.
USERS: Final[dict[Phase, machine.Event]] = {
    Phase.IDLE: machine.Start(),
    Phase.WAITING: machine.Continue(),
    Phase.PAUSED: machine.Recover(),
}


class MigrationMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.machine = Outgoing(heal_limit=2)
        self.doing: Effect | None = None
        self.late: Callable[[], machine.Event] | None = None  #: said by a work that was cancelled
        self.kept: set[str] = set()
        self.source_runs, self.is_held = True, False
        self.destination_runs = self.is_missing = self.is_unknown = False

    def feed(self, event: machine.Event) -> None:
        for effect in self.machine.handle(event):
            if not isinstance(effect, Heal) and effect is not Effect.END_ROUND:
                self.begin(effect)

    def begin(self, effect: Effect) -> None:
        self.late = None
        if effect in GIVING_UP and self.doing in ENDS:
            assert self.doing is not None
            self.late = ENDS[self.doing]
        assert self.doing is None or effect in GIVING_UP, (self.doing, effect)
        self.doing = effect
        self.kept |= TAKES.get(effect, set())
        match effect:
            case Effect.PAUSE_AND_HARVEST:
                self.source_runs, self.is_held = False, True
            case Effect.RESUME_AND_SEND_ROUND | Effect.RESUME_AND_PREPARE:
                self.source_runs, self.is_held = True, False
            case Effect.HAND_OVER if self.machine.is_postcopy:
                self.kept.add("RAM")
            case Effect.FINISH:
                assert not self.is_missing
                self.kept.clear()
                self.doing = None

    @initialize(
        where=st.sampled_from(["idle", "sending", "postcopy", "paused"]), pauses=st.booleans()
    )
    def begins_at(self, where: str, pauses: bool) -> None:
        """Random steps alone seldom come far."""
        self.machine.pauses_before_switchover = pauses
        if where == "idle":
            return
        self.feed(machine.Start())
        self.done()
        if where == "sending":
            return
        self.feed(machine.StartPostcopy())
        self.done()
        self.done()
        self.harvested(fits=False)
        if pauses:
            self.feed(machine.Continue())
        self.done()
        self.token_passed(Handover.TAKEN, arrived=True)
        if where == "paused":
            self.failed()
            self.done()

    # -- works end

    def done(self) -> None:
        effect, self.doing = self.doing, None
        assert effect is not None
        match effect:
            case Effect.ABANDON if self.is_held:
                self.source_runs, self.is_held = True, False
            case Effect.SUSPEND:
                self.kept -= CONNECTIONS
            case Effect.PUSH:
                self.is_missing = False
            case Effect.RESYNC:
                self.is_unknown = False
        if effect in (Effect.ABANDON, Effect.ABANDON_STOPPED, Effect.LEAVE):
            self.kept.clear()
        self.feed(ENDS[effect]())

    def harvested(self, *, fits: bool) -> None:
        effect, self.doing = self.doing, None
        if effect is Effect.HARVEST:
            self.feed(machine.Harvested(4096, fits))
        else:
            self.feed(machine.PausedAndHarvested(4096, fits))

    def token_passed(self, outcome: Handover, *, arrived: bool) -> None:
        self.doing = None
        arrived = outcome is Handover.TAKEN or (outcome is Handover.UNKNOWN and arrived)
        self.destination_runs = arrived
        self.is_missing = arrived and self.machine.is_postcopy
        self.is_unknown = outcome is Handover.UNKNOWN
        if outcome is Handover.REFUSED:
            self.kept.discard("RAM")
        self.feed(machine.HandedOver(outcome))

    def failed(self) -> None:
        self.doing = None
        self.feed(machine.Failure("broken"))

    @precondition(lambda self: self.doing is not None)
    @rule(fits=st.booleans(), outcome=st.sampled_from(Handover), one_in_four=st.integers(0, 3))
    def the_work_ends(self, fits: bool, outcome: Handover, one_in_four: int) -> None:
        effect = self.doing
        needs_destination = effect in (Effect.PUSH, Effect.RESYNC)
        if effect is Effect.HAND_OVER:
            self.token_passed(outcome, arrived=fits)
        elif effect not in SURE and not one_in_four:
            self.failed()
        elif effect in (Effect.HARVEST, Effect.PAUSE_AND_HARVEST):
            self.harvested(fits=fits)
        elif self.destination_runs or not needs_destination:
            self.done()

    # -- the world, the user

    @rule(what=st.sampled_from(["late", "channel", "failure", "postcopy", "user", "user", "end"]))
    def something_else_happens(self, what: str) -> None:
        phase, late = self.machine.phase, self.late
        is_idle = phase is Phase.IDLE
        if what == "late" and late is not None and self.doing in GIVING_UP:
            self.late = None
            if late is machine.DestinationComplete:
                if not self.destination_runs:
                    return  # nobody is there to say so
                self.is_missing = False
            self.feed(late())
        elif what == "channel" and not is_idle:
            self.feed(machine.ChannelLost(0, "cut"))
        elif what == "failure" and not is_idle:
            self.feed(machine.Failure("main channel lost"))
        elif what == "postcopy" and not is_idle:
            self.feed(machine.StartPostcopy())
        elif what == "user" and phase in USERS:
            self.feed(USERS[phase])
        elif what == "end":  # `migrate_cancel`; in postcopy the end of the process
            self.feed(machine.Cancel())

    # -- what holds at any moment

    @invariant()
    def never_two_guests_run(self) -> None:
        assert not (self.source_runs and self.destination_runs)

    @invariant()
    def never_none_without_a_word(self) -> None:
        phase = self.machine.phase
        on_its_way = phase in machine.SWITCHING or self.doing is Effect.ABANDON
        if not (self.source_runs or self.destination_runs or on_its_way):
            assert self.machine.error or self.is_unknown

    @invariant()
    def a_pause_says_why(self) -> None:
        if self.machine.status is Status.POSTCOPY_PAUSED:
            assert self.machine.error

    @invariant()
    def what_is_missing_there_is_kept_here(self) -> None:
        if self.is_missing and self.machine.phase is not Phase.ENDED:
            assert "RAM" in self.kept
        if self.is_missing and self.machine.phase is Phase.ENDED:
            assert self.machine.status is Status.FAILED

    @invariant()
    def a_paused_migration_keeps_no_connection(self) -> None:
        if self.machine.phase is Phase.PAUSED:
            assert not self.kept & CONNECTIONS

    @invariant()
    def an_ended_migration_keeps_nothing(self) -> None:
        if self.machine.phase is Phase.ENDED:
            assert self.doing is None
            assert not self.kept
            assert self.source_runs is not (self.destination_runs or self.is_unknown)


MigrationMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=40)
TestMigrationMachine = MigrationMachine.TestCase
