"""The agent's answers about the pages that its vCPUs dirty: measurements and limits."""

from __future__ import annotations

from engine.guest import messages
from engine.guest.vcpus import Machine

REQUESTS = (
    messages.StartCounting,
    messages.CountWritten,
    messages.CountDirty,
    messages.LimitDirty,
    messages.ReadDirtied,
)
#: These walk the page table of all RAM, or set up what does; not for an event loop.
LONG = (messages.StartCounting, messages.CountWritten)


def answer(machine: Machine, request: messages.Dirtying) -> messages.Answer:
    """Do what is asked.

    :raise MemoryRefused: a migration tracks the guest, or nothing works here.
    :raise GuestError: there is no such vCPU."""
    match request:
        case messages.StartCounting():
            machine.start_counting()
        case messages.CountWritten():
            return messages.Count(request.id, machine.count_written())
        case messages.CountDirty(on=on):
            machine.count_dirty(on)
        case messages.LimitDirty(vcpu=vcpu, bytes_per_s=bytes_per_s):
            machine.limit_dirty(vcpu, bytes_per_s)
        case messages.ReadDirtied():
            dirtied = machine.dirtied()
            pages, slept_ns = [one for one, _ in dirtied], [ns for _, ns in dirtied]
            return messages.Dirtied(request.id, pages, slept_ns)
    return messages.Done(request.id)
