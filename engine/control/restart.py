"""What a control process does with what the one before it left in the state directory.

Never two running guests: a guest that lives is taken over as it is, one that was given away is not
begun anew, and where nobody knows, it stands until its user has looked. In postcopy both sides have
a part of the guest: each is kept, and the migration is paused until somebody resumes it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from engine.control.journal import Found, start_time
from engine.control.notifiers import Side
from engine.control.status import Status
from engine.errors import UsageError
from engine.guest.agentguest import AgentGuest
from engine.guest.base import Guest, Handover
from engine.guest.foreignguest import ForeignGuest, adopt_foreign
from engine.guest.handoffguest import HandoffGuest
from engine.guest.spec import (
    GuestSpec,
    HandoffSpec,
    ProcessSpec,
    QemuSpec,
    RamSpec,
    WorkloadSpec,
)
from engine.guest.workload import adopt_workload

#: A guest that has lost its control process may ask the destination first who has the right to run.
GUEST_WAIT_S: Final = 30.0
POLL_S: Final = 0.02

KINDS: Final = {
    RamSpec: "ram",
    WorkloadSpec: "workload",
    QemuSpec: "qemu",
    ProcessSpec: "process",
    HandoffSpec: "handoff",
}


@dataclass(frozen=True, slots=True)
class Paused:
    """A postcopy that this process goes on with, when somebody resumes it.

    :ivar side: SOURCE: the guest stands here, and what the destination lacks is in its RAM;
        DESTINATION: it runs here, and waits where it touches what it lacks."""

    side: Side
    session: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start.

    :ivar runs: let a fresh guest run.
    :ivar is_unknown: nobody has said who has the right to run; `cont` is the user's word.
    :ivar given_up: what a guest that is only memory cannot know: it was handed over, or may be.
    :ivar paused: what the journal says; the guest has the last word, see `paused_of`.
    :ivar is_whole: every page of the guest has come, whatever it still waits for.
    :ivar text: what was found and what is done, for people; empty for an ordinary start.
    """

    spec: GuestSpec
    incoming: bool
    runs: bool = True
    is_unknown: bool = False
    given_up: Handover | None = None
    paused: Paused | None = None
    is_whole: bool = False
    text: str = ""


async def plan(found: Found | None, spec: GuestSpec, *, incoming: bool) -> Plan:
    """Decide by what was found; waits for a guest that is still finding out who it is.

    :raise UsageError: the guest is at the destination, or of another kind than `spec`."""
    if found is None:
        return Plan(spec, incoming)
    if found.is_at_destination:
        await _end_source(found)
        raise _at_destination(found)
    kind = KINDS[type(spec)]
    if found.began.guest_kind != kind:
        raise UsageError(
            f"{found.story}; its guest was of kind '{found.began.guest_kind}', not '{kind}'"
        )
    if isinstance(spec, WorkloadSpec):
        return await _plan_workload(found, spec, incoming=incoming)
    if isinstance(spec, QemuSpec | ProcessSpec | HandoffSpec):
        return await _plan_foreign(found, spec, incoming=incoming)
    return _plan_ram(found, spec, incoming=incoming)


async def _plan_workload(found: Found, spec: WorkloadSpec, *, incoming: bool) -> Plan:
    """Its guest is a process of its own, and knows best."""
    path = await _orphan(found)
    if path is not None:
        return Plan(
            WorkloadSpec(socket=path, tracker=spec.tracker),
            False,
            paused=_paused(found),
            is_whole=found.destination is Status.COMPLETED,
            text=f"{found.story}; its guest lives and is taken over",
        )
    if found.source_session is not None:
        raise _at_destination_in_part(found)
    if found.promised is Side.SOURCE:
        raise _at_destination(found)
    return Plan(spec, incoming, text=f"{found.story}; its guest has ended, this is a new one")


def _plan_ram(found: Found, spec: RamSpec, *, incoming: bool) -> Plan:
    """The control process was the guest; what is left is the memory, where it has a name."""
    is_kept = spec.path is not None and Path(spec.path).exists()
    arrived = not found.began.incoming or found.destination is Status.COMPLETED
    if found.source_session is not None:
        return _plan_gone_ram(found, spec, is_kept=is_kept)
    if found.promised is Side.SOURCE and not is_kept:
        raise _at_destination(found)
    if found.is_unknown and is_kept:
        text = (
            f"{found.story}, and nobody has said whether its guest runs on the other side: it "
            "stands here; look there, then 'cont' it or quit"
        )
        return _unknown(found, spec, text)
    if not is_kept:
        return Plan(spec, incoming, text=f"{found.story}; its memory went with it")
    if incoming and not arrived:
        return Plan(spec, incoming, text=f"{found.story}; its memory is freed")
    if not arrived:
        raise UsageError(
            f"{found.story}; the guest had not arrived, so what is in '{spec.path}' is no guest's: "
            "start with --incoming, or remove the file"
        )
    text = f"{found.story}; its memory is in '{spec.path}', it "
    text += "stands as its user left it" if found.is_stopped else "runs again"
    return Plan(spec, False, runs=not found.is_stopped, text=text)


def _plan_gone_ram(found: Found, spec: RamSpec, *, is_kept: bool) -> Plan:
    """A source in postcopy: what the destination lacks is in memory that has a name, or lost."""
    if not is_kept:
        raise _at_destination_in_part(found)
    text = f"{found.story}; its memory is in '{spec.path}', and "
    if found.is_unknown:
        text += "nobody has said whether its guest runs on the other side: it stands here; resume "
        return _unknown(found, spec, text + "the migration, or look there, then 'cont' it or quit")
    text += "the guest runs at the destination, which lacks a part of it"
    return Plan(spec, False, runs=False, given_up=Handover.TAKEN, paused=_paused(found), text=text)


def _unknown(found: Found, spec: RamSpec, text: str) -> Plan:
    return Plan(
        spec,
        False,
        runs=False,
        is_unknown=True,
        given_up=Handover.UNKNOWN,
        paused=_paused(found),
        text=text,
    )


def _paused(found: Found) -> Paused | None:
    """A guest that lacks pages is not handed on, so it is never both."""
    if found.source_session is not None:
        return Paused(Side.SOURCE, found.source_session)
    if found.destination_session is not None:
        return Paused(Side.DESTINATION, found.destination_session)
    return None


def paused_of(start: Plan, guest: Guest) -> tuple[Paused | None, str]:
    """The postcopy that is paused, now that the guest was opened by the plan, which knows best;
    and what people must know of it, or nothing."""
    paused = start.paused
    if isinstance(guest, AgentGuest):
        is_source = guest.is_gone or guest.is_outcome_unknown
        if paused is not None and paused.side is Side.SOURCE and not is_source:
            paused = None  #: the token was refused
        if paused is not None and paused.side is Side.DESTINATION and not guest.is_missing_open:
            paused = None  #: the last page had come
        if paused is None and guest.is_missing_open and not start.is_whole:
            return None, (
                "the guest lacks a part of its memory, and no journal says of which migration: it "
                "waits for ever where it touches that; only 'quit' is left"
            )
        if paused is None and guest.is_gone:
            return None, (
                "the guest runs at the destination, and no journal says of which migration this "
                "memory is; what the destination lacks cannot be sent, 'quit' frees it"
            )
    if paused is None:
        return None, ""
    there, here = "at the destination", "here"
    if paused.side is Side.DESTINATION:
        there, here = "here", "at the source"
    return paused, (
        f"postcopy is paused: resume it with 'migrate-recover' {there}, and then 'migrate' with "
        f"resume=true {here}"
    )


async def _end_source(found: Found) -> None:
    """A guest that kept its RAM for a postcopy which is complete has nothing to wait for."""
    path = await _orphan(found)
    if path is None:
        return
    guest: AgentGuest
    if found.began.guest_kind == KINDS[WorkloadSpec]:
        guest = await adopt_workload(path, None)
    else:
        is_handed = found.began.guest_kind == KINDS[HandoffSpec]
        guest = await adopt_foreign(path, HandoffGuest if is_handed else ForeignGuest)
    if guest.is_gone:
        await guest.quit()
    else:
        await guest.leave()


def _at_destination_in_part(found: Found) -> UsageError:
    return UsageError(
        f"{found.story}: its guest runs at the destination, and the part of its memory that was "
        "still here is lost: the guest there waits for ever where it touches that; to begin a new "
        "one here, use another --state-dir or remove this one's journal"
    )


async def _plan_foreign(
    found: Found, spec: QemuSpec | ProcessSpec | HandoffSpec, *, incoming: bool
) -> Plan:
    """It goes on by itself; whether it waits, runs or stands is looked at anew. In postcopy its
    agent has lived on."""
    path = await _orphan(found)
    if path is not None:
        return Plan(
            replace(spec, socket=path),
            False,
            paused=_paused(found),
            is_whole=found.destination is Status.COMPLETED,
            text=f"{found.story}; its guest lives and is taken over",
        )
    if found.source_session is not None and found.promised is not Side.SOURCE:
        raise _at_destination_in_part(found)
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
