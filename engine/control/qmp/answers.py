"""What commands answer and events carry, as types: for introspection only, answers are plain JSON.

QAPI's names and members; members of ours (`x-`) are in docs/extensions.md.
"""

from __future__ import annotations

import enum
from typing import Any, Final

import msgspec

from engine.control.jobs import JobStatus
from engine.control.qmp.visitor import Arguments, UInt64
from engine.control.stall import OnStall
from engine.control.status import RunState, Status


class QmpCapability(enum.Enum):
    """QAPI QMPCapability."""

    OOB = "oob"


class Negotiation(Arguments, frozen=True):
    """Arguments of `qmp_capabilities`."""

    enable: list[QmpCapability] | None = None


class VersionTriple(Arguments, frozen=True):
    """QAPI VersionTriple."""

    major: int
    minor: int
    micro: int


class VersionInfo(Arguments, frozen=True):
    """QAPI VersionInfo."""

    qemu: VersionTriple
    package: str


class NamedInfo(Arguments, frozen=True):
    """QAPI CommandInfo and EventInfo."""

    name: str


class StatusInfo(Arguments, frozen=True):
    """QAPI StatusInfo."""

    running: bool
    status: RunState


class NameInfo(Arguments, frozen=True):
    """QAPI NameInfo."""

    name: str | None = None


class UuidInfo(Arguments, frozen=True):
    """QAPI UuidInfo."""

    uuid: str = msgspec.field(name="UUID")


class MigrationStats(Arguments, frozen=True):
    """QAPI MigrationStats."""

    transferred: int
    remaining: int
    total: int
    duplicate: int
    normal: int
    normal_bytes: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int
    postcopy_requests: int
    page_size: int
    multifd_bytes: UInt64
    pages_per_second: UInt64
    precopy_bytes: UInt64
    downtime_bytes: UInt64
    postcopy_bytes: UInt64
    dirty_sync_missed_zero_copy: UInt64


class MigrationInfo(Arguments, frozen=True):
    """QAPI MigrationInfo, the members that a guest here can have."""

    status: Status | None = None
    ram: MigrationStats | None = None
    total_time: int | None = None
    expected_downtime: int | None = None
    downtime: int | None = None
    setup_time: int | None = None
    cpu_throttle_percentage: int | None = None
    error_desc: str | None = None
    blocked_reasons: list[str] | None = None
    socket_address: list[Any] | None = None


class MigrationEvent(Arguments, frozen=True):
    """Of MIGRATION."""

    status: Status


class MigrationPass(Arguments, frozen=True):
    """Of MIGRATION_PASS."""

    number: int = msgspec.field(name="pass")


class JobStatusChange(Arguments, frozen=True):
    """Of JOB_STATUS_CHANGE."""

    id: str
    status: JobStatus


class MigrationStalled(Arguments, frozen=True):
    """Of X_MIGRATION_STALLED, ours; ms and bytes."""

    action: OnStall
    dirty_bytes: int
    expected_downtime: int
    number: int = msgspec.field(name="pass")


#: Every event that can occur, with what it carries.
EVENTS: Final[dict[str, type[Arguments] | None]] = {
    "JOB_STATUS_CHANGE": JobStatusChange,
    "MIGRATION": MigrationEvent,
    "MIGRATION_PASS": MigrationPass,
    "RESUME": None,
    "STOP": None,
    "SUSPEND": None,
    "WAKEUP": None,
    "X_MIGRATION_STALLED": MigrationStalled,
}
