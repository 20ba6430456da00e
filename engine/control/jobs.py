"""Jobs as QEMU shows them (job.c). The only ones are of snapshots, and fail: there are no devices
that could hold one. A failed job stays until it is dismissed, so that its error can be read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from engine.control.identifiers import is_well_formed
from engine.errors import UsageError, shown

JOBS_MAX: Final = 64
IDENTIFIER_CHARACTERS_MAX: Final = 255


def is_identifier(text: str) -> bool:
    """QEMU's form of an id, and not so long that whoever does not read what repeats it could fill
    the memory."""
    return len(text) <= IDENTIFIER_CHARACTERS_MAX and is_well_formed(text)


class JobType(enum.Enum):
    """The part of QAPI JobType that is here."""

    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


class JobStatus(enum.Enum):
    """QAPI JobStatus; a job here is only ever created, running, aborting, concluded and null."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


@dataclass(frozen=True, slots=True)
class Job:
    """One that has failed."""

    id: str
    type: JobType
    error: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": self.type.value,
            "status": JobStatus.CONCLUDED.value,
            "current-progress": 1,
            "total-progress": 1,
            "error": self.error,
        }


class Jobs:
    """All jobs of one process."""

    def __init__(self, emit: Callable[[str, dict[str, object]], None]) -> None:
        self._emit = emit
        self._jobs: dict[str, Job] = {}  #: oldest first; never more than JOBS_MAX

    def fail_snapshot(self, job_id: str, type_: JobType, devices: list[str]) -> None:
        """A job of a snapshot begins and fails at once, told in events as QEMU tells it.

        :raise UsageError: the id is no identifier, or in use; no job began."""
        if not is_identifier(job_id):
            raise UsageError(f"Invalid job ID '{shown(job_id)}'")
        if job_id in self._jobs:
            raise UsageError(f"Job ID '{shown(job_id)}' already in use")
        if len(self._jobs) >= JOBS_MAX:
            raise UsageError(f"there are {JOBS_MAX} jobs already; dismiss some with 'job-dismiss'")
        error = "At least one device is required for snapshot"
        if devices:
            error = f"No block device node '{shown(devices[0])}'"
        self._jobs[job_id] = Job(job_id, type_, error)
        for status in (
            JobStatus.CREATED,
            JobStatus.RUNNING,
            JobStatus.ABORTING,
            JobStatus.CONCLUDED,
        ):
            self._tell(job_id, status)

    def refuse(self, job_id: str, verb: str) -> None:
        """Every verb but `dismiss`: a job here has ended.

        :raise UsageError: always; there is no such job, or it has ended."""
        job = self._find(job_id)
        if verb == "resume":
            raise UsageError("Can't resume a job that was not paused")
        raise UsageError(
            f"Job '{job.id}' in state '{JobStatus.CONCLUDED.value}' cannot accept "
            f"command verb '{verb}'"
        )

    def dismiss(self, job_id: str) -> None:
        """Forget one.

        :raise UsageError: there is no such job."""
        del self._jobs[self._find(job_id).id]
        self._tell(job_id, JobStatus.NULL)

    def query(self) -> list[dict[str, Any]]:
        """QAPI JobInfo of each, newest first."""
        return [job.as_dict() for job in reversed(self._jobs.values())]

    def _find(self, job_id: str) -> Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise UsageError("Job not found") from None

    def _tell(self, job_id: str, status: JobStatus) -> None:
        self._emit("JOB_STATUS_CHANGE", {"status": status.value, "id": job_id})
