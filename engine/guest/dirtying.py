"""The agent's answers about the pages that its vCPUs dirty: tracking, measurements, limits."""

from __future__ import annotations

from engine.errors import MemoryRefused
from engine.guest import messages
from engine.guest.messages import Reply
from engine.guest.vcpus import Machine
from engine.memory.tracking import TrackerName

REQUESTS = (
    messages.StartTracking,
    messages.StopTracking,
    messages.ClearSoftDirty,
    messages.StartCounting,
    messages.CountWritten,
    messages.CountDirty,
    messages.LimitDirty,
    messages.ReadDirtied,
)
#: These walk the page table of all RAM, or set up what does; not for an event loop.
LONG = (messages.StartCounting, messages.CountWritten)


def answer(machine: Machine, request: messages.Dirtying) -> Reply:
    """Do what is asked; return the answer and the descriptor beside it.

    :raise MemoryRefused: a migration tracks the guest, or nothing works here.
    :raise GuestError: there is no such vCPU."""
    match request:
        case messages.StartTracking(wanted=wanted):
            return _track(machine, request.id, wanted)
        case messages.StopTracking():
            machine.stop_tracking()
        case messages.ClearSoftDirty():
            machine.clear_soft_dirty()
        case messages.StartCounting():
            machine.start_counting()
        case messages.CountWritten():
            return Reply(messages.Count(request.id, machine.count_written()))
        case messages.CountDirty(on=on):
            machine.count_dirty(on)
        case messages.LimitDirty(vcpu=vcpu, bytes_per_s=bytes_per_s):
            machine.limit_dirty(vcpu, bytes_per_s)
        case messages.ReadDirtied():
            dirtied = machine.dirtied()
            pages, slept_ns = [one for one, _ in dirtied], [ns for _, ns in dirtied]
            return Reply(messages.Dirtied(request.id, pages, slept_ns))
    return Reply(messages.Done(request.id))


def _track(machine: Machine, request_id: int, wanted: str) -> Reply:
    try:
        name = TrackerName(wanted) if wanted else None
    except ValueError as exc:
        raise MemoryRefused(f"dirty tracker '{wanted}' is not known") from exc
    tracker = machine.start_tracking(name)
    tracked = messages.Tracked(request_id, tracker.name.value, tracker.address, tracker.reason)
    return Reply(tracked, [tracker.fd] if tracker.fd >= 0 else [])
