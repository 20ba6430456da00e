"""The names that both state machines, the monitors and the statistics share."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from engine.errors import StateError


class Status(enum.Enum):
    """QAPI MigrationStatus; values are the wire names, so `Status(reply["status"])` parses."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    COLO = "colo"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    WAIT_UNPLUG = "wait-unplug"


class RunState(enum.Enum):
    """The part of QAPI RunState that a guest here can be in."""

    RUNNING = "running"
    SUSPENDED = "suspended"  #: it runs, and sleeps (ACPI S3)
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    INTERNAL_ERROR = "internal-error"  #: the guest died

    @property
    def is_live(self) -> bool:
        """Nobody has stopped the guest (QEMU: runstate_is_live)."""
        return self in (RunState.RUNNING, RunState.SUSPENDED)


#: A destination's statuses; a pair that is absent is illegal (QEMU: migration_incoming_*).
_INCOMING: Final[Mapping[Status, frozenset[Status]]] = {
    Status.NONE: frozenset({Status.SETUP}),
    Status.SETUP: frozenset({Status.ACTIVE, Status.FAILED}),
    Status.ACTIVE: frozenset({Status.POSTCOPY_ACTIVE, Status.COMPLETED, Status.FAILED}),
    Status.POSTCOPY_ACTIVE: frozenset({Status.POSTCOPY_PAUSED, Status.COMPLETED, Status.FAILED}),
    Status.POSTCOPY_PAUSED: frozenset({Status.POSTCOPY_RECOVER, Status.FAILED}),
    Status.POSTCOPY_RECOVER: frozenset(
        {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.FAILED}
    ),
}


def check_incoming(before: Status, after: Status) -> None:
    """:raise StateError: a destination never goes from `before` to `after`."""
    if after not in _INCOMING.get(before, frozenset()):
        raise StateError(before.value, after.value, ())


#: The guest runs at the destination, and part of its RAM is still at the source.
POSTCOPY: Final = frozenset(
    {
        Status.POSTCOPY_DEVICE,
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
        Status.POSTCOPY_RECOVER_SETUP,
        Status.POSTCOPY_RECOVER,
    }
)

#: A migration in one of these ended and left nothing behind; a new one may start.
ENDED = frozenset({Status.NONE, Status.COMPLETED, Status.FAILED, Status.CANCELLED})
