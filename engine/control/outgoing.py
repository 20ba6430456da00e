"""The source's work: what the machine's effects do, and how each of them ended.

`Outgoing` (machine.py) decides, `Driver` runs it; everything with a socket, a process or a clock is
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence

from engine import wire
from engine.control import machine, policy
from engine.control.agreement import Agreement
from engine.control.compression import compression_now
from engine.control.convergence import Convergence
from engine.control.conversation import Conversation
from engine.control.dirtysync import DirtySync, wanted_tracker
from engine.control.driver import Driver, Work
from engine.control.host import Host
from engine.control.lookahead import LookAhead
from engine.control.machine import Effect, Outgoing, Phase
from engine.control.notifiers import Side
from engine.control.postcopy.source import PostcopySource
from engine.control.route import Route
from engine.control.senders import SenderGroup
from engine.control.stall import STALL_NEEDS_POSTCOPY, OnStall
from engine.control.statistics import SAMPLE_S, DowntimePhases
from engine.control.status import RunState, Status
from engine.control.uri import Address
from engine.control.waiting import first_of
from engine.errors import MigrationError, NotHandedOver, UsageError
from engine.guest.base import Handover, TrackerName
from engine.multifd.progress import Count

log = logging.getLogger("ramferry.source")


class OutgoingMigration(Driver):
    """One migration away from here; owns its channels, senders and tracking until it has ended.

    After any failure before the destination took over, the guest runs here as before. What postcopy
    adds is `PostcopySource`'s, which uses the public members.
    """

    def __init__(self, host: Host, route: Route) -> None:
        outgoing = Outgoing(
            heal_limit=host.parameters.x_heal_limit if route.can_heal else 0,
            pauses_before_switchover=host.capability("pause-before-switchover"),
        )
        super().__init__(host, outgoing)
        self._route = route
        self.session = os.urandom(wire.SESSION_BYTES)
        self._senders: SenderGroup | None = None
        self._codecs: tuple[int, ...] = ()  #: that the destination can decode
        self._sync: DirtySync | None = None
        self._convergence = Convergence(host, self.numbers)
        self._ahead = LookAhead(self._convergence, self.numbers)
        self._postcopy: PostcopySource | None = None
        self._is_held = False  #: the engine has stopped the guest, or tried to
        self._pause_began_ns = self._stood_ns = 0
        self.round_number = 0  #: newest that was ordered

    @classmethod
    def paused(cls, host: Host, session: bytes) -> OutgoingMigration:
        """A postcopy whose control process was killed: the guest runs at the destination."""
        migration = cls(host, Conversation(Address()))
        migration.session = session
        migration.machine.wants_postcopy = migration.machine.is_postcopy = True
        migration.machine.phase, migration.machine.status = Phase.PAUSED, Status.POSTCOPY_PAUSED
        migration.machine.error = "the control process before this one was killed"
        migration.numbers.total_bytes = sum(block.size for block in host.guest.blocks)
        return migration

    @property
    def _work_of(self) -> dict[Effect, Work]:
        postcopy = self.postcopy
        return {
            Effect.CONNECT: self._connect,
            Effect.SEND_ROUND: self._send_round,
            Effect.HARVEST: self._harvest,
            Effect.PAUSE_AND_HARVEST: self._pause_and_harvest,
            Effect.RESUME_AND_SEND_ROUND: self._resume_and_send_round,
            Effect.HARVEST_AND_SEND_ROUND: self._harvest_and_send_round,
            Effect.ARM_DESTINATION: self._arm_destination,
            Effect.HAND_OVER: self._hand_over,
            Effect.ABANDON: self._abandon,
            Effect.ABANDON_STOPPED: self._abandon_stopped,
            Effect.FINISH: self._finish,
            Effect.LEAVE: self._leave,
            **(postcopy.work if postcopy is not None else {}),
        }

    def begin(self) -> None:
        """:raise MigrationError: it has failed at once, and `ended` comes."""
        self.handle(machine.Start())
        try:
            if not self.host.parameters.tls_creds:  # else `_connect` refuses, and nothing is opened
                self._route.open()
        except (MigrationError, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            self.fail_at_once(str(reason))
            raise exc if isinstance(exc, MigrationError) else MigrationError(reason) from exc

    def stop_waiting(self) -> None:
        """After `migrate_cancel`, `yank` or `quit`: also not for a program of `exec:` any more."""
        self._route.stop_waiting()

    @property
    def may_continue(self) -> bool:
        """It completed without a word from the destination: `cont` is the operator's."""
        return self._route.is_one_way and self.status is Status.COMPLETED

    # -- setup -----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        guest, settings = self.host.guest, self.host.parameters
        self._spawn(self._watch_guest)
        agreement = await self._route.connect(self.host, self.session)
        self.numbers.placement = agreement.placement
        tracking = await guest.start_tracking(wanted_tracker(settings.x_tracker))
        self._convergence.is_pause_final = tracking.ends_with_pause
        self.numbers.tracker, self.numbers.tracker_reason = tracking.name.value, tracking.reason
        senders = self.use(agreement)
        await senders.start(tracking, detect_zero=settings.zero_page_detection != "none")
        self._sync = DirtySync(self.host, senders, self.numbers, tracking.name)
        sync, is_sending = self._sync, lambda: self.machine.phase is Phase.SENDING
        self._spawn(lambda: sync.watch(lambda: self.machine.phase in machine.GONE))
        self._spawn(lambda: sync.now_and_then(is_sending))
        self._spawn(lambda: self._ahead.run(sync, is_sending, self.refresh, senders.end_round))
        self.numbers.expected_downtime_ns = settings.downtime_limit * 1_000_000
        self.numbers.total_bytes = sum(block.size for block in guest.blocks)
        self.begin_pass()
        self.numbers.setup_done_ns = time.monotonic_ns()
        self.handle(machine.Connected())

    def use(self, agreement: Agreement) -> SenderGroup:
        """Make senders for the channels that were agreed on, and hear what the destination says."""
        self._codecs = agreement.codecs
        self._senders = senders = SenderGroup(
            self.host.guest.blocks,
            self.host.senders,
            self.session,
            agreement,
            lambda index, reason: self.handle(machine.ChannelLost(index, reason)),
            may_postcopy=self._may_be_postcopy,
        )
        self.settings_changed()
        self._spawn(lambda: self._route.listen(senders))
        self._spawn(self._sample)
        return senders

    # -- rounds ----------------------------------------------------------------------------------

    def next_round(self) -> int:
        self.round_number += 1
        return self.round_number

    async def _send_round(self) -> None:
        senders = self.senders
        if self.machine.phase is Phase.FINISHING:
            self.begin_pass()
        began_ns, ram_before = time.monotonic_ns(), senders.sent_ram_bytes
        wire_before = senders.total(Count.WIRE_BYTES)
        _, sent_ns = await senders.send_round(self.next_round())
        await self._route.round_sent()
        now_ns = time.monotonic_ns()
        if self.machine.phase is Phase.FINISHING:
            self.numbers.phases.send = sent_ns - began_ns
            self.numbers.phases.acknowledge = now_ns - sent_ns
        harvest_ns = max(lane.progress[Count.HARVEST_NS] for lane in senders.lanes)
        ram_bytes = senders.sent_ram_bytes - ram_before
        wire_bytes = senders.total(Count.WIRE_BYTES) - wire_before
        self._convergence.learn(policy.Round(harvest_ns, now_ns - began_ns, ram_bytes, wire_bytes))
        self.handle(machine.RoundAcknowledged())

    async def _harvest(self) -> None:
        if (dirty_bytes := self._ahead.take()) is None:
            self._convergence.left(dirty_bytes := await self.sync.collect())
        self.begin_pass()
        fits = self._convergence.may_pause(dirty_bytes)
        if not fits and (action := self._convergence.stalls(dirty_bytes)) is not None:
            fits = self._act_on_stall(action)
        if self.machine.phase is Phase.HARVESTING:
            self.handle(machine.Harvested(dirty_bytes, fits))

    def _act_on_stall(self, action: OnStall) -> bool:
        """Do what `x-on-stall` wants; True to stop the guest now."""
        match action:
            case OnStall.THROTTLE:
                self.sync.throttles_always = True
            case OnStall.CANCEL:
                self.machine.error = "the rounds did not shrink any more, and x-on-stall is cancel"
                self.handle(machine.Cancel())
            case OnStall.POSTCOPY if self._may_be_postcopy:
                self.handle(machine.StartPostcopy())
            case OnStall.POSTCOPY:  # set in mid-migration
                log.warning("%s, or channels: nothing is done", STALL_NEEDS_POSTCOPY)
        self._convergence.is_forced = action is OnStall.SWITCHOVER
        return self._convergence.is_forced

    @property
    def _may_be_postcopy(self) -> bool:
        return self.host.capability("postcopy-ram") and isinstance(self._route, Conversation)

    def begin_pass(self) -> None:
        self.numbers.rounds += 1
        self.host.emit("MIGRATION_PASS", {"pass": self.numbers.rounds})

    # -- switchover ------------------------------------------------------------------------------

    async def _pause_and_harvest(self) -> None:
        guest = self.host.guest
        await self._route.check(guest)
        self.senders.budget.rate_bytes_per_s = 0
        self._is_held = True
        self._pause_began_ns = time.monotonic_ns()
        self._stood_ns = await guest.pause(for_migration=True)
        is_running = not guest.is_stopped_by_user
        self.host.set_run_state(RunState.FINISH_MIGRATE)
        dirty_bytes = await self.sync.collect(throttles=False)
        now_ns = time.monotonic_ns()
        phases = self.numbers.phases = DowntimePhases()
        phases.pause = self._stood_ns - self._pause_began_ns
        phases.harvest = now_ns - self._stood_ns
        stood_ns = now_ns - self._pause_began_ns
        fits = self._convergence.may_finish(stood_ns, dirty_bytes, is_running=is_running)
        self.handle(machine.PausedAndHarvested(dirty_bytes, fits))

    async def resume_guest(self) -> None:
        """The pause would have been too long."""
        self.senders.budget.rate_bytes_per_s = self.host.parameters.max_bandwidth
        await self.host.guest.resume(for_migration=True)
        self._is_held = False
        self.numbers.pause_undone(time.monotonic_ns() - self._pause_began_ns)
        self._show_run_state()
        self.begin_pass()

    async def _resume_and_send_round(self) -> None:
        """Let the guest run, and send what was found."""
        await self.resume_guest()
        await self._send_round()

    async def _harvest_and_send_round(self) -> None:
        """After `pre-switchover`: who else writes this RAM may have done so meanwhile."""
        began_ns = time.monotonic_ns()
        self.waited_until(began_ns)
        await self._route.check(self.host.guest)
        await self.sync.collect(throttles=False)
        self.numbers.phases.harvest += time.monotonic_ns() - began_ns
        await self._send_round()

    def waited_until(self, now_ns: int) -> None:
        phases = self.numbers.phases
        phases.wait = now_ns - self._pause_began_ns - phases.total

    async def _arm_destination(self) -> None:
        began_ns = time.monotonic_ns()
        self.senders.check_all_delivered()
        await self.arm()
        self.numbers.phases.acknowledge += time.monotonic_ns() - began_ns

    async def arm(self) -> None:
        """Send the device state, and have the destination promise all that it must."""
        state = await self.host.guest.save_state()
        runs = not self.host.guest.is_stopped_by_user  # also since the pause began
        await self._route.arm(self.senders, state, self.round_number, runs)
        self.refresh()
        self.handle(machine.DestinationArmed())

    async def _hand_over(self) -> None:
        """Pass the token; from here on nothing interrupts until its outcome is known."""
        try:
            self.host.promise(Side.SOURCE, self.session if self.machine.is_postcopy else b"")
            outcome, reason = await self._route.hand_over(
                self.host.guest, keeps_ram=self.machine.is_postcopy
            )
            if reason:
                self.handle(machine.Failure(reason))
        except NotHandedOver as exc:
            self.handle(machine.Failure(str(exc)))
            outcome = Handover.REFUSED
        except (MigrationError, OSError) as exc:
            log.error("handing over: %s", exc)
            outcome = Handover.UNKNOWN
        now_ns = time.monotonic_ns()
        phases = self.numbers.phases
        phases.resume = now_ns - self._pause_began_ns - phases.total
        self.numbers.downtime_ns = phases.total
        if outcome is Handover.REFUSED:  # TAKEN is settled by `completed`, with no gap between
            self.host.settle(Side.SOURCE)
        if outcome is Handover.TAKEN and self.machine.is_postcopy:
            self.host.postcopy_begins(Side.SOURCE, self.session)
        elif outcome is Handover.TAKEN:
            self.host.set_run_state(RunState.POSTMIGRATE)
        elif outcome is Handover.UNKNOWN and self.host.guest.is_alive:
            self.host.set_run_state(RunState.PAUSED)
        self.is_outcome_unknown = self.machine.is_postcopy and outcome is Handover.UNKNOWN
        self.handle(machine.HandedOver(outcome))

    # -- the end ---------------------------------------------------------------------------------

    async def _abandon(self) -> None:
        """The guest first: it waits for nobody. What goes wrong here ends nothing else."""
        was_held = self._is_held
        if was_held:
            await self._release()
        if was_held and self.machine.phase is Phase.CANCELLING:
            self._show_run_state()  # as in QEMU: RESUME before `cancelled`, but after `failed`
        await self._give_back(wire.Abort(wire.cut(self.machine.error or "cancelled")))
        self.handle(machine.Abandoned())
        if was_held:
            self._show_run_state()

    async def _abandon_stopped(self) -> None:
        """Nobody knows who has the token: `cont` is the operator's word that it is this side."""
        if self.host.guest.is_alive:
            self.host.set_run_state(RunState.PAUSED)
        await self._give_back(None)
        self.handle(machine.Abandoned())

    async def _finish(self) -> None:
        """The guest is at the destination: what is left costs nobody's time."""
        if self._postcopy is not None:
            await self._postcopy.end()  # first, for the destination hangs up when we do
            with contextlib.suppress(MigrationError):  # a dead guest keeps nothing
                await self._postcopy.taken_for_sure()
                await self.host.guest.release_ram()
        await self._give_back(None)
        self.ended.set()

    async def _leave(self) -> None:
        """The guest is at the destination, and this process ends."""
        await self._give_back(None)
        self.handle(machine.Abandoned())

    async def stop_serving(self) -> None:
        self.refresh()
        self.numbers.carry()
        await self._stop(wire.Abort(wire.cut(self.machine.error or "paused")), ())

    async def _give_back(self, last_word: wire.Abort | None) -> None:
        """Stop all that this migration started, in the reverse order; the guest is not touched."""
        guest, sync, postcopy = self.host.guest, self._sync, self._postcopy
        steps = [guest.close_handover, guest.stop_tracking]
        steps += [] if sync is None else [sync.give_back]
        steps += [] if postcopy is None else [postcopy.end]
        await self._stop(last_word, steps)

    async def _stop(
        self, last_word: wire.Abort | None, steps: Sequence[Callable[[], Awaitable[None]]]
    ) -> None:
        """End what runs beside, the senders and the connections; `steps` go before the last."""
        await self._stop_tasks()
        route, senders, self._senders = self._route, self._senders, None
        for step in (
            lambda: route.break_off(last_word),
            *([] if senders is None else [senders.end]),
            *steps,
            route.close,
        ):
            try:
                await step()
            except (MigrationError, OSError) as exc:
                log.warning("giving back what the migration used: %s", exc)

    async def _release(self) -> None:
        """Let the guest run as its user wants it; a guest that does not answer may do so later."""
        try:
            await self.host.guest.resume(for_migration=True)
        except MigrationError as exc:
            log.error("the guest cannot be resumed: %s", exc)
        self._is_held = False

    def _show_run_state(self) -> None:
        """What the guest said last: it runs, or its user has stopped it, or it is dead."""
        guest = self.host.guest
        if guest.is_alive:
            self.host.set_run_state(RunState.RUNNING if guest.is_running else RunState.PAUSED)

    # -- what runs beside the work ---------------------------------------------------------------

    async def _watch_guest(self) -> None:
        """In postcopy only its RAM is needed, which is ours as well."""
        reason = await self.host.guest.died()
        if self.machine.phase in machine.GONE:
            log.warning("the guest's process died: %s; its RAM is kept for the destination", reason)
        else:
            raise MigrationError(f"the guest died: {reason}")

    async def _heal(self, index: int) -> None:
        await self.senders.heal(index, self._route.reopen)

    def _end_round(self) -> None:
        self.senders.end_round()

    async def _sample(self) -> None:
        while True:
            self.refresh()
            self.numbers.take_rates()
            await asyncio.sleep(SAMPLE_S)

    def refresh(self) -> None:
        """Bring the totals in `numbers` up to this moment; from the handover on they stay."""
        self.numbers.main_bytes = self.numbers.carried.main_bytes + self._route.sent_bytes
        is_over = self.machine.phase in (Phase.HANDING_OVER, Phase.ENDED)
        if self._senders is not None and not is_over:
            self._senders.count_up(self.numbers)
            if self._postcopy is not None:
                self._postcopy.count_up()

    def start_postcopy(self) -> None:
        """`migrate-start-postcopy`: as soon as it can be; no-op once the migration has ended.

        :raise MigrationError: it goes over a stream."""
        if self.machine.phase is not Phase.ENDED and self.conversation is not None:
            self.handle(machine.StartPostcopy())

    def recover(self, route: Route) -> None:
        """`migrate resume=true`: go on by another way.

        :raise UsageError: somebody else has, or it is not paused any more."""
        if self.machine.phase is not Phase.PAUSED:
            raise UsageError("Cannot resume if there is no paused migration")
        self._route = route
        self._spawn(self._watch_guest)
        self.handle(machine.Recover())

    async def taken_back(self) -> None:
        """The user has let the guest run here, and it does: there is no postcopy any more."""
        self.is_outcome_unknown = False
        if self.machine.phase in machine.GONE:
            self.handle(machine.Cancel("nobody knew whether it was taken: it runs here again"))
            await self.ended.wait()

    async def close(self) -> None:
        """Cancel it, or leave it where the guest is already; wait for the end."""
        while not self.ended.is_set():
            self.handle(machine.Cancel())
            self.stop_waiting()
            self.changed.clear()
            await first_of(self.ended.wait(), self.changed.wait())

    def settings_changed(self) -> None:
        """Parameters were set: `max-bandwidth` holds from now on, except during the switchover;
        another codec from the next batch on."""
        if self._senders is None:
            return
        if self._postcopy is not None and self.machine.phase is Phase.PUSHING:
            self._postcopy.bandwidth_changed()
        elif not self.is_switching_over:
            self._senders.budget.rate_bytes_per_s = self.host.parameters.max_bandwidth
        self._senders.compress(compression_now(self.host, self.numbers), self._codecs)

    def worker_pids(self) -> dict[int, int]:
        """Process ids of the senders at work, by channel."""
        lanes = [] if self._senders is None else self._senders.lanes
        return {lane.index: lane.worker.pid for lane in lanes if lane.worker is not None}

    @property
    def service_pid(self) -> int | None:
        """Process id of the page service, if it is at work."""
        return None if self._postcopy is None else self._postcopy.service_pid

    @property
    def is_switching_over(self) -> bool:
        """The guest is being stopped, its last pages and its right to run are on their way."""
        return self.machine.phase in machine.SWITCHING

    @property
    def is_untracked(self) -> bool:
        """The guest was stopped at the start and nothing would see its writes."""
        return not self.ended.is_set() and self.numbers.tracker == TrackerName.NONE.value

    @property
    def senders(self) -> SenderGroup:
        assert self._senders is not None, "the machine connects first"
        return self._senders

    @property
    def sync(self) -> DirtySync:
        assert self._sync is not None, "the machine connects first"
        return self._sync

    @property
    def conversation(self) -> Conversation:
        if not isinstance(self._route, Conversation):
            raise MigrationError("postcopy needs channels (tcp: or unix:), not one stream")
        return self._route

    @property
    def postcopy(self) -> PostcopySource | None:
        """Once it was asked for."""
        if self._postcopy is None and self.machine.wants_postcopy:
            self._postcopy = PostcopySource(self)
        return self._postcopy
