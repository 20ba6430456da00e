"""The control process: one guest, its settings, and at most one migration in each direction.

It is what a monitor's commands act on, and what a migration borrows from (`Host`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from engine.control import machine
from engine.control.blockers import Blockers
from engine.control.capabilities import (
    CapabilityStore,
    check_name,
    is_capability,
    no_dirty_limit,
)
from engine.control.compression import channels_of
from engine.control.conversation import Conversation
from engine.control.dirtylimit import DirtyLimit
from engine.control.dirtyrate import DirtyRate
from engine.control.fdsets import FdSets
from engine.control.incoming import IncomingMigration
from engine.control.jobs import Jobs
from engine.control.journal import Journal
from engine.control.notifiers import Change, Moment, Notifiers, Side
from engine.control.objects import Objects
from engine.control.outgoing import OutgoingMigration
from engine.control.parameters import Parameters, ParameterStore, parse_switch, parse_value
from engine.control.postcopy.operator import PostcopyControl
from engine.control.restart import Paused
from engine.control.route import Route
from engine.control.spares import Spares
from engine.control.status import ENDED, POSTCOPY, RunState, Status
from engine.control.streams.opening import Sources, no_names
from engine.control.streams.source import StreamRoute
from engine.control.uri import Address, Target
from engine.errors import MigrationError, UsageError, shown
from engine.guest.agentguest import AgentGuest
from engine.guest.base import DirtyMeter, Guest
from engine.guest.judgement import Judgement
from engine.guest.workload import WorkloadGuest

log = logging.getLogger("ramferry.control")

#: A guest that has just arrived wants the processors for itself first.
WARM_AFTER_ARRIVAL_S: Final = 5.0

NOT_SUSPENDED: Final = "Unable to wake up: guest is not in suspended state"  #: QEMU's
NOT_RUNNING: Final = "Unable to suspend: guest is not running"

Emit = Callable[[str, "dict[str, object] | None"], None]


def _unheard(event: str, data: dict[str, object] | None) -> None:
    """No monitor listens yet."""


class ControlProcess:
    """Owns the guest, the worker pools and the migrations."""

    def __init__(
        self,
        guest: Guest,
        *,
        incoming: bool,
        uuid: str = "",
        journal: Journal | None = None,
        is_unknown: bool = False,
        paused: Paused | None = None,
        inherited: Iterable[int] = (),
    ) -> None:
        """
        :param uuid: the machine's, in lower case with dashes; empty: it has none.
        :param journal: begun; stays the caller's.
        :param is_unknown: the process before this one was killed while the right to run was on
            its way, and nobody has said who has it.
        :param paused: a postcopy of the process before this one that can be resumed.
        :param inherited: numbers of the descriptors that the process was started with."""
        self.guest, self.uuid = guest, uuid
        self._inherited = set(inherited)
        self.notifiers = Notifiers()
        self._journal, self.inherits_unknown, self.paused = journal, is_unknown, paused
        self.leaves_guest = False  #: at the end a guest that was taken over goes on
        if journal is not None:
            self.notifiers.add(journal.moved)
        self.notifiers.add(self._keep_spares)
        self.store = ParameterStore(self.capability)
        self.capabilities = CapabilityStore(
            self.store,
            lambda name: None if isinstance(self.guest, DirtyMeter) else no_dirty_limit(name),
            is_listening=lambda: self.incoming is not None and not self.incoming.ended.is_set(),
        )
        self.run_state = self._initial_state(incoming)
        self.waits_for_incoming = incoming
        self.outgoing: OutgoingMigration | None = None
        self.blockers = Blockers(lambda: self.is_migrating)
        self.fdsets = FdSets()
        self.objects = Objects()
        self.jobs = Jobs(self.emit)
        self.dirty_rate = DirtyRate(lambda: self.guest, lambda: self.is_migrating)
        self.dirty_limit = DirtyLimit(
            lambda: self.guest, lambda: self.is_migrating and self.capability("dirty-limit")
        )
        self.incoming: IncomingMigration | None = None
        self.postcopy = PostcopyControl(self)
        self.exit_on_error = True
        self.runs_on_arrival = True  #: QEMU's autostart: `stop` before the arrival clears it
        self._spares = Spares()
        self.senders, self.receivers = self._spares.senders, self._spares.receivers
        self.pages, self.faults = self._spares.pages, self._spares.faults
        self.send_event: Emit = _unheard
        self.told_count = 0  #: events so far, also those that nobody hears
        self.over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._judgement: Judgement | None = None
        self._judging = asyncio.Lock()
        self._warmer: asyncio.TimerHandle | None = None
        self._watcher = asyncio.get_running_loop().create_task(self._watch_guest())
        self.store.subscribe(self._settings_changed)
        if paused is None:
            self._warm()
        else:
            self._spares.keep(paused.side, Status.POSTCOPY_PAUSED, channels_of(self))

    def _initial_state(self, incoming: bool) -> RunState:
        if incoming:
            return RunState.INMIGRATE
        is_source = self.paused is not None and self.paused.side is Side.SOURCE
        if is_source and not self.inherits_unknown:
            return RunState.FINISH_MIGRATE
        if not self.guest.is_running:
            return RunState.PAUSED
        return RunState.SUSPENDED if self.guest.is_asleep else RunState.RUNNING

    # -- what a migration borrows ----------------------------------------------------------------

    @property
    def parameters(self) -> Parameters:
        return self.store.values

    def promise(self, side: Side, session: bytes = b"") -> None:
        if self._journal is not None:
            self._journal.promised(side, session)

    def postcopy_begins(self, side: Side, session: bytes) -> None:
        self.inherits_unknown = False
        if self._journal is not None:
            self._journal.postcopy(side, session)

    def settle(self, side: Side) -> None:
        if self._journal is not None:
            self._journal.settled(side)

    def capability(self, name: str) -> bool:
        return self.capabilities.is_on(name)

    def emit(self, event: str, data: dict[str, object] | None = None) -> None:
        """MIGRATION events go out only with the capability `events`, as in QEMU."""
        self.told_count += 1
        if "MIGRATION" not in event or self.capability("events"):
            self.send_event(event, data)

    def set_run_state(self, state: RunState) -> None:
        if state is RunState.RUNNING and self.guest.is_asleep:
            state = RunState.SUSPENDED
        before, self.run_state = self.run_state, state
        if state.is_live or state is RunState.PAUSED:
            self._stood(by_user=state is RunState.PAUSED)
        match (before.is_live, state.is_live):
            case (True, False):
                self.emit("STOP", None)
            case (False, True):
                self.emit("RESUME", None)
            case (True, True) if before is RunState.SUSPENDED is not state:
                self.emit("WAKEUP", None)
            case (True, True) if state is RunState.SUSPENDED is not before:
                self.emit("SUSPEND", None)

    def _stood(self, *, by_user: bool) -> None:
        if self._journal is not None:
            self._journal.stood(by_user=by_user)

    def _settings_changed(self) -> None:
        if self.outgoing is not None:
            self.outgoing.settings_changed()
        self._warm()

    def _keep_spares(self, change: Change) -> None:
        """A notifier."""
        if change.moment is Moment.AFTER and change.status in (*POSTCOPY, *ENDED):
            self._spares.keep(change.side, change.status, channels_of(self))

    def _warm(self) -> None:
        both = (self.outgoing, self.incoming)
        if any(one is not None and one.status in POSTCOPY for one in both):
            return  # `_keep_spares` does
        side = Side.DESTINATION if self.waits_for_incoming else Side.SOURCE
        self._spares.warm(side, channels_of(self), postcopy=self.capability("postcopy-ram"))

    async def _watch_guest(self) -> None:
        reason = await self.guest.died()
        log.error("the guest died: %s", reason)
        self.set_run_state(RunState.INTERNAL_ERROR)

    @property
    def is_migrating(self) -> bool:
        """An outgoing migration has begun and not ended (QEMU: not migration_is_idle)."""
        return self.outgoing is not None and self.outgoing.status not in ENDED

    # -- settings --------------------------------------------------------------------------------

    def set(self, setting: str) -> None:
        """One `name=value` of the command line, parameter or capability.

        :raise UsageError: says what is allowed."""
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"'{shown(setting)}' is not name=value")
        if is_capability(name):
            self.set_capabilities({name: parse_switch(name, text)})
        else:
            self.store.set({name: parse_value(name, text)})

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """:raise UsageError: an unknown name, a migration that runs (one that arrives does not
        count), or QEMU's text for what is wrong; nothing was changed."""
        for name in changes:
            check_name(name)
        if self.is_migrating:
            raise UsageError("There's a migration process in progress")
        self.capabilities.set(changes)
        self._warm()

    @property
    def is_outcome_unknown(self) -> bool:
        """Nobody has said whether the guest runs at the destination of its last migration."""
        own = self.outgoing is not None and self.outgoing.is_outcome_unknown
        return own or self.inherits_unknown

    @property
    def tracker(self) -> tuple[str, str]:
        """The tracker in use by the newest migration and why; empty before there was one."""
        if self.outgoing is None:
            return "", ""
        return self.outgoing.numbers.tracker, self.outgoing.numbers.tracker_reason

    async def judge(self, guest: WorkloadGuest) -> Judgement:
        """Judge every page; the newest judgement stays readable until the next.

        One at a time: the guest stands for each."""
        async with self._judging:
            judgement = await guest.judge()
        if self._judgement is not None:
            self._judgement.close()
        self._judgement = judgement
        return judgement

    @staticmethod
    def path_of(fd: int) -> str:
        """Where another process of this user can open a descriptor of ours."""
        return f"/proc/{os.getpid()}/fd/{fd}"

    # -- what a monitor asks for -----------------------------------------------------------------

    async def stop(self) -> None:
        """QMP `stop`: the guest stands until `cont`, also after a switchover that fails; before it
        has arrived: it will not run when it arrives. It is asked whatever we believe it does."""
        match self.run_state:
            case RunState.INMIGRATE:
                self.runs_on_arrival = False
            case RunState.FINISH_MIGRATE if self.postcopy.has_given_away:
                return
            case state if state.is_live or state in (RunState.PAUSED, RunState.FINISH_MIGRATE):
                await self.guest.pause(for_migration=False)
                if self.run_state.is_live:
                    self.set_run_state(RunState.PAUSED)
                else:
                    self._stood(by_user=True)

    async def sleep(self, asleep: bool) -> None:
        """The guest falls asleep by itself, or QMP `system_wakeup`.

        :raise UsageError: it is not awake, or not asleep."""
        if self.run_state is not (RunState.RUNNING if asleep else RunState.SUSPENDED):
            raise UsageError(NOT_RUNNING if asleep else NOT_SUSPENDED)
        if not isinstance(self.guest, WorkloadGuest):
            raise UsageError(f"a guest of kind '{self.guest.kind}' cannot sleep; workload can")
        await self.guest.sleep(asleep)
        if self.run_state.is_live:  # else it was stopped meanwhile
            self.set_run_state(RunState.RUNNING)

    async def cont(self) -> None:
        """QMP `cont`; before the guest has arrived: it will run when it arrives.

        :raise UsageError: the guest is on its way, is not here any more, or nothing tracks its
        writes."""
        match self.run_state:
            case RunState.INMIGRATE:
                self.runs_on_arrival = True
                return
            case RunState.POSTMIGRATE if self.outgoing is None or not self.outgoing.may_continue:
                raise UsageError("the guest is at the destination")
            case RunState.INTERNAL_ERROR:
                raise UsageError("the guest is dead; only 'quit' is left")
        is_given = self.run_state is RunState.FINISH_MIGRATE and self.postcopy.has_given_away
        if is_given or (self.outgoing is not None and self.outgoing.is_switching_over):
            raise UsageError("Migration is not finalized yet")
        if self.outgoing is not None and self.outgoing.is_untracked:
            raise UsageError(
                "the guest was stopped when its migration began, so its writes are not tracked; "
                "wait for the migration or cancel it first"
            )
        await self.guest.resume(for_migration=False)
        if self.is_outcome_unknown or self.run_state is RunState.POSTMIGRATE:
            self.settle(Side.SOURCE)
        self.inherits_unknown = False
        if self.outgoing is not None:
            await self.outgoing.taken_back()
            if self.outgoing.is_switching_over:
                raise UsageError("Migration is not finalized yet")
        self.set_run_state(RunState.RUNNING)

    async def migrate(
        self, address: Target, resume: bool, named: Callable[[str], int] = no_names
    ) -> None:
        """QMP `migrate`: returns when the migration has begun; checks in QEMU's order.

        :param named: takes a client's descriptor by its name.
        :raise MigrationError: it has not begun, or has failed at once."""
        if self.outgoing is not None and self.outgoing.status in ENDED:
            await self.outgoing.ended.wait()  # it still gives back what the next one would use
        self._check_transport(address)
        if resume:
            await self.postcopy.resume(address)
            return
        if self.is_migrating or self.postcopy.lacks_pages:
            raise UsageError("There's a migration process in progress")
        if self.is_outcome_unknown:
            raise UsageError(
                "nobody has said whether the guest runs at the destination of its last migration; "
                "look there, then 'cont' it here or quit"
            )
        if self.run_state is RunState.INMIGRATE:
            raise UsageError("Guest is waiting for an incoming migration")
        if self.run_state is RunState.POSTMIGRATE:
            raise UsageError("Can't migrate the vm that was paused due to previous migration")
        if self.run_state is RunState.INTERNAL_ERROR:
            raise UsageError("Can't migrate a guest that is dead")
        self.blockers.check()
        self.postcopy.check_stall(address)
        self.outgoing = OutgoingMigration(self, self._route_to(address, named))
        try:
            self.outgoing.begin()
        except MigrationError:
            await self.outgoing.ended.wait()
            raise

    def _route_to(self, address: Target, named: Callable[[str], int]) -> Route:
        if isinstance(address, Address):
            return Conversation(address)
        sources = Sources(named, self.fdsets, self._inherited)
        return StreamRoute(address, sources, answers=self.capability("return-path"))

    def _check_transport(self, address: Target) -> None:
        """:raise UsageError: QEMU's text: a stream has no room for what a capability wants."""
        wants_channels = self.capability("multifd") or self.capability("postcopy-preempt")
        if wants_channels and not isinstance(address, Address):
            raise UsageError("Migration requires multi-channel URIs (e.g. tcp)")

    async def migrate_incoming(
        self, address: Target, exit_on_error: bool, named: Callable[[str], int] = no_names
    ) -> None:
        """QMP `migrate-incoming`: returns when it listens.

        :param named: takes a client's descriptor by its name.
        :raise UsageError: not started with -incoming, or already done.
        :raise MigrationError: cannot listen there."""
        self.check_incoming()
        self._check_transport(address)
        self.exit_on_error = exit_on_error
        sources = Sources(named, self.fdsets, self._inherited)
        incoming = IncomingMigration(self, address, sources)
        try:
            incoming.start()
        except OSError as exc:
            raise UsageError(incoming.error or str(exc)) from exc
        self.follow(incoming)

    def check_incoming(self) -> None:
        """:raise UsageError: `migrate-incoming` has no place here, or not any more."""
        if not self.waits_for_incoming:
            raise UsageError("'-incoming' was not specified on the command line")
        if self.incoming is not None:
            raise UsageError("The incoming migration has already been started")

    def follow(self, incoming: IncomingMigration) -> None:
        """It is ours from now on."""
        self.incoming = incoming
        self._follower = asyncio.get_running_loop().create_task(self._follow(incoming))

    async def _follow(self, incoming: IncomingMigration) -> None:
        """The end of an incoming migration: the guest is ours, or the process has no use."""
        await incoming.ended.wait()
        self.waits_for_incoming = incoming.status is not Status.COMPLETED
        if incoming.status is Status.FAILED and self.exit_on_error and not self.over.done():
            self.over.set_result(1)
        if not self.waits_for_incoming:
            await asyncio.gather(self.receivers.close(), self.faults.close())
            self._warmer = asyncio.get_running_loop().call_later(WARM_AFTER_ARRIVAL_S, self._warm)

    async def migrate_continue(self, expected: Status) -> None:
        """QMP `migrate-continue`: goes on from `pre-switchover`; in other statuses a no-op.

        :raise UsageError: the source's status is not `expected`."""
        status = self.outgoing.status if self.outgoing is not None else Status.NONE
        if status is not expected:
            raise UsageError(f"Migration not in expected state: {status.value}")
        if self.outgoing is not None and status is Status.PRE_SWITCHOVER:
            self.outgoing.handle(machine.Continue())

    async def cancel(self) -> None:
        """QMP `migrate_cancel`: no-op where nothing runs.

        :raise UsageError: the guest runs at the destination, and lacks pages."""
        if self.outgoing is None:
            return
        if self.outgoing.status in POSTCOPY:
            raise UsageError("Postcopy migration in progress, cannot cancel.")
        self.outgoing.handle(machine.Cancel())
        self.outgoing.stop_waiting()

    @property
    def can_be_yanked(self) -> bool:
        """A migration in either direction has begun and not ended."""
        return self.is_migrating or (self.incoming is not None and not self.incoming.ended.is_set())

    def yank(self) -> None:
        """QMP `yank`: the migration fails as if its connections had broken; the guest goes on
        where it would after that. One that still waits for its source goes on waiting."""
        if self.outgoing is not None and self.is_migrating:
            self.outgoing.handle(machine.Failure("'yank' has cut the migration's connections"))
            self.outgoing.stop_waiting()
        if self.incoming is not None:
            self.incoming.yank()

    def migration_workers(self) -> list[tuple[str, int]]:
        """Name and process id of each worker of the migration that runs, by QEMU's names where it
        has some."""
        senders = self.outgoing.worker_pids() if self.outgoing is not None else {}
        receivers = self.incoming.worker_pids() if self.incoming is not None else {}
        services = {
            "page-service": self.outgoing.service_pid if self.outgoing is not None else None,
            "fault-service": self.incoming.service_pid if self.incoming is not None else None,
        }
        return [
            *((f"multifdsend_{index}", pid) for index, pid in senders.items()),
            *((f"multifdrecv_{index}", pid) for index, pid in receivers.items()),
            *((name, pid) for name, pid in services.items() if pid is not None),
        ]

    def quit(self, exit_code: int = 0) -> None:
        """QMP `quit`, or a signal."""
        if not self.over.done():
            self.over.set_result(exit_code)

    async def close(self) -> None:
        """End the migrations, the workers and the guest. Idempotent.

        A migration that is on its way is cancelled first, so that the destination knows."""
        if self.outgoing is not None:
            await self.outgoing.close()
        if self.incoming is not None:
            await self.incoming.close()
            await self._follower
        await self.dirty_rate.close()
        await self.dirty_limit.close()
        self.fdsets.close()
        if self._warmer is not None:
            self._warmer.cancel()
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        await self._spares.close()
        if self.leaves_guest and isinstance(self.guest, AgentGuest):
            await self.guest.leave()
        await self.guest.quit()
        if self._judgement is not None:
            self._judgement.close()
            self._judgement = None
