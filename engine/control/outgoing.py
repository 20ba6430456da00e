"""The source's driver: carries out what the machine decides, and feeds back how it ended.

`Outgoing` (machine.py) decides; everything with a socket, a process or a clock is here. Work is one
task at a time, healing runs beside it; both are cancelled before the migration is given up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import zmq.asyncio

from engine import wire
from engine.control import machine, policy
from engine.control.host import Host
from engine.control.machine import Effect, Heal, Outgoing, Phase
from engine.control.mainchannel import ConnectionLost, SourceEnd
from engine.control.senders import SenderGroup
from engine.control.statistics import SAMPLE_S, DowntimePhases, MigrationNumbers
from engine.control.status import RunState, Status
from engine.control.uri import Address
from engine.errors import MigrationError, PeerRefused, StateError, WireError
from engine.guest.base import Handover, TrackerName
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.progress import Count

log = logging.getLogger("ramferry.source")

ANSWER_WAIT_S: Final = 20.0
HANDOVER_WAIT_NS: Final = 10_000_000_000

Indexed = TypeVar("Indexed", wire.RoundReceived, wire.ChannelBroken)


class OutgoingMigration:
    """One migration away from here; owns its channels, senders and tracking until it has ended.

    After any failure before the destination took over, the guest runs here as before.
    """

    def __init__(self, host: Host, context: zmq.asyncio.Context, address: Address) -> None:
        self._host, self._context, self._address = host, context, address
        self.machine = Outgoing(heal_limit=host.parameters.x_heal_limit)
        self.numbers = MigrationNumbers()
        self._session = os.urandom(wire.SESSION_BYTES)
        self._main: SourceEnd | None = None
        self._senders: SenderGroup | None = None
        self._work: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._heals: dict[int, asyncio.Task[None]] = {}
        self._answers: dict[object, asyncio.Future[Any]] = {}
        self._model = policy.PauseModel()
        self._throttle = policy.Throttle()
        self._ran_before = False  #: the guest ran when the engine stopped it
        self._paused_by_us = False
        self._pause_began_ns = self._stood_ns = 0
        self._round_number = 0
        self._harvest_number = 0
        self._dirty_pages = 0
        self._last_round = policy.Round(0, 1, 0)
        self.ended = asyncio.Event()

    # -- events ----------------------------------------------------------------------------------

    def handle(self, event: machine.Event) -> None:
        """Feed the machine and carry out what it says; a bug ends the migration, not the guest."""
        before = self.machine.status
        try:
            effects = self.machine.handle(event)
        except StateError as exc:
            log.error("%s; story: %s", exc, " | ".join(exc.story))
            effects = self.machine.handle(machine.Failure(str(exc)))
        self.numbers.heals = self.machine.heals
        if self.machine.status is not before and self.machine.phase is not Phase.ENDED:
            self._announce()
        for effect in effects:
            self._carry_out(effect)
        if self.machine.phase is Phase.ENDED and not self.numbers.ended_ns:
            self._end()
        if self.machine.phase is Phase.ENDED and not effects:
            self.ended.set()

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
            Effect.ARM_DESTINATION: self._arm_destination,
            Effect.HAND_OVER: self._hand_over,
            Effect.ABANDON: self._abandon,
            Effect.ABANDON_STOPPED: self._abandon_stopped,
            Effect.FINISH: self._finish,
        }
        leaving = effect in (Effect.ABANDON, Effect.ABANDON_STOPPED, Effect.FINISH)
        if leaving and self._work is not None:
            self._work.cancel()
        self._work = self._task(self._guarded(work[effect]))

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._look_for_bug)
        return task

    def _look_for_bug(self, task: asyncio.Task[None]) -> None:
        """A bug of ours ends the migration as a failure would, with its traceback in the log."""
        if task.cancelled() or (bug := task.exception()) is None:
            return
        log.error("internal error in a migration", exc_info=bug)
        self.handle(machine.Failure(f"internal error: {bug!r}"))
        if task is self._work and self.machine.phase in (Phase.FAILING, Phase.CANCELLING):
            self.handle(machine.Abandoned())

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
        self._main = main = SourceEnd(self._context, self._address.endpoint)
        welcome = await asyncio.wait_for(self._greet(main), ANSWER_WAIT_S)
        self.numbers.placement = welcome.placement
        self._spawn(self._listen(main))
        self._spawn(self._watch_guest())
        await guest.connect_handover(self._address.reach(welcome.handover), self._session)
        wanted = settings.x_tracker
        tracking = await guest.start_tracking(None if wanted == "auto" else TrackerName(wanted))
        self.numbers.tracker, self.numbers.tracker_reason = tracking.name.value, tracking.reason
        self._senders = senders = SenderGroup(
            guest.blocks,
            self._host.senders,
            self._session,
            [self._address.reach(endpoint) for endpoint in welcome.endpoints],
            lambda index, reason: self.handle(machine.ChannelLost(index, reason)),
        )
        senders.budget.rate_bytes_per_s = settings.max_bandwidth
        self._spawn(self._sample(senders))
        await senders.start(tracking, detect_zero=settings.zero_page_detection != "none")
        self._dirty_pages = senders.dirty.count()
        self.numbers.expected_downtime_ns = settings.downtime_limit * 1_000_000
        self.numbers.total_bytes = sum(block.size for block in guest.blocks)
        self._pass()
        self.numbers.setup_done_ns = time.monotonic_ns()
        self.handle(machine.Connected())

    async def _greet(self, main: SourceEnd) -> wire.Welcome:
        guest = self._host.guest
        shapes = [wire.BlockShape(b.name, b.size, b.backing_page_size) for b in guest.blocks]
        channels = self._host.parameters.multifd_channels
        await main.send(
            wire.Hello(
                wire.VERSION,
                self._session,
                PAGE_SIZE,
                shapes,
                channels,
                guest.kind,
                guest.is_running,
            )
        )
        try:
            answer = await main.receive()
        except ConnectionLost as exc:
            where = self._address.display
            raise PeerRefused(f"Failed to connect to '{where}': Connection refused") from exc
        if isinstance(answer, wire.Refused):
            raise PeerRefused(f"the destination refused: {wire.cut(answer.reason)}")
        if not isinstance(answer, wire.Welcome):
            raise WireError(f"the destination answered Hello with {type(answer).__name__}")
        if answer.version != wire.VERSION or answer.session != self._session:
            raise WireError(f"the destination speaks version {answer.version}, or another session")
        if len(answer.endpoints) != channels:
            raise WireError(f"{channels} channels wanted, {len(answer.endpoints)} offered")
        return answer

    # -- rounds ----------------------------------------------------------------------------------

    async def _send_round(self) -> None:
        senders = self._need_senders()
        self._round_number += 1
        if self.machine.phase is Phase.FINISHING:
            self._pass()
        began_ns, bytes_before = time.monotonic_ns(), senders.total(Count.WIRE_BYTES)
        _, sent_ns = await senders.send_round(self._round_number)
        now_ns = time.monotonic_ns()
        if self.machine.phase is Phase.FINISHING:
            self.numbers.phases.send = sent_ns - began_ns
            self.numbers.phases.acknowledge = now_ns - sent_ns
        harvest_ns = max(lane.progress[Count.HARVEST_NS] for lane in senders.lanes)
        sent_bytes = senders.total(Count.WIRE_BYTES) - bytes_before
        self._last_round = policy.Round(harvest_ns, now_ns - began_ns, sent_bytes)
        self._model.learn(self._last_round)
        self.handle(machine.RoundAcknowledged())

    async def _collect(self) -> int:
        """Harvest on all lanes; return the dirty bytes."""
        self._harvest_number += 1
        soft_dirty = self.numbers.tracker == TrackerName.SOFT_DIRTY.value
        if soft_dirty and self._host.guest.is_running:
            self._dirty_pages = await self._harvest_soft_dirty()
        else:
            self._dirty_pages = await self._need_senders().harvest(self._harvest_number)
        self.numbers.dirtied(self._dirty_pages)
        return self._dirty_pages * PAGE_SIZE

    async def _harvest_soft_dirty(self) -> int:
        """Soft-dirty bits are read and cleared in two steps, so the guest stands meanwhile."""
        guest = self._host.guest
        self._paused_by_us = True
        await guest.pause(for_migration=True)
        pages = await self._need_senders().harvest(self._harvest_number)
        await guest.clear_soft_dirty()
        await guest.resume()
        self._paused_by_us = False
        return pages

    async def _harvest(self) -> None:
        dirty_bytes = await self._collect()
        self._pass()
        await self._converge(dirty_bytes)
        settings = self._host.parameters
        predicted_ns = self._model.pause_ns(dirty_bytes, settings.avail_switchover_bandwidth)
        self.numbers.expected_downtime_ns = predicted_ns
        fits = policy.may_pause(
            predicted_ns,
            settings.downtime_limit * 1_000_000,
            is_running=self._host.guest.is_running,
            dirty_bytes=dirty_bytes,
        )
        self.handle(machine.Harvested(dirty_bytes, fits))

    async def _converge(self, dirty_bytes: int) -> None:
        settings = self._host.parameters
        percent = self._throttle.after_round(
            dirty_bytes,
            self._last_round.sent_bytes,
            policy.ThrottleSettings(
                self._host.capability("auto-converge"),
                settings.throttle_trigger_threshold,
                settings.cpu_throttle_initial,
                settings.cpu_throttle_increment,
                settings.max_cpu_throttle,
                settings.cpu_throttle_tailslow,
            ),
        )
        if percent != self.numbers.throttle_percent:
            self.numbers.throttle_percent = percent
            await self._host.guest.throttle(percent)

    def _pass(self) -> None:
        self.numbers.rounds += 1
        self._host.emit("MIGRATION_PASS", {"pass": self.numbers.rounds})

    # -- switchover ------------------------------------------------------------------------------

    async def _pause_and_harvest(self) -> None:
        guest, settings = self._host.guest, self._host.parameters
        senders = self._need_senders()
        senders.budget.rate_bytes_per_s = 0
        is_running = guest.is_running
        self._pause_began_ns = time.monotonic_ns()
        if is_running:
            self._ran_before = self._paused_by_us = True
            self._stood_ns = await guest.pause(for_migration=True)
            self._host.set_run_state(RunState.FINISH_MIGRATE)
        else:
            self._stood_ns = self._pause_began_ns
        dirty_bytes = await self._collect()
        now_ns = time.monotonic_ns()
        phases = self.numbers.phases = DowntimePhases()
        phases.pause = self._stood_ns - self._pause_began_ns
        phases.harvest = now_ns - self._stood_ns
        left_ns = self._model.send_ns(dirty_bytes, settings.avail_switchover_bandwidth)
        fits = policy.may_finish(
            now_ns - self._pause_began_ns,
            left_ns + policy.HANDOVER_NS_DEFAULT,
            settings.downtime_limit * 1_000_000,
            is_running=is_running,
        )
        self.handle(machine.PausedAndHarvested(dirty_bytes, fits))

    async def _resume_and_send_round(self) -> None:
        """The pause would have been too long: let the guest run and send what was found."""
        self._need_senders().budget.rate_bytes_per_s = self._host.parameters.max_bandwidth
        if await self._resume_guest():
            self._host.set_run_state(RunState.RUNNING)
        self._pass()
        await self._send_round()

    async def _arm_destination(self) -> None:
        guest, main = self._host.guest, self._need_main()
        began_ns = time.monotonic_ns()
        await main.send(wire.DeviceState(await guest.save_state()))
        armed = self._expect("armed")
        await main.send(wire.Arm(self._round_number, self._ran_before))
        await asyncio.wait_for(armed, ANSWER_WAIT_S)
        self.numbers.phases.acknowledge += time.monotonic_ns() - began_ns
        self.handle(machine.DestinationArmed())

    async def _hand_over(self) -> None:
        """Pass the token; from here on nothing interrupts until its outcome is known."""
        outcome = await self._host.guest.hand_over(HANDOVER_WAIT_NS)
        now_ns = time.monotonic_ns()
        phases = self.numbers.phases
        phases.resume = now_ns - self._pause_began_ns - phases.total
        self.numbers.downtime_ns = phases.total
        if outcome is Handover.TAKEN:
            self.refresh()
            self._host.set_run_state(RunState.POSTMIGRATE)
        self.handle(machine.HandedOver(outcome))

    # -- the end ---------------------------------------------------------------------------------

    async def _abandon(self) -> None:
        await self._give_back(wire.Abort(wire.cut(self.machine.error or "cancelled")))
        resumed = self._paused_by_us and await self._resume_guest()
        self.handle(machine.Abandoned())
        if resumed:
            self._host.set_run_state(RunState.RUNNING)

    async def _abandon_stopped(self) -> None:
        """Nobody knows who has the token: `cont` is the operator's word that it is this side."""
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
        if self._main is not None:
            if last_word is not None:
                await self._main.say_last(last_word)
            self._main.close()
        if self._senders is not None:
            senders, self._senders = self._senders, None
            await senders.end()
        guest = self._host.guest
        try:
            await guest.close_handover()
            await guest.stop_tracking()
            if self.numbers.throttle_percent:
                await guest.throttle(0)
        except MigrationError as exc:
            log.warning("giving back the guest's tracking: %s", exc)

    async def _resume_guest(self) -> bool:
        self._paused_by_us = self._ran_before = False
        try:
            await self._host.guest.resume()
        except MigrationError as exc:
            log.error("the guest cannot be resumed: %s", exc)
            return False
        return True

    # -- what runs beside the work ---------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            await self._guarded(lambda: work)

        self._background.add(self._task(guarded()))

    async def _listen(self, main: SourceEnd) -> None:
        """Take what the destination says, until the channel is closed."""
        while True:
            message = await main.receive()
            match message:
                case wire.RoundReceived():
                    self._need_senders().received(self._checked(message))
                case wire.ChannelBroken():
                    self._need_senders().broken(self._checked(message))
                case wire.Reopened(index, incarnation, endpoint):
                    self._answer(("reopened", index, incarnation), endpoint)
                case wire.Armed():
                    self._answer("armed", None)
                case wire.Failed(reason):
                    raise PeerRefused(f"the destination failed: {wire.cut(reason)}")
                case wire.Resumed() | wire.StillThere():
                    pass
                case _:
                    raise WireError(f"unexpected {type(message).__name__} from the destination")

    def _checked(self, message: Indexed) -> Indexed:
        if not 0 <= message.index < self._need_senders().count:
            raise WireError(f"the destination speaks of channel {message.index}")
        return message

    async def _watch_guest(self) -> None:
        reason = await self._host.guest.died()
        raise MigrationError(f"the guest died: {reason}")

    def _expect(self, key: object) -> asyncio.Future[Any]:
        self._answers[key] = asyncio.get_running_loop().create_future()
        return self._answers[key]

    def _answer(self, key: object, value: object) -> None:
        waiting = self._answers.pop(key, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(value)

    def _start_heal(self, index: int) -> None:
        """A newer loss of the same lane supersedes the healing of the older."""
        running = self._heals.pop(index, None)
        if running is not None:
            running.cancel()

        async def heal() -> None:
            await self._guarded(lambda: self._need_senders().heal(index, self._reopen))

        self._heals[index] = self._task(heal())

    async def _reopen(self, index: int, incarnation: int) -> str:
        reopened = self._expect(("reopened", index, incarnation))
        await self._need_main().send(wire.Reopen(index, incarnation))
        endpoint = await asyncio.wait_for(reopened, ANSWER_WAIT_S)
        assert isinstance(endpoint, str)
        return self._address.reach(endpoint)

    async def _sample(self, senders: SenderGroup) -> None:
        while True:
            senders.count_up(self.numbers)
            self.numbers.take_rates()
            await asyncio.sleep(SAMPLE_S)

    def refresh(self) -> None:
        """Bring the totals in `numbers` up to this moment."""
        if self._main is not None:
            self.numbers.main_bytes = self._main.sent_bytes
        if self._senders is not None:
            self._senders.count_up(self.numbers)

    def bandwidth_changed(self) -> None:
        """`max-bandwidth` was set: it holds from now on, except during the switchover."""
        switching = (Phase.PAUSING, Phase.FINISHING, Phase.ARMING, Phase.HANDING_OVER)
        if self._senders is not None and self.machine.phase not in switching:
            self._senders.budget.rate_bytes_per_s = self._host.parameters.max_bandwidth

    @property
    def status(self) -> Status:
        return self.machine.status

    @property
    def is_untracked(self) -> bool:
        """The guest was stopped at the start and nothing would see its writes."""
        is_over = self.ended.is_set()
        return not is_over and self.numbers.tracker == TrackerName.NONE.value

    def _need_senders(self) -> SenderGroup:
        assert self._senders is not None, "the machine connects first"
        return self._senders

    def _need_main(self) -> SourceEnd:
        assert self._main is not None, "the machine connects first"
        return self._main
