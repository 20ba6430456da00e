"""What all guests that have an agent process have in common, as their control process sees them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from engine.errors import GuestError
from engine.guest import datagrams, messages
from engine.guest.base import Handover, Missing
from engine.guest.link import ANSWER_WAIT_S, AgentLink


class AgentGuest(ABC):
    """Run state, the right to run and missing pages, asked of an agent; owns the link and the
    descriptors that the agent lends."""

    _missing_wait_s = ANSWER_WAIT_S

    def __init__(self, link: AgentLink, *, running: bool, stopped: bool) -> None:
        """Take the link over."""
        self._link = link
        self._is_running = running
        self._is_stopped_by_user = stopped
        self.is_asleep = False
        self._is_open = True
        self._tracking_fds: list[int] = []
        self._untracked: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_outcome_unknown = False  #: it was adopted, and does not know who has the token
        self.is_missing_open = False  #: its pages are missing until `close_missing`
        self.is_gone = False  #: it runs at the destination, and keeps its RAM until `release_ram`
        self._missing: Missing | None = None
        self._when_taken: Callable[[int], Awaitable[None]] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        link.on_event = self._hear

    @property
    def agent_pid(self) -> int:
        """Of the process that lives on where this one may not."""
        return self._link.pid

    @property
    def is_running(self) -> bool:
        return self._is_running

    @property
    def is_stopped_by_user(self) -> bool:
        return self._is_stopped_by_user

    @property
    def is_alive(self) -> bool:
        return self._is_open and self._link.is_alive

    async def _do(self, request: messages.Request, wait_s: float = ANSWER_WAIT_S) -> None:
        await self._link.ask(request, messages.Done, wait_s=wait_s)

    # -- running ---------------------------------------------------------------------------------

    async def pause(self, *, for_migration: bool) -> int:
        return await self._change(messages.Pause(self._link.next_id(), for_migration))

    async def resume(self, *, for_migration: bool) -> None:
        await self._change(messages.Resume(self._link.next_id(), for_migration))

    async def _change(self, request: messages.Pause | messages.Resume | messages.Sleep) -> int:
        at, _ = await self._link.ask(request, messages.At)
        self._is_running, self._is_stopped_by_user = at.running, at.stopped
        self.is_asleep = at.asleep
        return at.at_ns

    async def throttle(self, percent: int) -> str:
        request = messages.Throttle(self._link.next_id(), percent)
        throttled, _ = await self._link.ask(request, messages.Throttled)
        return throttled.way

    # -- tracking --------------------------------------------------------------------------------

    async def stop_tracking(self) -> None:
        self._close_tracking_fds()
        await self._do(messages.StopTracking(self._link.next_id()))

    def _close_tracking_fds(self) -> None:
        fds, self._tracking_fds = self._tracking_fds, []
        datagrams.close_all(fds)

    async def clear_soft_dirty(self) -> None:
        """Call every page clean from now on; only when SOFT_DIRTY tracks.

        :raise MemoryRefused: another tracker is in use."""
        await self._do(messages.ClearSoftDirty(self._link.next_id()))

    # -- missing pages ---------------------------------------------------------------------------

    async def open_missing(self) -> Missing:
        if self._missing is None:
            request = messages.OpenMissing(self._link.next_id())
            opened, fds = await self._link.ask(
                request, messages.MissingOpened, wait_s=self._missing_wait_s
            )
            if not fds or len(fds) != len(opened.addresses):
                datagrams.close_all(fds)
                raise GuestError("the guest waits for missing pages without a userfaultfd")
            self._missing = Missing(tuple(fds), tuple(opened.addresses), opened.vcpus)
            self.is_missing_open = True
        return self._missing

    async def close_missing(self) -> None:
        self._close_lent()
        await self._do(messages.CloseMissing(self._link.next_id()), self._missing_wait_s)
        self.is_missing_open = False

    def _close_lent(self) -> None:
        if self._missing is not None:
            datagrams.close_all(self._missing.uffds)
            self._missing = None

    # -- handover --------------------------------------------------------------------------------

    async def listen_handover(self, host_uri: str) -> str:
        request = messages.ListenHandover(self._link.next_id(), host_uri)
        listening, _ = await self._link.ask(request, messages.Listening)
        return listening.endpoint

    async def arm(self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]) -> None:
        self._when_taken = taken
        await self._do(messages.Arm(self._link.next_id(), session, run))

    def _hear(self, event: messages.Event) -> None:
        """What the agent says unasked."""
        if isinstance(event, messages.Taken):
            self._taken(event)
        if isinstance(event, messages.Untracked) and not self._untracked.done():
            self._untracked.set_result(event.reason)

    def _taken(self, event: messages.Taken) -> None:
        self._is_running, self._is_stopped_by_user = event.running, not event.running
        self.is_asleep = event.asleep
        when_taken = self._when_taken

        async def tell() -> None:
            if when_taken is not None:
                await when_taken(event.at_ns)

        task = asyncio.get_running_loop().create_task(tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def disarm(self) -> bool:
        count, _ = await self._link.ask(messages.Disarm(self._link.next_id()), messages.Count)
        return bool(count.value)

    async def connect_handover(self, endpoint: str, session: bytes) -> None:
        request = messages.ConnectHandover(self._link.next_id(), endpoint, session)
        await self._do(request, 2 * ANSWER_WAIT_S)

    async def check_handover(self) -> None:
        await self._do(messages.CheckHandover(self._link.next_id()), 2 * ANSWER_WAIT_S)

    async def hand_over(self, wait_ns: int, *, keeps_ram: bool = False) -> Handover:
        request = messages.HandOver(self._link.next_id(), wait_ns, keeps_ram)
        wait_s = wait_ns / 1e9 + ANSWER_WAIT_S
        outcome, _ = await self._link.ask(request, messages.HandedOver, wait_s=wait_s)
        found = Handover(outcome.outcome)
        self.is_gone = found is Handover.TAKEN
        return found

    async def release_ram(self) -> None:
        await self._do(messages.ReleaseRam(self._link.next_id()))

    async def give_away(self) -> None:
        await self._do(messages.GiveAway(self._link.next_id()))

    async def settle(self, *, taken: bool) -> None:
        await self._do(messages.Settle(self._link.next_id(), taken))

    async def take_over(
        self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]
    ) -> None:
        self._when_taken = taken
        await self._do(messages.TakeOver(self._link.next_id(), session, run))

    async def close_handover(self) -> None:
        await self._do(messages.CloseHandover(self._link.next_id()))

    # -- the end ---------------------------------------------------------------------------------

    async def untracked(self) -> str:
        return await asyncio.shield(self._untracked)

    async def died(self) -> str:
        return await self._link.died()

    @abstractmethod
    async def quit(self) -> None:
        """End the agent, and give everything of ours back. Idempotent."""

    @abstractmethod
    async def leave(self) -> None:
        """Give everything of ours back; the agent goes on, and listens to be adopted. Idempotent,
        and then `quit` does nothing."""

    async def _stop_telling(self) -> None:
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
