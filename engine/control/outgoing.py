"""The source's driver: carries out what the machine decides, and feeds back how it ended.

`Outgoing` (machine.py) decides; everything with a socket, a process or a clock is here. Work is one
task at a time, healing runs beside it; both are cancelled before the migration is given up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from engine import wire
from engine.control import machine, policy
from engine.control.compression import compression_of, note_what_is_without_effect
from engine.control.dirtysync import DirtySync
from engine.control.host import Host
from engine.control.machine import Effect, Heal, Outgoing, Phase
from engine.control.notifiers import Change, Moment, Side
from engine.control.route import Route
from engine.control.senders import SenderGroup
from engine.control.stall import OnStall, StallDetector, describe
from engine.control.statistics import SAMPLE_S, DowntimePhases, MigrationNumbers
from engine.control.status import RunState, Status
from engine.errors import MigrationError, NotHandedOver, StateError
from engine.guest.base import Handover, TrackerName
from engine.multifd.progress import Count

log = logging.getLogger("ramferry.source")


class OutgoingMigration:
    """One migration away from here; owns its channels, senders and tracking until it has ended.

    After any failure before the destination took over, the guest runs here as before.
    """

    def __init__(self, host: Host, route: Route) -> None:
        self._host, self._route = host, route
        self.machine = Outgoing(
            heal_limit=host.parameters.x_heal_limit if route.can_heal else 0,
            pauses_before_switchover=host.capability("pause-before-switchover"),
        )
        self.numbers = MigrationNumbers()
        self._session = os.urandom(wire.SESSION_BYTES)
        self._senders: SenderGroup | None = None
        self._codecs: tuple[int, ...] = ()  #: that the destination can decode
        self._sync: DirtySync | None = None
        self._work: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._heals: dict[int, asyncio.Task[None]] = {}
        self._model = policy.PauseModel()
        self._stall = StallDetector()
        self._is_forced = False  #: a stall ends with the switchover, however long it takes
        self._is_held = False  #: the engine has stopped the guest, or tried to
        self.is_outcome_unknown = False  #: nobody has said who has the right to run
        self._pause_began_ns = self._stood_ns = self._refreshed_ns = 0
        self._round_number = 0
        self._events: deque[machine.Event] = deque()
        self._is_handling = False
        self.ended = asyncio.Event()

    # -- events ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """:raise MigrationError: it has failed at once, and `ended` comes."""
        self.handle(machine.Start())
        try:
            self._route.open()
        except (MigrationError, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            self.handle(machine.Failure(str(reason)))
            raise exc if isinstance(exc, MigrationError) else MigrationError(reason) from exc

    @property
    def may_continue(self) -> bool:
        """It completed without a word from the destination: `cont` is the operator's."""
        return self._route.is_one_way and self.status is Status.COMPLETED

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

    def _take(self, event: machine.Event) -> None:
        before = self.machine.status
        try:
            effects = self.machine.handle(event)
        except StateError as exc:
            log.error("%s; story: %s", exc, " | ".join(exc.story))
            effects = self.machine.handle(machine.Failure(str(exc)))
        self.numbers.heals, self._refreshed_ns = self.machine.heals, 0
        veto = self._tell(before, Moment.BEFORE)
        if self.machine.status is not before and self.machine.phase is not Phase.ENDED:
            self._announce()
        for effect in effects:
            self._carry_out(effect)
        if self.machine.phase is Phase.ENDED and not self.numbers.ended_ns:
            self._end()
        if self.machine.phase is Phase.ENDED and not effects:
            self.ended.set()
        self._tell(before, Moment.AFTER)
        if veto is not None:
            self.handle(machine.Failure(veto))

    def _tell(self, before: Status, moment: Moment) -> str | None:
        """Notify of a change, if there was one; a veto is returned."""
        if self.machine.status is before:
            return None
        change = Change(Side.SOURCE, before, self.machine.status, moment)
        return self._host.notifiers.tell(change)

    def _announce(self) -> None:
        self._host.emit("MIGRATION", {"status": self.machine.status.value})

    def _end(self) -> None:
        self.numbers.ended_ns = time.monotonic_ns()
        self._announce()

    def _carry_out(self, effect: Effect | Heal) -> None:
        if isinstance(effect, Heal):
            self._start_heal(effect.index)
            return
        work: dict[Effect, Callable[[], Coroutine[Any, Any, None]]] = {
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
        }
        leaving = effect in (Effect.ABANDON, Effect.ABANDON_STOPPED, Effect.FINISH)
        before = self._work if leaving else None
        self._work = self._task(self._guarded(lambda: self._after(before, work[effect])))

    async def _after(
        self, before: asyncio.Task[None] | None, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Work that gives up what other work uses begins when that has ended."""
        if before is not None:
            before.cancel()
            await asyncio.wait({before})
        await work()

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._look_for_bug)
        return task

    def _look_for_bug(self, task: asyncio.Task[None]) -> None:
        """A bug of ours ends the migration as a failure would, with its traceback in the log."""
        if task.cancelled() or (bug := task.exception()) is None:
            return
        log.error("internal error in a migration", exc_info=bug)
        was_leaving = self.machine.phase in (Phase.FAILING, Phase.CANCELLING)
        self.handle(machine.Failure(f"internal error: {bug!r}"))
        if task is self._work and was_leaving:
            self.handle(machine.Abandoned())
        if task is self._work and self.machine.phase is Phase.HANDING_OVER:
            self.handle(machine.HandedOver(Handover.UNKNOWN))

    async def _guarded(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Turn what the world did to a piece of work into an event."""
        try:
            await work()
        except TimeoutError:
            self.handle(machine.Failure("the destination did not answer in time"))
        except (MigrationError, OSError) as exc:
            cause = f": {exc.__cause__}" if isinstance(exc.__cause__, OSError) else ""
            self.handle(machine.Failure(f"{exc}{cause}"))

    # -- setup -----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        guest, settings = self._host.guest, self._host.parameters
        self._spawn(self._watch_guest())
        agreement = await self._route.connect(self._host, self._session)
        self.numbers.placement, self._codecs = agreement.placement, agreement.codecs
        wanted = settings.x_tracker
        tracking = await guest.start_tracking(None if wanted == "auto" else TrackerName(wanted))
        self.numbers.tracker, self.numbers.tracker_reason = tracking.name.value, tracking.reason
        self._senders = senders = SenderGroup(
            guest.blocks,
            self._host.senders,
            self._session,
            agreement.endpoints,
            lambda index, reason: self.handle(machine.ChannelLost(index, reason)),
            stream_fd=agreement.stream_fd,
            is_acknowledged=agreement.is_acknowledged,
        )
        self.settings_changed()
        self._spawn(self._route.listen(senders))
        self._spawn(self._sample())
        await senders.start(tracking, detect_zero=settings.zero_page_detection != "none")
        self._sync = DirtySync(self._host, senders, self.numbers, tracking.name)
        self._spawn(self._sync.now_and_then(lambda: self.machine.phase is Phase.SENDING))
        self.numbers.expected_downtime_ns = settings.downtime_limit * 1_000_000
        self.numbers.total_bytes = sum(block.size for block in guest.blocks)
        self._pass()
        self.numbers.setup_done_ns = time.monotonic_ns()
        self.handle(machine.Connected())

    # -- rounds ----------------------------------------------------------------------------------

    async def _send_round(self) -> None:
        senders = self._need_senders()
        self._round_number += 1
        if self.machine.phase is Phase.FINISHING:
            self._pass()
        began_ns, ram_before = time.monotonic_ns(), senders.sent_ram_bytes
        wire_before = senders.total(Count.WIRE_BYTES)
        _, sent_ns = await senders.send_round(self._round_number)
        await self._route.round_sent()
        now_ns = time.monotonic_ns()
        if self.machine.phase is Phase.FINISHING:
            self.numbers.phases.send = sent_ns - began_ns
            self.numbers.phases.acknowledge = now_ns - sent_ns
        harvest_ns = max(lane.progress[Count.HARVEST_NS] for lane in senders.lanes)
        ram_bytes = senders.sent_ram_bytes - ram_before
        wire_bytes = senders.total(Count.WIRE_BYTES) - wire_before
        self._model.learn(policy.Round(harvest_ns, now_ns - began_ns, ram_bytes, wire_bytes))
        self.handle(machine.RoundAcknowledged())

    async def _harvest(self) -> None:
        dirty_bytes = await self._need_sync().collect()
        self._pass()
        settings = self._host.parameters
        predicted_ns = self._model.pause_ns(dirty_bytes, settings.avail_switchover_bandwidth)
        self.numbers.expected_downtime_ns = predicted_ns
        fits = policy.may_pause(
            predicted_ns,
            settings.downtime_limit * 1_000_000,
            is_running=self._host.guest.is_running,
            dirty_bytes=dirty_bytes,
        )
        if not fits and self._stall.after_round(dirty_bytes, time.monotonic_ns()):
            fits = self._act_on_stall(dirty_bytes)
        if self.machine.phase is Phase.HARVESTING:
            self.handle(machine.Harvested(dirty_bytes, fits))

    def _act_on_stall(self, dirty_bytes: int) -> bool:
        """Say so, and do what `x-on-stall` wants; True to stop the guest now."""
        action = OnStall(self._host.parameters.x_on_stall)
        log.warning("the rounds do not shrink any more; x-on-stall: %s", action.value)
        expected_ns, rounds = self.numbers.expected_downtime_ns, self.numbers.rounds
        self._host.emit("X_MIGRATION_STALLED", describe(action, dirty_bytes, expected_ns, rounds))
        if action is OnStall.THROTTLE:
            self._need_sync().throttles_always = True
        if action is OnStall.CANCEL:
            self.machine.error = "the rounds did not shrink any more, and x-on-stall is cancel"
            self.handle(machine.Cancel())
        self._is_forced = action is OnStall.SWITCHOVER
        return self._is_forced

    def _pass(self) -> None:
        self.numbers.rounds += 1
        self._host.emit("MIGRATION_PASS", {"pass": self.numbers.rounds})

    # -- switchover ------------------------------------------------------------------------------

    async def _pause_and_harvest(self) -> None:
        guest, settings = self._host.guest, self._host.parameters
        await self._route.check(guest)
        self._need_senders().budget.rate_bytes_per_s = 0
        self._is_held = True
        self._pause_began_ns = time.monotonic_ns()
        self._stood_ns = await guest.pause(for_migration=True)
        is_running = not guest.is_stopped_by_user
        self._host.set_run_state(RunState.FINISH_MIGRATE)
        dirty_bytes = await self._need_sync().collect(throttles=False)
        now_ns = time.monotonic_ns()
        phases = self.numbers.phases = DowntimePhases()
        phases.pause = self._stood_ns - self._pause_began_ns
        phases.harvest = now_ns - self._stood_ns
        left_ns = self._model.send_ns(dirty_bytes, settings.avail_switchover_bandwidth)
        fits = self._is_forced or policy.may_finish(
            now_ns - self._pause_began_ns,
            left_ns + policy.HANDOVER_NS_DEFAULT,
            settings.downtime_limit * 1_000_000,
            is_running=is_running,
        )
        self.handle(machine.PausedAndHarvested(dirty_bytes, fits))

    async def _resume_and_send_round(self) -> None:
        """The pause would have been too long: let the guest run and send what was found."""
        self._need_senders().budget.rate_bytes_per_s = self._host.parameters.max_bandwidth
        await self._host.guest.resume(for_migration=True)
        self._is_held = False
        self.numbers.pause_undone(time.monotonic_ns() - self._pause_began_ns)
        self._show_run_state()
        self._pass()
        await self._send_round()

    async def _harvest_and_send_round(self) -> None:
        """After `pre-switchover`: who else writes this RAM may have done so meanwhile."""
        began_ns, phases = time.monotonic_ns(), self.numbers.phases
        phases.wait = began_ns - self._pause_began_ns - phases.total
        await self._route.check(self._host.guest)
        await self._need_sync().collect(throttles=False)
        phases.harvest += time.monotonic_ns() - began_ns
        await self._send_round()

    async def _arm_destination(self) -> None:
        began_ns = time.monotonic_ns()
        senders = self._need_senders()
        senders.check_all_delivered()
        state = await self._host.guest.save_state()
        runs = not self._host.guest.is_stopped_by_user  # also since the pause began
        await self._route.arm(senders, state, self._round_number, runs)
        self.numbers.phases.acknowledge += time.monotonic_ns() - began_ns
        self.refresh()
        self.handle(machine.DestinationArmed())

    async def _hand_over(self) -> None:
        """Pass the token; from here on nothing interrupts until its outcome is known."""
        try:
            self._host.promise(Side.SOURCE)
            outcome, reason = await self._route.hand_over(self._host.guest)
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
            self._host.settle(Side.SOURCE)
        if outcome is Handover.TAKEN:
            self._host.set_run_state(RunState.POSTMIGRATE)
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
        self.is_outcome_unknown = True
        if self._host.guest.is_alive:
            self._host.set_run_state(RunState.PAUSED)
        await self._give_back(None)
        self.handle(machine.Abandoned())

    async def _finish(self) -> None:
        """The guest is at the destination: what is left costs nobody's time."""
        await self._give_back(None)
        self.ended.set()

    async def _give_back(self, last_word: wire.Abort | None) -> None:
        """Stop all that this migration started, in the reverse order; the guest is not touched."""
        for task in (*self._heals.values(), *self._background):
            task.cancel()
        await asyncio.gather(*self._heals.values(), *self._background, return_exceptions=True)
        guest, senders, self._senders = self._host.guest, self._senders, None
        route, sync = self._route, self._sync
        for step in (
            lambda: route.break_off(last_word),
            None if senders is None else senders.end,
            guest.close_handover,
            guest.stop_tracking,
            None if sync is None else sync.give_back,
            route.close,
        ):
            try:
                if step is not None:
                    await step()
            except (MigrationError, OSError) as exc:
                log.warning("giving back what the migration used: %s", exc)

    async def _release(self) -> None:
        """Let the guest run as its user wants it; a guest that does not answer may do so later."""
        try:
            await self._host.guest.resume(for_migration=True)
        except MigrationError as exc:
            log.error("the guest cannot be resumed: %s", exc)
        self._is_held = False

    def _show_run_state(self) -> None:
        """What the guest said last: it runs, or its user has stopped it, or it is dead."""
        guest = self._host.guest
        if guest.is_alive:
            running = guest.is_running
            self._host.set_run_state(RunState.RUNNING if running else RunState.PAUSED)

    # -- what runs beside the work ---------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            await self._guarded(lambda: work)

        self._background.add(self._task(guarded()))

    async def _watch_guest(self) -> None:
        reason = await self._host.guest.died()
        raise MigrationError(f"the guest died: {reason}")

    def _start_heal(self, index: int) -> None:
        """A newer loss of the same lane supersedes the healing of the older."""
        running = self._heals.pop(index, None)
        if running is not None:
            running.cancel()

        reopen = self._route.reopen

        async def heal() -> None:
            await self._guarded(lambda: self._need_senders().heal(index, reopen))

        self._heals[index] = self._task(heal())

    async def _sample(self) -> None:
        while True:
            self.refresh()
            self.numbers.take_rates()
            await asyncio.sleep(SAMPLE_S)

    def refresh(self, *, age_ns: int = 0) -> None:
        """Bring the totals in `numbers` up to this moment; from the handover on they stay.

        :param age_ns: totals that are not older will do."""
        now_ns = time.monotonic_ns()
        if now_ns - self._refreshed_ns < age_ns:
            return
        self._refreshed_ns = now_ns
        self.numbers.main_bytes = self._route.sent_bytes
        is_over = self.machine.phase in (Phase.HANDING_OVER, Phase.ENDED)
        if self._senders is not None and not is_over:
            self._senders.count_up(self.numbers)

    def settings_changed(self) -> None:
        """Parameters were set: `max-bandwidth` holds from now on, except during the switchover;
        another codec from the next batch on."""
        if self._senders is None:
            return
        if not self.is_switching_over:
            self._senders.budget.rate_bytes_per_s = self._host.parameters.max_bandwidth
        if self._host.capability("xbzrle"):
            self.numbers.xbzrle_cache_bytes = self._host.parameters.xbzrle_cache_size
        note_what_is_without_effect(self._host, self.numbers)
        self._senders.compress(compression_of(self._host), self._codecs)

    def worker_pids(self) -> dict[int, int]:
        """Process ids of the senders at work, by channel."""
        lanes = self._senders.lanes if self._senders is not None else []
        return {lane.index: lane.worker.pid for lane in lanes if lane.worker is not None}

    @property
    def status(self) -> Status:
        return self.machine.status

    @property
    def is_switching_over(self) -> bool:
        """The guest is being stopped, its last pages and its right to run are on their way."""
        return self.machine.phase in machine.SWITCHING

    @property
    def is_untracked(self) -> bool:
        """The guest was stopped at the start and nothing would see its writes."""
        is_over = self.ended.is_set()
        return not is_over and self.numbers.tracker == TrackerName.NONE.value

    def _need_senders(self) -> SenderGroup:
        assert self._senders is not None, "the machine connects first"
        return self._senders

    def _need_sync(self) -> DirtySync:
        assert self._sync is not None, "the machine connects first"
        return self._sync
