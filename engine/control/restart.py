"""What a control process does with what the one before it left in the state directory.

Never two running guests: a guest that lives is taken over as it is, one that was given away is not
begun anew, and where nobody knows, it stands until its user has looked.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.control.journal import Found, start_time
from engine.control.notifiers import Side
from engine.control.status import Status
from engine.errors import UsageError
from engine.guest.spec import GuestSpec, ProcessSpec, QemuSpec, RamSpec, WorkloadSpec

#: A guest that has lost its control process may ask the destination first who has the right to run.
GUEST_WAIT_S: Final = 30.0
POLL_S: Final = 0.02

KINDS: Final = {RamSpec: "ram", WorkloadSpec: "workload", QemuSpec: "qemu", ProcessSpec: "process"}


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start.

    :ivar runs: let a fresh guest run.
    :ivar is_unknown: nobody has said who has the right to run; `cont` is the user's word.
    :ivar text: what was found and what is done, for people; empty for an ordinary start.
    """

    spec: GuestSpec
    incoming: bool
    runs: bool = True
    is_unknown: bool = False
    text: str = ""


async def plan(found: Found | None, spec: GuestSpec, *, incoming: bool) -> Plan:
    """Decide by what was found; waits for a guest that is still finding out who it is.

    :raise UsageError: the guest is at the destination, or of another kind than `spec`."""
    if found is None:
        return Plan(spec, incoming)
    if found.is_at_destination:
        raise _at_destination(found)
    kind = KINDS[type(spec)]
    if found.began.guest_kind != kind:
        raise UsageError(
            f"{found.story}; its guest was of kind '{found.began.guest_kind}', not '{kind}'"
        )
    if isinstance(spec, WorkloadSpec):
        return await _plan_workload(found, spec, incoming=incoming)
    if isinstance(spec, QemuSpec | ProcessSpec):
        return _plan_foreign(found, spec, incoming=incoming)
    return _plan_ram(found, spec, incoming=incoming)


async def _plan_workload(found: Found, spec: WorkloadSpec, *, incoming: bool) -> Plan:
    """Its guest is a process of its own, and knows best."""
    path = await _orphan(found)
    if path is not None:
        adopted = WorkloadSpec(socket=path, tracker=spec.tracker)
        return Plan(adopted, False, text=f"{found.story}; its guest lives and is taken over")
    if found.promised is Side.SOURCE:
        raise _at_destination(found)
    return Plan(spec, incoming, text=f"{found.story}; its guest has ended, this is a new one")


def _plan_ram(found: Found, spec: RamSpec, *, incoming: bool) -> Plan:
    """The control process was the guest; what is left is the memory, where it has a name."""
    is_kept = spec.path is not None and Path(spec.path).exists()
    arrived = not found.began.incoming or found.destination is Status.COMPLETED
    if found.promised is Side.SOURCE and not is_kept:
        raise _at_destination(found)
    if found.is_unknown and is_kept:
        text = (
            f"{found.story}, and nobody has said whether its guest runs on the other side: it "
            "stands here; look there, then 'cont' it or quit"
        )
        return Plan(spec, False, runs=False, is_unknown=True, text=text)
    if not is_kept:
        return Plan(spec, incoming, text=f"{found.story}; its memory went with it")
    if incoming and not arrived:
        return Plan(spec, incoming, text=f"{found.story}; its memory is freed")
    if not arrived:
        raise UsageError(
            f"{found.story}; the guest had not arrived, so what is in '{spec.path}' is no guest's: "
            "start with --incoming, or remove the file"
        )
    return Plan(spec, False, text=f"{found.story}; its memory is in '{spec.path}', it runs again")


def _plan_foreign(found: Found, spec: QemuSpec | ProcessSpec, *, incoming: bool) -> Plan:
    """It goes on by itself; whether it waits, runs or stands is looked at anew."""
    text = f"{found.story}; its guest is attached to anew"
    if found.is_unknown:
        text += ", and nobody has said whether the guest runs on the other side: look there first"
    return Plan(spec, incoming, is_unknown=found.is_unknown, text=text)


def _at_destination(found: Found) -> UsageError:
    return UsageError(
        f"{found.story}: its guest runs at the destination, or did when somebody last knew; to "
        "begin a new one here, use another --state-dir or remove this one's journal"
    )


async def _orphan(found: Found) -> str | None:
    """Where the guest waits to be taken over; None: it has ended.

    :raise UsageError: it lives, and does not say that it waits."""
    began = found.began
    if began.guest_pid is None or began.guest_started is None:
        return None
    path = Path(began.rundir) / f"guest-{began.guest_pid}.sock"
    deadline = time.monotonic() + GUEST_WAIT_S
    while start_time(began.guest_pid) == began.guest_started:
        if path.is_socket():
            return str(path)
        if time.monotonic() > deadline:
            raise UsageError(f"{found.story}; its guest (pid {began.guest_pid}) does not answer")
        await asyncio.sleep(POLL_S)
    return None
