"""The source's state machine: events in, effects out, one table.

A migration is in one *phase*; what QMP shows as its status follows from the phases' handlers.
Effects are carried out by `control/outgoing.py` only, and each ends with an event that comes back
here.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from engine.control.status import Status
from engine.errors import StateError
from engine.guest.base import Handover

STORY_STEPS_MAX: Final = 256


class Phase(enum.Enum):
    """Where a migration is; finer than the status."""

    IDLE = "idle"
    CONNECTING = "connecting"
    SENDING = "sending"  #: a round is on its way
    HARVESTING = "harvesting"  #: dirty bits are collected, the guest runs
    PAUSING = "pausing"  #: the guest stops, the last dirty bits are collected
    WAITING = "waiting"  #: pause-before-switchover: the guest stands until migrate-continue
    FINISHING = "finishing"  #: the last round, guest stopped
    ARMING = "arming"  #: device state is sent, the destination promises
    HANDING_OVER = "handing-over"  #: the token is on its way; nothing else decides now
    PREPARING = "preparing-postcopy"  #: the destination learns what is stale, the guest runs
    PUSHING = "pushing"  #: postcopy: the guest runs there, what is missing follows
    SUSPENDING = "suspending"  #: postcopy: channels and workers are given back
    PAUSED = "paused"  #: postcopy: waits for `migrate resume=true`
    RECONNECTING = "reconnecting"
    RECOVERING = "recovering"  #: the destination says what it has, channels are made anew
    FAILING = "failing"
    CANCELLING = "cancelling"
    ENDED = "ended"


#: The guest is being stopped, or stands, and its right to run is about to leave.
SWITCHING: Final = frozenset(
    {Phase.PAUSING, Phase.WAITING, Phase.FINISHING, Phase.ARMING, Phase.HANDING_OVER}
)


# -- events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """`migrate` was accepted."""


@dataclass(frozen=True, slots=True)
class Connected:
    """Both sides agreed, every channel is open, tracking began and the first bitmap is set."""


@dataclass(frozen=True, slots=True)
class RoundAcknowledged:
    """Everything of the current round is placed at the destination."""


@dataclass(frozen=True, slots=True)
class Harvested:
    """Dirty bits were collected while the guest ran.

    :ivar fits: policy says that stopping now ends inside the downtime limit."""

    dirty_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class PausedAndHarvested:
    """The guest stands and the last dirty bits are in.

    :ivar fits: policy says that what is left still ends inside the limit."""

    dirty_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class Continue:
    """`migrate-continue` in `pre-switchover`."""


@dataclass(frozen=True, slots=True)
class DestinationArmed:
    """The destination keeps every promise and waits for the token."""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The exchange of the token ended."""

    outcome: Handover


@dataclass(frozen=True, slots=True)
class ChannelLost:
    """A multifd channel, or a worker at either end of it, is gone."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that cannot be mended within this migration."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """`migrate_cancel`."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """All was given back; the guest is as it was before, unless the outcome is unknown."""


@dataclass(frozen=True, slots=True)
class StartPostcopy:
    """`migrate-start-postcopy`."""


@dataclass(frozen=True, slots=True)
class PostcopyPrepared:
    """Faults would be served at the destination; what is stale there has been freed."""


@dataclass(frozen=True, slots=True)
class DestinationComplete:
    """Postcopy: the destination has every page."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """Postcopy: nothing of the broken connections is left."""


@dataclass(frozen=True, slots=True)
class Recover:
    """`migrate resume=true`."""


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The destination's control process is reached again."""


@dataclass(frozen=True, slots=True)
class Resynced:
    """What the destination lacks is dirty, every channel is open again."""


Event = (
    Start
    | Connected
    | RoundAcknowledged
    | Harvested
    | PausedAndHarvested
    | Continue
    | DestinationArmed
    | HandedOver
    | ChannelLost
    | Failure
    | Cancel
    | Abandoned
    | StartPostcopy
    | PostcopyPrepared
    | DestinationComplete
    | Suspended
    | Recover
    | Reconnected
    | Resynced
)

# -- effects -------------------------------------------------------------------------------------


class Effect(enum.Enum):
    """What the driver must do; the comment names the events that end it."""

    CONNECT = "connect"  #: Connected or Failure
    SEND_ROUND = "send-round"  #: RoundAcknowledged
    HARVEST = "harvest"  #: Harvested
    PAUSE_AND_HARVEST = "pause-and-harvest"  #: PausedAndHarvested
    RESUME_AND_SEND_ROUND = "resume-and-send-round"  #: RoundAcknowledged
    HARVEST_AND_SEND_ROUND = "harvest-and-send-round"  #: RoundAcknowledged; the guest stands
    ARM_DESTINATION = "arm-destination"  #: DestinationArmed
    HAND_OVER = "hand-over"  #: HandedOver
    ABANDON = "abandon"  #: Abandoned; the guest runs again if we had stopped it
    ABANDON_STOPPED = "abandon-stopped"  #: Abandoned; the guest stays stopped
    FINISH = "finish"  #: nothing; gives back what the migration had
    END_ROUND = "end-round"  #: nothing: RoundAcknowledged comes sooner
    PREPARE_POSTCOPY = "prepare-postcopy"  #: PostcopyPrepared
    RESUME_AND_PREPARE = "resume-and-prepare"  #: PostcopyPrepared
    ARM_POSTCOPY = "arm-postcopy"  #: DestinationArmed
    HARVEST_AND_ARM_POSTCOPY = "harvest-and-arm-postcopy"  #: DestinationArmed; the guest stands
    PUSH = "push"  #: DestinationComplete
    SUSPEND = "suspend"  #: Suspended
    RECONNECT = "reconnect"  #: Reconnected
    RESYNC = "resync"  #: Resynced
    LEAVE = "leave"  #: Abandoned; the guest is at the destination, without all its pages


@dataclass(frozen=True, slots=True)
class Heal:
    """Make the channel anew; what it had not acknowledged is dirty again. Ends with nothing."""

    index: int


Step = tuple[Phase, Status, tuple[Effect | Heal, ...]]


@dataclass
class Outgoing:
    """One migration, seen from its source.

    :ivar heal_limit: how many channels may be made anew before the migration fails.
    :ivar pauses_before_switchover: the capability `pause-before-switchover`.
    :ivar error: why it failed, was cancelled, or is paused, one line.
    :ivar wants_postcopy: the user has asked for it.
    :ivar is_postcopy: the destination is prepared for it; the next switchover goes there.
    """

    heal_limit: int = 8
    pauses_before_switchover: bool = False
    phase: Phase = Phase.IDLE
    status: Status = Status.NONE
    heals: int = 0
    error: str | None = None
    wants_postcopy: bool = False
    is_postcopy: bool = False
    _cancel_wanted: bool = False
    _lost_late: list[int] = field(default_factory=list)  #: channels, at a time when none is healed
    _story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_STEPS_MAX))

    def handle(self, event: Event) -> tuple[Effect | Heal, ...]:
        """Take one event; return what the caller must now do, in order.

        :raise StateError: the event is not allowed in this phase; nothing changed.
        """
        handler = TRANSITIONS.get((self.phase, type(event)))
        if handler is None:
            raise StateError(self.status.value, repr(event), self.story)
        came_from = self.phase
        self.phase, self.status, effects = handler(self, event)
        self._story.append(f"{came_from.value} -> {self.phase.value}: {event!r}")
        return effects

    @property
    def story(self) -> tuple[str, ...]:
        """The last steps, oldest first."""
        return tuple(self._story)

    # -- handlers: one line each says where the migration goes ------------------------------------

    def _connect(self, _: Start) -> Step:
        return Phase.CONNECTING, Status.SETUP, (Effect.CONNECT,)

    def _first_round(self, _: Connected) -> Step:
        if self.wants_postcopy:
            return Phase.PREPARING, Status.ACTIVE, (Effect.PREPARE_POSTCOPY,)
        return Phase.SENDING, Status.ACTIVE, (Effect.SEND_ROUND,)

    def _harvest(self, _: RoundAcknowledged) -> Step:
        if self.wants_postcopy:
            return Phase.PREPARING, Status.ACTIVE, (Effect.PREPARE_POSTCOPY,)
        return Phase.HARVESTING, Status.ACTIVE, (Effect.HARVEST,)

    def _next_round_or_pause(self, event: Harvested) -> Step:
        if event.fits:
            return Phase.PAUSING, Status.ACTIVE, (Effect.PAUSE_AND_HARVEST,)
        if self.wants_postcopy:
            return Phase.PREPARING, Status.ACTIVE, (Effect.PREPARE_POSTCOPY,)
        return Phase.SENDING, Status.ACTIVE, (Effect.SEND_ROUND,)

    def _last_round_or_resume(self, event: PausedAndHarvested) -> Step:
        if not (event.fits or self.is_postcopy):
            if self.wants_postcopy:
                return Phase.PREPARING, Status.ACTIVE, (Effect.RESUME_AND_PREPARE,)
            return Phase.SENDING, Status.ACTIVE, (Effect.RESUME_AND_SEND_ROUND,)
        if self.pauses_before_switchover:
            return Phase.WAITING, Status.PRE_SWITCHOVER, ()
        if self.is_postcopy:
            return Phase.ARMING, Status.DEVICE, (Effect.ARM_POSTCOPY,)
        return Phase.FINISHING, Status.DEVICE, (Effect.SEND_ROUND,)

    def _go_on(self, _: Continue) -> Step:
        if self.is_postcopy:
            return Phase.ARMING, Status.DEVICE, (Effect.HARVEST_AND_ARM_POSTCOPY,)
        return Phase.FINISHING, Status.DEVICE, (Effect.HARVEST_AND_SEND_ROUND,)

    def _arm(self, _: RoundAcknowledged) -> Step:
        return Phase.ARMING, Status.DEVICE, (Effect.ARM_DESTINATION,)

    def _hand_over(self, _: DestinationArmed) -> Step:
        return Phase.HANDING_OVER, Status.DEVICE, (Effect.HAND_OVER,)

    def _conclude(self, event: HandedOver) -> Step:
        if event.outcome is Handover.TAKEN and not self.is_postcopy:
            self.error = None  # what else was lost meanwhile decides nothing
            return Phase.ENDED, Status.COMPLETED, (Effect.FINISH,)
        if self.is_postcopy and event.outcome is not Handover.REFUSED:
            return self._push(event)
        if event.outcome is Handover.UNKNOWN:
            unknown = (
                "the destination did not say whether the guest runs there: "
                "the guest stays stopped here; look at the destination before you resume it"
            )
            self.error = f"{self.error}; {unknown}" if self.error else unknown
            return Phase.FAILING, Status.DEVICE, (Effect.ABANDON_STOPPED,)
        if self._cancel_wanted:
            return Phase.CANCELLING, Status.CANCELLING, (Effect.ABANDON,)
        self.error = self.error or "the destination refused to take the guest over"
        return Phase.FAILING, Status.DEVICE, (Effect.ABANDON,)

    def _heal_or_fail(self, event: ChannelLost) -> Step:
        if not self.heal_limit:
            return self._fail(Failure(event.reason))
        self.heals += 1
        if self.heals > self.heal_limit:
            again = f"made anew {self.heal_limit} times already"
            return self._fail(Failure(f"{event.reason} ({again})"))
        return self.phase, self.status, (Heal(event.index),)

    def _fail(self, event: Failure) -> Step:
        self.error = event.reason
        return Phase.FAILING, self.status, (Effect.ABANDON,)

    def _cancel(self, _: Cancel) -> Step:
        return Phase.CANCELLING, Status.CANCELLING, (Effect.ABANDON,)

    def _cancel_later(self, _: Cancel) -> Step:
        self._cancel_wanted = True
        return self.phase, self.status, ()

    def _fail_later(self, event: Failure) -> Step:
        self.error = event.reason
        return self.phase, self.status, ()

    def _failed(self, _: Abandoned) -> Step:
        return Phase.ENDED, Status.FAILED, ()

    def _cancelled(self, _: Abandoned) -> Step:
        return Phase.ENDED, Status.CANCELLED, ()

    def _ignore(self, _: Event) -> Step:
        return self.phase, self.status, ()

    # -- postcopy --------------------------------------------------------------------------------

    def _want_postcopy(self, _: StartPostcopy) -> Step:
        self.wants_postcopy = True
        now = (Effect.END_ROUND,) if self.phase is Phase.SENDING else ()
        return self.phase, self.status, now

    def _pause_for_postcopy(self, _: PostcopyPrepared) -> Step:
        self.is_postcopy = True
        return Phase.PAUSING, Status.ACTIVE, (Effect.PAUSE_AND_HARVEST,)

    def _lose_late(self, event: ChannelLost) -> Step:
        if self.is_postcopy:
            self._lost_late.append(event.index)
        return self.phase, self.status, ()

    def _push_again(self, _: Resynced) -> Step:
        self.error = None
        return self._push(_)

    def _push(self, _: HandedOver | Resynced) -> Step:
        """Also where nobody has said who runs the guest: if the destination does, it needs this."""
        lost, self._lost_late = self._lost_late, []
        heals = tuple(Heal(index) for index in lost)
        return Phase.PUSHING, Status.POSTCOPY_ACTIVE, (Effect.PUSH, *heals)

    def _heal_or_suspend(self, event: ChannelLost) -> Step:
        self.heals += 1
        if self.heals > self.heal_limit:
            return self._suspend(Failure(event.reason))
        return self.phase, self.status, (Heal(event.index),)

    def _suspend(self, event: Failure) -> Step:
        self.error = event.reason
        return Phase.SUSPENDING, Status.POSTCOPY_PAUSED, (Effect.SUSPEND,)

    def _lose_again(self, event: ChannelLost) -> Step:
        return self._suspend(Failure(event.reason))

    def _wait_for_recovery(self, _: Suspended) -> Step:
        return Phase.PAUSED, Status.POSTCOPY_PAUSED, ()

    def _reconnect(self, _: Recover) -> Step:
        self.heals = 0
        return Phase.RECONNECTING, Status.POSTCOPY_RECOVER_SETUP, (Effect.RECONNECT,)

    def _resync(self, _: Reconnected) -> Step:
        return Phase.RECOVERING, Status.POSTCOPY_RECOVER, (Effect.RESYNC,)

    def _complete(self, _: DestinationComplete) -> Step:
        self.error = None
        return Phase.ENDED, Status.COMPLETED, (Effect.FINISH,)

    def _leave(self, _: Cancel) -> Step:
        """Only when the process ends: the destination waits for ever for what it lacks."""
        self.error = "the source ended before the destination had every page"
        return Phase.FAILING, self.status, (Effect.LEAVE,)


_Handler = Callable[..., Step]


def _same(
    phases: tuple[Phase, ...], event: type, handler: _Handler
) -> dict[tuple[Phase, type], _Handler]:
    return {(phase, event): handler for phase in phases}


_LIVE = (Phase.SENDING, Phase.HARVESTING, Phase.PAUSING, Phase.WAITING, Phase.FINISHING,
         Phase.PREPARING)  # fmt: skip
_STOPPABLE = (Phase.CONNECTING, *_LIVE, Phase.ARMING)
_LEAVING = (Phase.FAILING, Phase.CANCELLING)
_SUSPENDED = (Phase.SUSPENDING, Phase.PAUSED)
_RECOVERING = (Phase.RECONNECTING, Phase.RECOVERING)
#: What may still arrive while a migration is being given up or suspended; it decides nothing any
#: more.
_LATE = (Connected, RoundAcknowledged, Harvested, PausedAndHarvested, DestinationArmed,
         PostcopyPrepared, DestinationComplete, Reconnected, Resynced)  # fmt: skip

# The whole machine on one screen. A pair that is absent is illegal.
TRANSITIONS: Final[Mapping[tuple[Phase, type], _Handler]] = {
    (Phase.IDLE, Start): Outgoing._connect,
    (Phase.CONNECTING, Connected): Outgoing._first_round,
    (Phase.SENDING, RoundAcknowledged): Outgoing._harvest,
    (Phase.HARVESTING, Harvested): Outgoing._next_round_or_pause,
    (Phase.PREPARING, PostcopyPrepared): Outgoing._pause_for_postcopy,
    (Phase.PAUSING, PausedAndHarvested): Outgoing._last_round_or_resume,
    (Phase.WAITING, Continue): Outgoing._go_on,
    (Phase.FINISHING, RoundAcknowledged): Outgoing._arm,
    (Phase.ARMING, DestinationArmed): Outgoing._hand_over,
    (Phase.HANDING_OVER, HandedOver): Outgoing._conclude,
    (Phase.PUSHING, DestinationComplete): Outgoing._complete,
    (Phase.SUSPENDING, Suspended): Outgoing._wait_for_recovery,
    (Phase.PAUSED, Recover): Outgoing._reconnect,
    (Phase.RECONNECTING, Reconnected): Outgoing._resync,
    (Phase.RECOVERING, Resynced): Outgoing._push_again,
    (Phase.FAILING, Abandoned): Outgoing._failed,
    (Phase.CANCELLING, Abandoned): Outgoing._cancelled,
    **_same((Phase.CONNECTING, *_LIVE), ChannelLost, Outgoing._heal_or_fail),
    **_same((Phase.ARMING, Phase.HANDING_OVER), ChannelLost, Outgoing._lose_late),
    **_same((*_LEAVING, *_SUSPENDED, Phase.RECONNECTING, Phase.ENDED), ChannelLost,
    Outgoing._ignore),
    (Phase.PUSHING, ChannelLost): Outgoing._heal_or_suspend,
    (Phase.RECOVERING, ChannelLost): Outgoing._lose_again,
    **_same(_STOPPABLE, Failure, Outgoing._fail),
    (Phase.HANDING_OVER, Failure): Outgoing._fail_later,
    **_same((Phase.PUSHING, *_RECOVERING), Failure, Outgoing._suspend),
    **_same((*_LEAVING, *_SUSPENDED, Phase.ENDED), Failure, Outgoing._ignore),
    **_same(_STOPPABLE, Cancel, Outgoing._cancel),
    (Phase.HANDING_OVER, Cancel): Outgoing._cancel_later,
    **_same((Phase.PUSHING, *_SUSPENDED, *_RECOVERING), Cancel, Outgoing._leave),
    **_same((Phase.IDLE, *_LEAVING, Phase.ENDED), Cancel, Outgoing._ignore),
    **_same((*_STOPPABLE, Phase.HANDING_OVER), StartPostcopy, Outgoing._want_postcopy),
    **_same((*_LEAVING, Phase.PUSHING, *_SUSPENDED, *_RECOVERING, Phase.ENDED), StartPostcopy,
    Outgoing._ignore),
    **{(phase, late): Outgoing._ignore for phase in (*_LEAVING, Phase.SUSPENDING)
       for late in _LATE},
    (Phase.FAILING, Suspended): Outgoing._ignore,
}  # fmt: skip
