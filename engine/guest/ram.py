"""A guest that is memory and nothing else; this process is its agent."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

from engine.errors import GuestError, MemoryRefused, NotHandedOver
from engine.guest.backing import OwnedRam
from engine.guest.base import Handover, Missing, Standing, TrackerName, Tracking
from engine.guest.handover import ARRIVED_JUST_NOW, DestinationEnd, SourceEnd
from engine.memory.blocks import RamBlock

STATE: Final = b"ramferry ram guest 1"


class RamGuest:
    """Memory that somebody else may write while it "runs"; owns the memory."""

    def __init__(
        self,
        ram: OwnedRam,
        *,
        incoming: bool,
        run: bool = True,
        given_up: Handover | None = None,
    ) -> None:
        """Take the memory over.

        :param given_up: what the process before this one knew of the right to run: TAKEN, it was
            handed over; UNKNOWN, it may be."""
        self._ram = ram
        self._is_incoming = incoming
        self._standing = Standing(by_user=not run)
        self._is_gone = given_up is Handover.TAKEN
        self._is_given_away = given_up is Handover.UNKNOWN  #: nobody can be asked
        self._is_open = True
        self._tracking: Tracking | None = None
        self._destination = DestinationEnd(self._own)
        self._source: SourceEnd | None = None
        self._run_when_taken = False
        self._when_taken: Callable[[int], Awaitable[None]] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._death: asyncio.Event = asyncio.Event()

    @property
    def kind(self) -> str:
        return "ram"

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        return (self._ram.block,)

    @property
    def is_asleep(self) -> bool:
        return False

    @property
    def is_running(self) -> bool:
        return self._standing.may_run and self._is_open and self._is_owner

    @property
    def _is_owner(self) -> bool:
        return not (self._is_incoming or self._is_gone or self._is_given_up)

    @property
    def _is_given_up(self) -> bool:
        """The token has left, and nobody has said yet who has it."""
        is_sent = self._source is not None and self._source.is_sent
        return is_sent or self._is_given_away

    @property
    def is_stopped_by_user(self) -> bool:
        return self._standing.by_user

    @property
    def is_alive(self) -> bool:
        return self._is_open

    async def pause(self, *, for_migration: bool) -> int:
        self._standing.change(stands=True, for_migration=for_migration)
        return time.monotonic_ns()

    async def resume(self, *, for_migration: bool) -> None:
        if self._is_incoming or self._is_gone:
            raise GuestError("the guest waits for an incoming migration, or has been handed over")
        if self._source is not None and self._source.is_busy:
            raise GuestError("the guest is being handed over")
        if self._is_given_up:
            self._standing.by_engine = self._is_given_away = False  # nobody else can be asked
        if self._source is not None and self._source.is_sent:
            self._is_gone = await self._source.ask() is Handover.TAKEN
            self._source.close()
            self._source = None
            if self._is_gone:
                raise GuestError("the guest runs at the destination now")
        untracked = self._tracking is not None and self._tracking.name is TrackerName.NONE
        if untracked and not for_migration:
            raise GuestError("the guest is migrated as it stands; wait for the end, or cancel")
        self._standing.change(stands=False, for_migration=for_migration)

    async def throttle(self, percent: int) -> str:
        if not 0 <= percent <= 99:
            raise GuestError(f"throttle of {percent} percent; 0 to 99 are allowed")
        return "nothing: it has no vCPUs"

    async def writes(self) -> int | None:
        return None

    async def start_tracking(self, wanted: TrackerName | None) -> Tracking:
        best = TrackerName.HASH if self.is_running else TrackerName.NONE
        if wanted not in (None, best, TrackerName.HASH):
            raise MemoryRefused(
                f"dirty tracker '{wanted.value}' does not work here: nobody tells who writes to "
                f"a ram guest; working are: content-hash, and none while it is paused"
            )
        reason = "the guest stands: nothing can become dirty"
        if (wanted or best) is TrackerName.HASH:
            reason = "nobody tells who writes to a ram guest: contents are compared"
        self._tracking = Tracking(wanted or best, reason)
        return self._tracking

    async def stop_tracking(self) -> None:
        self._tracking = None

    async def clear_soft_dirty(self) -> None:
        """Never: soft-dirty is refused."""
        raise MemoryRefused("the guest is not tracked by soft-dirty bits")

    async def save_state(self) -> bytes:
        return STATE

    async def load_state(self, state: bytes) -> None:
        if not self._is_incoming:
            raise GuestError("only a guest that waits for a migration takes a state")
        if state != STATE:
            raise GuestError(f"device state of {len(state)} bytes is not that of a ram guest")

    # -- handover --------------------------------------------------------------------------------

    async def listen_handover(self, host_uri: str) -> str:
        if not self._is_incoming:
            raise GuestError("only a guest that waits for a migration can take over")
        return await self._destination.listen(host_uri)

    async def arm(self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]) -> None:
        self._destination.arm(session)
        self._run_when_taken, self._when_taken = run, taken

    def _own(self) -> None:
        self._is_incoming, self._standing = False, Standing(by_user=not self._run_when_taken)
        taken, at_ns = self._when_taken, time.monotonic_ns()

        async def tell() -> None:
            if taken is not None:
                await taken(at_ns)

        self._telling = asyncio.get_running_loop().create_task(tell())

    async def disarm(self) -> bool:
        return self._destination.disarm()

    async def connect_handover(self, endpoint: str, session: bytes) -> None:
        if self._source is not None:
            self._source.close()
        self._source = SourceEnd(session)
        await self._source.connect(endpoint)

    async def check_handover(self) -> None:
        if self._source is None:
            raise NotHandedOver("the guest is not connected to hand over")
        await self._source.check()

    async def open_missing(self) -> Missing:
        """Never: who touches the memory has it mapped, and this process does not know them."""
        raise MemoryRefused(
            "a ram guest has no userfaultfd to lend, for nobody knows who uses its memory; "
            "postcopy needs a guest that does, such as workload"
        )

    async def close_missing(self) -> None:
        """Nothing was opened."""

    async def hand_over(self, wait_ns: int, *, keeps_ram: bool = False) -> Handover:
        """As every guest does; its RAM stays as long as this process, `keeps_ram` or not."""
        if self._source is None:
            raise NotHandedOver("the guest is not connected to hand over")
        self._check_may_leave()
        outcome = await self._source.hand_over(wait_ns)
        self._is_gone = outcome is Handover.TAKEN
        if outcome is Handover.REFUSED:
            self._source.close()
            self._source = None
        return outcome

    def _check_may_leave(self) -> None:
        if not self._is_owner or not self._standing.by_engine:
            raise NotHandedOver("only a guest that the engine holds is handed over")
        if not self._destination.is_settled:
            raise NotHandedOver(ARRIVED_JUST_NOW)

    async def release_ram(self) -> None:
        """RAM goes with this process."""

    async def give_away(self) -> None:
        self._check_may_leave()
        self._is_given_away = True

    async def settle(self, *, taken: bool) -> None:
        is_busy = self._source is not None and self._source.is_busy
        if self._is_given_up and not is_busy:
            self._is_given_away, self._is_gone = False, taken
            if self._source is not None:
                self._source.close()
                self._source = None

    async def take_over(
        self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]
    ) -> None:
        if not self._is_incoming:
            raise GuestError("only a guest that waits for a migration can take over")
        self._run_when_taken, self._when_taken = run, taken
        self._destination.take_over(session)

    async def close_handover(self) -> None:
        if self._source is not None and not self._source.is_sent:
            self._source.close()
            self._source = None
        await self._destination.close()

    # -- the end ---------------------------------------------------------------------------------

    async def untracked(self) -> str:
        """For ever: nobody tells."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def died(self) -> str:
        await self._death.wait()
        return "it was told to end"

    async def quit(self) -> None:
        if self._source is not None:
            self._source.close()
        await self._destination.end()
        if self._telling is not None:
            self._telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._telling
        if self._is_open:
            self._is_open = False
            self._ram.close()
            self._death.set()
