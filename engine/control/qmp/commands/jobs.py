"""Jobs, and the snapshots that would be jobs if there were devices to hold them."""

from __future__ import annotations

from engine.control.jobs import JobStatus, JobType
from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, Handler


class Snapshot(Arguments, frozen=True):
    """Of `snapshot-save` and `snapshot-load`."""

    job_id: str
    tag: str
    vmstate: str
    devices: list[str]


class SnapshotDelete(Arguments, frozen=True):
    """Of `snapshot-delete`."""

    job_id: str
    tag: str
    devices: list[str]


class JobId(Arguments, frozen=True):
    """The job that is meant."""

    id: str


class JobInfo(Arguments, frozen=True):
    """What `query-jobs` answers of each."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None


class JobCommands:
    """Handlers; the control process keeps the jobs."""

    def __init__(self, process: ControlProcess) -> None:
        self._jobs = process.jobs

    def snapshot(self, type_: JobType) -> Handler:
        async def fail(asked: Snapshot | SnapshotDelete) -> None:
            self._jobs.fail_snapshot(asked.job_id, type_, asked.devices)

        return fail

    def refuse(self, verb: str) -> Handler:
        async def refuse(asked: JobId) -> None:
            self._jobs.refuse(asked.id, verb)

        return refuse

    async def dismiss(self, asked: JobId) -> None:
        self._jobs.dismiss(asked.id)

    async def query_jobs(self, _: object) -> object:
        return self._jobs.query()


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = JobCommands(process)
    registry.add("snapshot-save", commands.snapshot(JobType.SNAPSHOT_SAVE), Snapshot)
    registry.add("snapshot-load", commands.snapshot(JobType.SNAPSHOT_LOAD), Snapshot)
    registry.add("snapshot-delete", commands.snapshot(JobType.SNAPSHOT_DELETE), SnapshotDelete)
    registry.add("query-jobs", commands.query_jobs, returns=list[JobInfo])
    for verb in ("cancel", "complete", "finalize", "pause", "resume"):
        registry.add(f"job-{verb}", commands.refuse(verb), JobId)
    registry.add("job-dismiss", commands.dismiss, JobId)
