"""Commands that QEMU has not, named `x-…`; docs/extensions.md lists them."""

from __future__ import annotations

from typing import Any

from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.guest.workload import WorkloadGuest


class AddBlocker(Arguments, frozen=True):
    """Why the guest must not be migrated."""

    reason: str


class BlockerId(Arguments, frozen=True):
    """What `x-add-migration-blocker` answers."""

    id: str


class Extensions:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

    async def query_guest(self, _: object) -> object:
        guest, tracker = self._process.guest, self._process.tracker
        told = {"write-times": await _times(guest)} if isinstance(guest, WorkloadGuest) else {}
        return {
            "kind": guest.kind,
            "pid": guest.pid if isinstance(guest, WorkloadGuest) else None,
            "running": guest.is_running,
            "writes": await guest.writes(),
            "tracker": tracker[0],
            "tracker-reason": tracker[1],
            "blocks": [
                {
                    "name": block.name,
                    "size": block.size,
                    "backing-page-size": block.backing_page_size,
                    "allocated": block.allocated_bytes(),
                }
                for block in guest.blocks
            ],
            **told,
        }

    async def judge(self, _: object) -> object:
        guest = self._process.guest
        if not isinstance(guest, WorkloadGuest):
            raise QmpError(f"a guest of kind '{guest.kind}' cannot judge its pages; workload can")
        judgement = await self._process.judge(guest)
        return {
            "wrong-pages": judgement.wrong_pages,
            "first-wrong": judgement.first_wrong,
            "page-writes": judgement.page_writes_sum,
            "vcpu-writes": judgement.vcpu_writes_sum,
            "pages": judgement.page_count,
            "counters-path": self._process.path_of(judgement.counters_fd),
        }

    async def sleep(self, _: object) -> None:
        await self._process.sleep(True)

    async def add_blocker(self, asked: AddBlocker) -> object:
        return {"id": self._process.blockers.add(asked.reason)}

    async def remove_blocker(self, asked: BlockerId) -> None:
        self._process.blockers.remove(asked.id)


async def _times(guest: WorkloadGuest) -> dict[str, Any]:
    times = await guest.times()
    return {"buckets": times.buckets, "longest": times.longest_ns}


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Extensions(process)
    registry.add("x-query-guest", commands.query_guest)
    registry.add("x-guest-sleep", commands.sleep)
    registry.add("x-judge", commands.judge, is_asynchronous=True, returns=Any)
    registry.add("x-add-migration-blocker", commands.add_blocker, AddBlocker, returns=BlockerId)
    registry.add("x-remove-migration-blocker", commands.remove_blocker, BlockerId)
