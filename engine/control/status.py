"""The names that both state machines, the monitors and the statistics share."""

from __future__ import annotations

import enum


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
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    INTERNAL_ERROR = "internal-error"  #: the guest died


#: A migration in one of these ended and left nothing behind; a new one may start.
ENDED = frozenset({Status.NONE, Status.COMPLETED, Status.FAILED, Status.CANCELLED})
