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
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, cast

import msgspec

from engine.errors import GuestError, MigrationError, NotHandedOver
from engine.guest import datagrams, messages
from engine.guest.adoption import say
from engine.guest.agentmain import run_agent
from engine.guest.base import Role
from engine.guest.foreign_agent import ForeignAgent
from engine.guest.foreign_machine import ForeignMachine
from engine.guest.handoff_door import Door, Visitor
from engine.guest.handoff_machine import HandoffMachine
from engine.guest.handoff_plain import PlainMachine
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


@dataclass(slots=True)
class _End:
    """That of a VMM's connection; `is_ours` once the VMM is the one that is served."""

    has_come: bool = False
    is_ours: bool = False


class HandoffAgent(ForeignAgent):
    """One VMM, one control connection, and the door at which it came in."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        self._door: Door | None = None
        self._connection: socket.socket | None = None  #: of a VMM that takes orders; its machine's
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
            visitor, end = await door.next(), _End()
            admit = partial(self._admit, visitor, end, request.incoming)
            try:
                machine = await self._threads.run(admit)
            except MigrationError as exc:
                door.refuse(visitor, str(exc))
                continue
            try:
                if end.has_come:
                    raise GuestError(f"{machine.what} has ended its connection")
                self._watch(machine.pid)
                break
            except GuestError as exc:
                say(f"handoff[{os.getpid()}]: {exc}, as soon as it was welcome")
                machine.close()
        door.refuse_others()
        end.is_ours = True
        self._connection = None if visitor.is_plain else visitor.connection
        self._foreign, self._rundir = machine, request.rundir
        self.role = Role.INCOMING if request.incoming else Role.OWNER
        self._standing.by_user = not machine.is_running
        return self._started(request.id)

    def _started(self, request_id: int) -> Reply:
        """Control gets a copy of the connection, too: if we are killed, it can still be told."""
        reply, connection = super()._started(request_id), self._connection
        beside = [connection.fileno()] if connection is not None else []
        answer = msgspec.structs.replace(
            reply.answer, kind=self._vmm.kind, has_connection=bool(beside)
        )
        return Reply(answer, [*reply.lent, *beside])

    def _admit(self, visitor: Visitor, end: _End, incoming: bool) -> HandedMachine:
        if visitor.is_plain:
            return PlainMachine(visitor, incoming=incoming)
        return HandoffMachine(visitor, incoming=incoming, on_end=partial(self._hung_up, end))

    def _hung_up(self, end: _End) -> None:
        """Called by the connection's thread, when we have closed it, too."""
        end.has_come = True
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end_with_vmm, end)

    def _end_with_vmm(self, end: _End) -> None:
        if not end.is_ours:  # it had said hello, and others may come
            return
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
        vmm = self._vmm
        async with self._one_at_a_time:
            stays = self._standing.by_user or self.role is not Role.OWNER
            if not vmm.is_running:
                await self._threads.run(lambda: vmm.stay(stays))

    async def _pause_asked(self, request: messages.Pause, fds: list[int]) -> Reply:
        reply = await self._pause(request, fds)
        await self._keep()
        return reply

    async def _resume_kept(self, request: messages.Resume, fds: list[int]) -> Reply:
        reply = await self._resume_asked(request, fds)
        await self._keep()
        return reply

    def _taken(self) -> None:
        super()._taken()
        if self._is_free:
            return
        try:
            self._vmm.arrive()
        except MigrationError as exc:
            say(f"agent[{os.getpid()}]: the guest is here, and was not told so: {exc}")

    @property
    def _is_taken_back(self) -> bool:
        """Who is memory alone takes no order to stand."""
        return super()._is_taken_back or self._vmm.kind == PlainMachine.kind

    # -- handover: from here on the end of the connection tells nothing ---------------------------

    async def _give(self, request: messages.HandOver | messages.GiveAway, fds: list[int]) -> Reply:
        """`HandOver` and `GiveAway`."""
        vmm = self._vmm
        try:
            async with self._one_at_a_time:
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

    def _open(self, _foreign: ForeignMachine) -> None:
        self._missing = self._vmm.open_missing()

    def _end_in_vmm(self, uffds: list[int]) -> None:
        try:
            self._vmm.end_missing()
        finally:
            datagrams.close_all(uffds)


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
}


if __name__ == "__main__":
    run_agent(HandoffAgent)
