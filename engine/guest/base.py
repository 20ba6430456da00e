"""What a guest is to the engine: RAM blocks, a pause button, a tracker, and the right to run.

The right to run is a *token*. Before switchover the source guest holds it. `hand_over` passes it
over a direct connection between the two sides' guests; whoever holds it runs, and nobody else does,
whichever process is killed in between (docs/decisions/0002-handover.md).
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine.memory.blocks import RamBlock
from engine.memory.tracking import TrackerName, Tracking

__all__ = [
    "DirtyMeter",
    "Guest",
    "Handover",
    "Missing",
    "Role",
    "Standing",
    "TrackerName",
    "Tracking",
    "VcpuDirtied",
]


class Handover(enum.Enum):
    """How handing over the right to run ended, seen from the source."""

    TAKEN = "taken"  #: the destination guest has it
    REFUSED = "refused"  #: it has not and never will; the source guest holds it and may run again
    UNKNOWN = "unknown"  #: no answer before the deadline; the source guest stays stopped


class Role(enum.Enum):
    """Who has the right to run, seen from a guest's process."""

    NEW = "new"  #: Start was not answered yet
    INCOMING = "incoming"
    OWNER = "owner"
    HANDING_OVER = "handing over"  #: given up, and no answer yet (or none at all: unknown)
    GONE = "gone"  #: the destination guest has it


@dataclass(slots=True)
class Standing:
    """Why an owner stands. Two reasons that know nothing of each other: it runs when neither holds.

    So a user's `cont` never runs a guest whose last pages are on their way, and the engine's
    undoing never runs one that its user has stopped."""

    by_user: bool
    by_engine: bool = False

    @property
    def may_run(self) -> bool:
        return not (self.by_user or self.by_engine)

    def change(self, *, stands: bool, for_migration: bool) -> None:
        """One of the two reasons begins or ends."""
        if for_migration:
            self.by_engine = stands
        else:
            self.by_user = stands


@dataclass(frozen=True, slots=True)
class VcpuDirtied:
    """One vCPU since its beginning.

    :ivar pages: dirtied while that was counted; each page once in a second.
    :ivar slept_ns: for its dirty limit."""

    pages: int
    slept_ns: int


@dataclass(frozen=True, slots=True)
class Missing:
    """A guest's userfaultfds for missing pages, lent by it until `close_missing`.

    :ivar uffds: of each block.
    :ivar addresses: where each block begins in the guest.
    :ivar vcpus: threads that must wait for "all wait", as known now (a state that is loaded brings
        its source's number); 0: unknown."""

    uffds: tuple[int, ...]
    addresses: tuple[int, ...]
    vcpus: int


@runtime_checkable
class DirtyMeter(Protocol):
    """A guest that tells what it dirties, beside a migration, and can be limited in it.

    All coroutines raise GuestError when the guest died or does not answer in time."""

    async def start_counting(self) -> None:
        """Call every page clean, to count those written from now on; a migration may end that.

        :raise MemoryRefused: a migration tracks the guest, or nothing tells what is written."""
        ...

    async def count_written(self) -> int:
        """End the counting; return the pages written since its start.

        :raise MemoryRefused: a migration has ended it."""
        ...

    async def count_dirty(self, is_counting: bool) -> None:
        """Have each vCPU count the pages it dirties, or not."""
        ...

    async def limit_dirty(self, vcpu: int | None, bytes_per_s: int) -> None:
        """Limit what a vCPU (None: each) dirties; 0 takes the limit back."""
        ...

    async def dirtied(self) -> list[VcpuDirtied]:
        """What each vCPU has dirtied, by index."""
        ...


class Guest(Protocol):
    """One guest. All coroutines raise GuestError when the guest died or does not answer in time.

    States: *incoming* (stopped, may be armed to take over), *running*, *paused*, *gone* (handed
    over or dead). A source guest whose control process dies goes on as it was before the migration;
    an incoming one that has not taken over frees its memory and ends.
    """

    @property
    def kind(self) -> str: ...
    @property
    def blocks(self) -> tuple[RamBlock, ...]: ...
    @property
    def is_running(self) -> bool: ...
    @property
    def is_asleep(self) -> bool:
        """It runs, or will, and its vCPUs stand until somebody wakes it."""
        ...

    @property
    def is_stopped_by_user(self) -> bool:
        """Its user does not want it to run, whatever the engine does (as of the last answer)."""
        ...

    @property
    def is_alive(self) -> bool:
        """Its process has not ended."""
        ...

    async def pause(self, *, for_migration: bool) -> int:
        """Stop every vCPU; return the monotonic time (ns) when all stood. Idempotent.

        `for_migration`: the stop is the engine's, which only `resume(for_migration=True)` undoes,
        or the death of the control process. See `Standing`.

        :raise GuestError: a vCPU waits for a missing page; nothing was changed, the guest runs on.
        """
        ...

    async def resume(self, *, for_migration: bool) -> None:
        """End one reason to stand; the vCPUs run when the other does not hold. Idempotent.

        After an UNKNOWN handover the destination is asked once more, for two seconds; without an
        answer this is the operator's word that the guest runs here.

        :raise GuestError: it runs at the destination, or waits for a migration."""
        ...

    async def throttle(self, percent: int) -> str:
        """Take `percent` (0 to 99) of the vCPUs' time away; return how that is done, in words."""
        ...

    async def writes(self) -> int | None:
        """Page writes since the beginning, or None where the guest does not tell."""
        ...

    async def start_tracking(self, wanted: TrackerName | None) -> Tracking:
        """Begin to track (every page counts as clean from now); None: the best that works here.

        :raise MemoryRefused: the wanted tracker does not work here (says which do), or pages of the
            guest are missing."""
        ...

    async def stop_tracking(self) -> None:
        """Give the tracker back; the guest pays nothing for it any more. Idempotent."""
        ...

    async def clear_soft_dirty(self) -> None:
        """Begin a new period of soft-dirty tracking; only while paused and tracked like that."""
        ...

    async def save_state(self) -> bytes:
        """Device state of the paused guest, at most 1 MiB."""
        ...

    async def load_state(self, state: bytes) -> None:
        """Take over a state (hostile until checked); only in *incoming*."""
        ...

    async def listen_handover(self, host_uri: str) -> str:
        """Destination: listen where the token may come in; return the endpoint to tell the peer.

        `host_uri` is `tcp:HOST:PORT` (PORT 0: any) or `unix:PATH`."""
        ...

    async def arm(self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]) -> None:
        """Destination: everything is here; take over when the token of `session` comes.

        At that moment vCPUs start when `run`, and `taken(monotonic ns)` is awaited."""
        ...

    async def disarm(self) -> bool:
        """Destination: refuse the token from now on; False when it was taken before."""
        ...

    async def connect_handover(self, endpoint: str, session: bytes) -> None:
        """Source: connect to the destination guest (during setup, so that it costs no downtime).

        :raise ChannelError: nobody answers there."""
        ...

    async def check_handover(self) -> None:
        """Source: is the destination guest still there? Asked before the guest is stopped.

        :raise ChannelError: it is not."""
        ...

    async def open_missing(self) -> Missing:
        """Destination, in *incoming*: from now on who touches a page that is not there waits for
        the engine. Nobody may touch RAM through another mapping, which would make zero pages.

        Idempotent: a second call lends the same userfaultfds, also to the control process that
        has adopted the guest. They are the guest's, and closed by `close_missing`.

        :raise MemoryRefused: no userfaultfd here, or this kind of guest has none to lend.
        :raise GuestError: it does not wait for a migration."""
        ...

    async def close_missing(self) -> None:
        """Destination: every page is there, or the guest is given up, and may not run again: what
        is missing reads as zero from now on. Idempotent."""
        ...

    async def hand_over(self, wait_ns: int, *, keeps_ram: bool = False) -> Handover:
        """Source: pass the token. TAKEN: this guest will not run again. See `Handover`.

        Takes at most `wait_ns`, retries included. The engine must hold the guest.

        :param keeps_ram: postcopy: RAM stays readable after TAKEN, until `release_ram`; a guest's
            process outlives its control process until then, and can be adopted by the next.
        :raise NotHandedOver: the token never left; the guest still has it.
        :raise GuestError: no answer; whoever has the token, this guest does not run."""
        ...

    async def release_ram(self) -> None:
        """Source, after postcopy: nobody needs the RAM any more; a guest that was handed over ends
        with its control process again. Idempotent."""
        ...

    async def give_away(self) -> None:
        """Source of a stream: give the right to run up; it goes where the stream goes, and no guest
        can be asked for it. Until `settle`, or the operator's word (`resume`), this guest stands.

        :raise NotHandedOver: the engine does not hold it, or it is not its own to give."""
        ...

    async def settle(self, *, taken: bool) -> None:
        """Source, after `give_away` or an UNKNOWN handover: the destination's control said what
        became of the right to run, for ever. Taken: this guest will not run again; else it is its
        own, and held as before. Nothing in any other state."""
        ...

    async def take_over(
        self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]
    ) -> None:
        """Destination of a stream: everything is here, and the right to run with it; as `arm`, and
        the token in the same step.

        :raise GuestError: it does not wait for a migration, or the session is void."""
        ...

    async def close_handover(self) -> None:
        """Either side: forget the connection or listener. Idempotent."""
        ...

    async def untracked(self) -> str:
        """Wait until it is known that what is written is not seen any more; return why."""
        ...

    async def died(self) -> str:
        """Wait until the guest has died; return why."""
        ...

    async def quit(self) -> None:
        """End the guest and give back all it has. Idempotent, never raises GuestError."""
        ...
