"""The agent of a VMM that hands its memory over: `python -m engine.guest.handoff_agent FD`.

As that of any other process, but nothing is injected: the VMM does what it is told over its
connection, and when that ends, it knows. Until the right to run is given up, it goes on then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol, cast

import msgspec

from engine.errors import GuestError, MigrationError, NotHandedOver
from engine.guest import messages
from engine.guest.adoption import say
from engine.guest.agentmain import run_agent
from engine.guest.base import Role
from engine.guest.foreign import ForeignMachine, ForeignTracker
from engine.guest.foreign_agent import ForeignAgent
from engine.guest.handoff_door import Door, Visitor
from engine.guest.handoff_machine import HandoffMachine
from engine.guest.handoff_plain import NO_ORDERS, PlainMachine
from engine.guest.messages import Reply

REASON: Final = "userfaultfd write-protect async with PAGEMAP_SCAN, handed over by process"


class HandedMachine(ForeignMachine, Protocol):
    """What this agent drives."""

    def stay(self, stays: bool) -> None:
        """Whether it stands also without its connection, while it stands."""
        ...

    def arrive(self) -> None:
        """The guest is here, and stands: said without waiting."""
        ...

    def check_memory(self) -> None:
        """Whether all writes to it are still seen."""
        ...

    def open_missing(self) -> list[int]:
        """It waits for what is missing, whoever of us dies; copies of its userfaultfds."""
        ...

    def end_missing(self) -> None:
        """Nobody waits any more."""
        ...


class HandoffAgent(ForeignAgent):
    """One VMM, one control connection, and the door at which it came in."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        self._door: Door | None = None
        self._loop = asyncio.get_running_loop()

    def _do(self, request: messages.AnyRequest, fds: list[int]) -> Awaitable[Reply]:
        handler = HANDOFF_HANDLERS.get(type(request))
        return super()._do(request, fds) if handler is None else handler(self, request, fds)

    @property
    def _vmm(self) -> HandedMachine:
        return cast(HandedMachine, self._need_foreign())

    # -- life ------------------------------------------------------------------------------------

    async def _start_handoff(self, request: messages.StartHandoff, _fds: list[int]) -> Reply:
        """Who is refused may come again, better prepared, and so may others."""
        if self.role is not Role.NEW or self._door is not None:
            raise GuestError("the agent is attached already")
        door = self._door = Door(request.path)
        while True:
            visitor = await door.next()
            try:
                machine = await self._threads.run(partial(self._admit, visitor, request.incoming))
            except MigrationError as exc:
                door.refuse(visitor, str(exc))
                continue
            try:
                self._watch(machine.pid)
                break
            except GuestError:
                machine.close()
        door.refuse_others()
        self._foreign, self._rundir = machine, request.rundir
        self.role = Role.INCOMING if request.incoming else Role.OWNER
        self._standing.by_user = not machine.is_running
        return self._started(request.id)

    def _started(self, request_id: int) -> Reply:
        reply = super()._started(request_id)
        kind = self._vmm.kind
        return Reply(msgspec.structs.replace(reply.answer, kind=kind), reply.lent)

    def _admit(self, visitor: Visitor, incoming: bool) -> HandedMachine:
        if visitor.is_plain:
            return PlainMachine(visitor, incoming=incoming)
        return HandoffMachine(visitor, incoming=incoming, on_end=self._hung_up)

    def _hung_up(self) -> None:
        """Called by the connection's thread, when we have closed it, too."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end_with_vmm)

    def _end_with_vmm(self) -> None:
        if not self._end.is_set() and self._foreign is not None:
            say(f"handoff[{os.getpid()}]: {self._foreign.what} has ended its connection")
        self._end.set()

    async def _give_back(self) -> None:
        await super()._give_back()
        if self._door is not None:
            await self._door.close()

    # -- running: what becomes of it without its connection --------------------------------------

    async def _keep(self) -> None:
        """A VMM that stands for us only goes on without us, as long as it has the right to run."""
        vmm, stays = self._vmm, self._standing.by_user or self.role is not Role.OWNER
        if not vmm.is_running:
            await self._threads.run(lambda: vmm.stay(stays))

    async def _pause_asked(self, request: messages.Pause, fds: list[int]) -> Reply:
        if self._vmm.is_running and isinstance(self._vmm, PlainMachine):
            raise GuestError(NO_ORDERS)  # and nothing is wanted that cannot be
        reply = await self._pause(request, fds)
        await self._keep()
        return reply

    async def _resume_kept(self, request: messages.Resume, fds: list[int]) -> Reply:
        reply = await self._resume_asked(request, fds)
        await self._keep()
        return reply

    def _taken(self) -> None:
        super()._taken()
        if not self._is_free:
            self._vmm.arrive()

    # -- handover: from here on the end of the connection tells nothing ---------------------------

    async def _give(self, request: messages.HandOver | messages.GiveAway, fds: list[int]) -> Reply:
        """`HandOver` and `GiveAway`."""
        vmm = self._vmm
        try:
            await self._threads.run(lambda: vmm.stay(True))
        except GuestError as exc:
            raise NotHandedOver(f"nobody can say whether the guest stands: {exc}") from exc
        try:
            if isinstance(request, messages.HandOver):
                return await self._hand_over(request, fds)
            return await self._give_away(request, fds)
        finally:
            with contextlib.suppress(GuestError):  # who is gone needs to know nothing
                await self._keep()

    async def _check_handed(self, request: messages.CheckHandover, fds: list[int]) -> Reply:
        """Nobody tells of a mapping that has come, or of a fork that would matter."""
        await self._threads.run(self._vmm.check_memory)
        return await self._check_handover(request, fds)

    async def _settle_kept(self, request: messages.Settle, fds: list[int]) -> Reply:
        reply = await self._settle(request, fds)
        await self._keep()
        return reply

    # -- tracking and missing pages --------------------------------------------------------------

    async def _track(self, request: messages.StartTracking, fds: list[int]) -> Reply:
        reply = await self._start_tracking(request, fds)
        reason = f"{REASON} {self._vmm.pid}"
        return Reply(msgspec.structs.replace(reply.answer, reason=reason), reply.lent)

    def _hear_forks(self, tracker: ForeignTracker | None) -> None:
        """No child has the memory."""

    async def _lack(self, request: messages.OpenMissing, _fds: list[int]) -> Reply:
        vmm = self._vmm
        if not self._missing:
            if self.role is not Role.INCOMING:
                raise GuestError("only a guest that waits for a migration can miss pages")
            async with self._one_at_a_time:
                self._missing = await self._threads.run(vmm.open_missing)
        addresses = [each.address for each in vmm.blocks]
        return Reply(
            messages.MissingOpened(request.id, addresses, vmm.count_vcpus()), self._missing
        )

    async def _end_missing(self) -> None:
        if self._missing:
            missing, self._missing = self._missing, []
            try:
                await self._threads.run(self._vmm.end_missing)
            finally:
                messages.close_all(missing)


HANDOFF_HANDLERS: Final[
    Mapping[type, Callable[[HandoffAgent, Any, list[int]], Awaitable[Reply]]]
] = {
    messages.StartHandoff: HandoffAgent._start_handoff,
    messages.Pause: HandoffAgent._pause_asked,
    messages.Resume: HandoffAgent._resume_kept,
    messages.CheckHandover: HandoffAgent._check_handed,
    messages.HandOver: HandoffAgent._give,
    messages.GiveAway: HandoffAgent._give,
    messages.Settle: HandoffAgent._settle_kept,
    messages.StartTracking: HandoffAgent._track,
    messages.OpenMissing: HandoffAgent._lack,
}


if __name__ == "__main__":
    run_agent(HandoffAgent)
