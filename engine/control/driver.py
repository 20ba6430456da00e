"""Runs a migration's machine: events in, effects carried out, bugs and failures fed back.

Work is one task at a time, other tasks run beside it. What the work is, `OutgoingMigration` says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from engine.control import machine
from engine.control.host import Host
from engine.control.machine import Effect, Heal, Outgoing, Phase
from engine.control.notifiers import Change, Moment, Side
from engine.control.statistics import MigrationNumbers
from engine.control.status import Status
from engine.errors import MigrationError, StateError
from engine.guest.base import Handover

log = logging.getLogger("ramferry.source")

Work = Callable[[], Coroutine[Any, Any, None]]

#: These give up what the work before them uses: they begin when that has ended.
GIVING_UP: Final = frozenset(
    {Effect.ABANDON, Effect.ABANDON_STOPPED, Effect.FINISH, Effect.LEAVE, Effect.SUSPEND}
)


class Driver(ABC):
    """One migration's; owns its tasks until whoever gives up cancels them."""

    def __init__(self, host: Host, outgoing: Outgoing) -> None:
        self.host, self.machine = host, outgoing
        self.numbers = MigrationNumbers()
        self._work: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._heals: dict[int, asyncio.Task[None]] = {}
        self._events: deque[machine.Event] = deque()
        self._is_handling = False
        self.is_outcome_unknown = False  #: nobody has said who has the right to run
        self.ended = asyncio.Event()
        self.changed = asyncio.Event()  #: set at every step of the machine

    @property
    @abstractmethod
    def _work_of(self) -> Mapping[Effect, Work]:
        """How each effect is carried out; it ends with the event that machine.py says."""

    @abstractmethod
    async def _heal(self, index: int) -> None:
        """Make a channel anew."""

    @abstractmethod
    def _end_round(self) -> None:
        """Have the round that is being sent end soon."""

    @property
    def status(self) -> Status:
        return self.machine.status

    # -- events ----------------------------------------------------------------------------------

    def handle(self, event: machine.Event) -> None:
        """Feed the machine and carry out what it says; a bug ends the migration, not the guest.

        An event that comes meanwhile, from a notifier, is taken after this one."""
        self._events.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._events:
                self._take(self._events.popleft())
        finally:
            self._is_handling = False

    def fail_at_once(self, reason: str) -> None:
        """Before the work that the last event began has run: it never does."""
        if self._work is not None:
            self._work.cancel()
        self.handle(machine.Failure(reason))

    def _take(self, event: machine.Event) -> None:
        before = self.machine.status
        try:
            effects = self.machine.handle(event)
        except StateError as exc:
            log.error("%s; story: %s", exc, " | ".join(exc.story))
            effects = self.machine.handle(machine.Failure(str(exc)))
        self.numbers.heals = self.machine.heals
        self.is_outcome_unknown |= Effect.ABANDON_STOPPED in effects  # before anybody is told
        veto = self._tell(before, Moment.BEFORE)
        if self.machine.status is not before and self.machine.phase is not Phase.ENDED:
            self._announce()
        for effect in effects:
            self._carry_out(effect)
        if self.machine.phase is Phase.ENDED and not self.numbers.ended_ns:
            self._end()
        if self.machine.phase is Phase.ENDED and not effects and self._is_at_rest:
            self.ended.set()
        self._tell(before, Moment.AFTER)
        self.changed.set()
        if veto is not None:
            self.handle(machine.Failure(veto))

    @property
    def _is_at_rest(self) -> bool:
        """No work goes on, but for what says so itself: nothing has to be given back any more."""
        work = self._work
        return work is None or work.done() or work is asyncio.current_task()

    def _tell(self, before: Status, moment: Moment) -> str | None:
        """Notify of a change, if there was one; a veto is returned."""
        if self.machine.status is before:
            return None
        change = Change(Side.SOURCE, before, self.machine.status, moment)
        return self.host.notifiers.tell(change)

    def _announce(self) -> None:
        self.host.emit("MIGRATION", {"status": self.machine.status.value})

    def _end(self) -> None:
        self.numbers.ended_ns = time.monotonic_ns()
        self._announce()

    async def suspended(self) -> None:
        """Wait until a migration that is paused has given its connections back."""
        while self.machine.phase is Phase.SUSPENDING:
            self.changed.clear()
            await self.changed.wait()

    # -- effects ---------------------------------------------------------------------------------

    def _carry_out(self, effect: Effect | Heal) -> None:
        if isinstance(effect, Heal):
            self._start_heal(effect.index)
        elif effect is Effect.END_ROUND:
            self._end_round()
        else:
            before = self._work if effect in GIVING_UP else None
            work = self._work_of[effect]
            self._work = self._task(self._guarded(lambda: self._after(before, work)))

    async def _after(self, before: asyncio.Task[None] | None, work: Work) -> None:
        if before is not None:
            before.cancel()
            await asyncio.wait({before})
        await work()

    def _start_heal(self, index: int) -> None:
        """A newer loss of the same lane supersedes the healing of the older."""
        running = self._heals.pop(index, None)
        if running is not None:
            running.cancel()
        self._heals[index] = self._task(self._guarded(lambda: self._heal(index)))

    def _spawn(self, work: Work) -> None:
        """Let it run beside the others."""
        self._background.add(self._task(self._guarded(work)))

    async def _stop_tasks(self) -> None:
        """End everything that runs beside the work."""
        tasks = (*self._heals.values(), *self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._heals, self._background = {}, set()

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._look_for_bug)
        return task

    def _look_for_bug(self, task: asyncio.Task[None]) -> None:
        """A bug of ours ends the migration as a failure would, with its traceback in the log."""
        if task.cancelled() or (bug := task.exception()) is None:
            return
        log.error("internal error in a migration", exc_info=bug)
        phase = self.machine.phase
        self.handle(machine.Failure(f"internal error: {bug!r}"))
        if task is not self._work:
            return
        if phase in (Phase.FAILING, Phase.CANCELLING):
            self.handle(machine.Abandoned())
        elif phase is Phase.SUSPENDING:
            self.handle(machine.Suspended())
        elif phase is Phase.HANDING_OVER:
            self.handle(machine.HandedOver(Handover.UNKNOWN))

    async def _guarded(self, work: Work) -> None:
        """Turn what the world did to a piece of work into an event."""
        try:
            await work()
        except TimeoutError:
            self.handle(machine.Failure("the destination did not answer in time"))
        except (MigrationError, OSError) as exc:
            cause = f": {exc.__cause__}" if isinstance(exc.__cause__, OSError) else ""
            self.handle(machine.Failure(f"{exc}{cause}"))
