"""The destination: receivers, their bookkeeping, and the promise that lets the token come.

Statuses go none -> setup -> active -> completed | failed, as QEMU's do. Until the token is taken
nothing of the guest runs here; a failure before that gives its memory back and the source goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from engine import wire
from engine.compress.codecs import CODEC_IDS
from engine.control.fitting import check_fits
from engine.control.host import Host
from engine.control.mainchannel import ConnectionLost, DestinationEnd
from engine.control.notifiers import Change, Moment, Side
from engine.control.pool import REPORT_WAIT_S, Worker
from engine.control.status import RunState, Status, check_incoming
from engine.control.streams.destination import StreamDestination
from engine.control.streams.opening import Sources
from engine.control.uri import Address, Target, VsockAddress
from engine.errors import (
    GuestError,
    MemoryRefused,
    MigrationError,
    PeerRefused,
    WireError,
    WorkerLost,
)
from engine.memory.bitmaps import PageBitmaps
from engine.multifd.progress import Count, Progress

log = logging.getLogger("ramferry.destination")

#: A source that is silent for so long while it has something to say is gone; heartbeats notice
#: sooner.
TOKEN_WAIT_S: Final = 60.0
ASK_AGAIN_S: Final = 1.0  #: between two questions to a guest that does not answer
CLOSE_WAIT_S: Final = 5.0  #: then a guest that does not say whether it took over is killed
LAST_WORD_WAIT_S: Final = 1.0


Main = DestinationEnd | StreamDestination


@dataclass(slots=True)
class Lane:
    """One receiver and its channel; the worker is owned by the migration."""

    index: int
    progress: Progress
    worker: Worker[wire.ReceiverReport] | None = None
    endpoint: str = ""
    incarnation: int = 1
    round_number: int = 0  #: newest round that was placed whole
    reopening: asyncio.Task[None] | None = None


class IncomingMigration:
    """One migration to here; owns its listener, receivers and bitmaps until it has ended."""

    def __init__(self, host: Host, address: Target, sources: Sources | None = None) -> None:
        """:param sources: where a stream's descriptors come from."""
        self._host, self._address, self._sources = host, address, sources or Sources()
        self.status = Status.NONE
        self.error: str | None = None
        self.placement = "?"
        self.address: Address | VsockAddress | None = (
            None  #: where it really listens (port 0 resolved)
        )
        self._main: Main | None = None
        self._lanes: list[Lane] = []
        self._placed: PageBitmaps | None = None
        self._session = b""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._taken = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_serving = True
        self._has_state = False
        self._is_welcomed = False
        self._runs: bool | None = None  #: start the guest when it is ours; None: not promised yet
        self._early_losses = 0
        self._inner: set[asyncio.Task[None]] = set()
        self.ended = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, and serve the first right source in the background.

        :raise OSError: cannot listen there; the status is failed.
        :raise MigrationError: something else is at the unix path, or a stream cannot be had; the
            status is failed."""
        self._set_status(Status.SETUP)
        try:
            if isinstance(self._address, Address):
                self._main = DestinationEnd(self._address)
            else:
                self._main = StreamDestination(self._address, self._sources)
        except (OSError, MigrationError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else exc
            self.error = str(reason)
            if isinstance(self._address, Address):
                self.error = f"Failed to listen on '{self._address.display}': {reason}"
            self._set_status(Status.FAILED)
            self.ended.set()
            raise
        self.address = self._main.address
        self._task = asyncio.get_running_loop().create_task(self._run(self._main))

    async def close(self) -> None:
        """Give up if it still runs; give everything back. Idempotent."""
        if self._task is None:
            return
        if self._is_serving:
            self._task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), CLOSE_WAIT_S)
        if not self.ended.is_set():
            await self._host.guest.quit()  # it does not say whether it took over; now it says no
        await self.ended.wait()

    def _set_status(self, status: Status) -> None:
        check_incoming(self.status, status)
        before, self.status = self.status, status
        self._host.notifiers.tell(Change(Side.DESTINATION, before, status, Moment.BEFORE))
        self._host.emit("MIGRATION", {"status": status.value})
        self._host.notifiers.tell(Change(Side.DESTINATION, before, status, Moment.AFTER))

    async def _run(self, main: Main) -> None:
        failure: Exception | None = None
        try:
            await self._serve(main)
        except asyncio.CancelledError:
            log.info("the incoming migration is closed")  # only `close` cancels, and only here
        except (MigrationError, OSError, TimeoutError) as exc:
            failure = exc
        self._is_serving = False
        try:
            is_void = await self._void()
            if is_void:  # else `completed` settles it, with no gap between
                self._host.settle(Side.DESTINATION)
            if failure is not None and is_void:
                await self._fail(main, failure)
            elif not is_void:
                self._set_status(Status.COMPLETED)
                await self._last_word(main, wire.TookOver())
            await self._give_back(main, is_void)
        finally:
            self.ended.set()

    async def _void(self) -> bool:
        """True once the token cannot come any more, False when it came. Nothing less allows us to
        give RAM back or to say that we failed: the guest is asked until it answers or is dead."""
        guest = self._host.guest
        while guest.is_alive and not self._taken.is_set():
            try:
                if await guest.disarm():
                    return True
                await asyncio.wait_for(self._taken.wait(), TOKEN_WAIT_S)
            except (GuestError, TimeoutError) as exc:
                log.warning("the guest does not say whether it has taken over: %s", exc)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(guest.died(), ASK_AGAIN_S)
        return not self._taken.is_set()

    @staticmethod
    async def _last_word(main: Main, message: wire.Message) -> None:
        with contextlib.suppress(ConnectionLost, TimeoutError):
            await asyncio.wait_for(main.send(message), LAST_WORD_WAIT_S)

    async def _serve(self, main: Main) -> None:
        """One whole migration; returns when the token was taken."""
        await self._accept(main, await self._next_fitting(main))
        self._set_status(Status.ACTIVE)
        self._beside(self._watch_guest())
        conversation = asyncio.ensure_future(self._converse(main))
        taken = asyncio.ensure_future(self._taken.wait())
        waiting: set[asyncio.Future[Any]] = {conversation, taken, self._failure}
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:  # nothing arms the guest any more
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for one in done:
            one.result()

    async def _fail(self, main: Main, exc: Exception) -> None:
        self.error = f"load of migration failed: {self._text(exc)}"
        log.error("%s", self.error)
        await self._last_word(main, wire.Failed(wire.cut(self._text(exc))))
        self._set_status(Status.FAILED)

    @staticmethod
    def _text(exc: BaseException) -> str:
        if isinstance(exc, TimeoutError):
            return "no answer in time"
        return f"{exc}: {exc.__cause__}" if exc.__cause__ else str(exc)

    async def _give_back(self, main: Main, is_void: bool) -> None:
        inner = tuple(self._inner)
        for task in inner:
            task.cancel()
        await asyncio.gather(*inner, return_exceptions=True)
        workers = [lane.worker for lane in self._lanes if lane.worker is not None]
        await asyncio.gather(*(worker.end() for worker in workers))
        for lane in self._lanes:
            lane.worker = None
            lane.progress.close()
        if self._placed is not None:
            self._placed.close()
        await main.end(has_failed=is_void)
        if isinstance(self._address, Address):
            self._address.remove_files(len(self._lanes))
        with contextlib.suppress(GuestError):
            await self._host.guest.close_handover()
        if is_void:
            for block in self._host.guest.blocks:
                block.discard()

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except (MigrationError, OSError, TimeoutError) as exc:
                self._break_off(exc)

        task = asyncio.get_running_loop().create_task(guarded())
        self._inner.add(task)
        task.add_done_callback(self._inner.discard)
        return task

    def _break_off(self, exc: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(exc)

    def yank(self) -> None:
        """Fail as if the connections had broken, if there are any."""
        if self.status is Status.ACTIVE:
            self._break_off(MigrationError("'yank' has cut the migration's connections"))

    def worker_pids(self) -> dict[int, int]:
        """Process ids of the receivers at work, by channel."""
        return {lane.index: lane.worker.pid for lane in self._lanes if lane.worker is not None}

    async def _watch_guest(self) -> None:
        reason = await self._host.guest.died()
        raise GuestError(f"the guest died: {reason}")

    async def _next_fitting(self, main: Main) -> wire.Hello:
        """Wait for a source that fits here; others are told what differs, and may come again."""
        while True:
            hello = await main.accept()
            try:
                check_fits(self._host, hello, is_stream=isinstance(main, StreamDestination))
            except (PeerRefused, WireError) as exc:
                log.warning("refused a source: %s", exc)
                with contextlib.suppress(ConnectionLost):
                    await main.send(wire.Refused(wire.cut(str(exc))))
                if not main.serves_others:
                    raise
                continue
            return hello

    # -- agreeing --------------------------------------------------------------------------------

    async def _accept(self, main: Main, hello: wire.Hello) -> None:
        """Make room, start the receivers, tell the source where they listen.

        :raise MigrationError: no memory, port or worker for it."""
        guest = self._host.guest
        self._session = hello.session
        for block in guest.blocks:
            block.discard()
        self._placed = PageBitmaps.create("placed", guest.blocks)
        self._lanes = [Lane(i, Progress.create()) for i in range(hello.channels)]
        for lane in self._lanes:
            self._employ(lane)
        handover = ""
        if isinstance(self._address, Address):
            handover = await guest.listen_handover(
                self._address.handover_uri(self._host.parameters.x_multifd_port_base)
            )
        await self._until(lambda: all(lane.endpoint for lane in self._lanes))
        self._is_welcomed = True
        if isinstance(main, StreamDestination):
            return  # the source waits for nothing
        await main.send(
            wire.Welcome(
                wire.VERSION,
                self._session,
                [lane.endpoint for lane in self._lanes],
                handover,
                self.placement,
                tuple(CODEC_IDS.values()),
            )
        )

    # -- receivers -------------------------------------------------------------------------------

    def _employ(self, lane: Lane) -> None:
        assert self._placed is not None
        worker = self._host.receivers.take(lane.index)
        lane.worker, lane.endpoint = worker, ""
        worker.listen(
            lambda report: self._take(lane, worker, report), lambda lost: self._lose(lane, lost)
        )
        blocks = self._host.guest.blocks
        bind = ""
        if isinstance(self._address, Address):
            base = self._host.parameters.x_multifd_port_base
            bind = self._address.channel_endpoint(lane.index, base)
        with contextlib.suppress(WorkerLost):  # `_lose` has been told
            if isinstance(self._main, StreamDestination):
                worker.order(wire.UseStream(), [self._main.fd])
            worker.order(
                wire.PrepareReceiver(
                    lane.index,
                    self._session,
                    bind,
                    lane.incarnation,
                    [wire.BlockShape.of(block) for block in blocks],
                ),
                [self._placed.fd, lane.progress.fd, *(block.fd for block in blocks)],
            )

    def _take(self, lane: Lane, worker: Worker[wire.ReceiverReport], report: wire.Message) -> None:
        match report:
            case wire.Ready(endpoint, placement):
                lane.endpoint, self.placement = endpoint, placement
            case wire.Opened(incarnation):
                lane.incarnation = max(lane.incarnation, incarnation)
            case wire.RoundReceived():
                lane.round_number = report.round_number
                self._tell(report)
            case wire.ChannelBroken(_, _, why) if isinstance(self._main, StreamDestination):
                self._break_off(WireError(why))
            case wire.ChannelBroken():
                self._tell(report)
            case wire.ChannelEnded() if isinstance(self._main, StreamDestination):
                self._main.channel_ended()
            case wire.WorkerFailed(reason):
                worker.on_lost = None
                self._break_off(MemoryRefused(reason))
        self._changed.set()

    def _lose(self, lane: Lane, lost: WorkerLost) -> None:
        """A dead receiver is replaced when the source makes its channel anew."""
        lane.endpoint = ""
        if isinstance(self._main, StreamDestination):
            self._break_off(lost)
            return
        if not self._is_welcomed:
            self._replace_early(lane, lost)
            return
        self._tell(wire.ChannelBroken(lane.index, lane.incarnation, wire.cut(str(lost))))
        self._changed.set()

    def _replace_early(self, lane: Lane, lost: WorkerLost) -> None:
        """The source knows nothing of the channels yet: start another receiver by ourselves."""
        self._early_losses += 1
        if self._early_losses > self._host.parameters.x_heal_limit:
            self._break_off(lost)
        else:
            self._beside(self._replace(lane))
        self._changed.set()

    async def _replace(self, lane: Lane) -> None:
        """The old worker's port is free only when its process is gone."""
        if lane.worker is not None:
            await lane.worker.end()
        self._employ(lane)

    def _tell(self, message: wire.Message) -> None:
        assert self._main is not None
        self._beside(self._main.send(message))

    async def _until(self, is_done: Callable[[], object]) -> None:
        async with asyncio.timeout(REPORT_WAIT_S):
            while not is_done():
                if self._failure.done():
                    self._failure.result()
                self._changed.clear()
                await self._changed.wait()

    # -- the conversation ------------------------------------------------------------------------

    async def _converse(self, main: Main) -> None:
        """Answer the source until it goes; a right end is the token, which comes another way."""
        while True:
            message = await main.receive()
            match message:
                case wire.Reopen(index, incarnation):
                    self._start_reopening(main, index, incarnation)
                case wire.DeviceState(state):
                    if len(state) > wire.STATE_BYTES_MAX:
                        raise WireError(f"device state of {len(state)} bytes")
                    await self._host.guest.load_state(state)
                    self._has_state = True
                case wire.Arm(rounds, runs):
                    await self._arm(main, rounds, runs)
                case wire.Take():
                    await self._take_stream()
                case wire.Abort(reason):
                    raise PeerRefused(f"the source gave up: {wire.cut(reason)}")
                case wire.Hello():
                    raise WireError("a second Hello")

    def _start_reopening(self, main: Main, index: int, incarnation: int) -> None:
        """Beside the conversation, so that a newer wish for the same lane ends the older one."""
        if not 0 <= index < len(self._lanes) or incarnation <= 0:
            raise WireError(f"channel {index}, incarnation {incarnation} cannot be made anew")
        lane = self._lanes[index]
        if lane.reopening is not None:
            lane.reopening.cancel()
        lane.reopening = self._beside(self._reopen(main, lane, incarnation))

    async def _reopen(self, main: Main, lane: Lane, incarnation: int) -> None:
        lane.incarnation = incarnation
        if lane.worker is None or not lane.worker.is_alive:
            await self._replace(lane)
        await self._until(lambda: lane.endpoint)  # one that a former wish began may not listen yet
        await main.send(wire.Reopened(lane.index, incarnation, lane.endpoint))

    async def _arm(self, main: Main, rounds: int, runs: bool) -> None:
        """Promise that the memory is whole: every channel has placed every round. A stream's source
        then says `Take` on it; others pass the token from guest to guest."""
        behind = [lane.index for lane in self._lanes if lane.round_number != rounds]
        if behind:
            raise WireError(f"channels {behind} have not placed round {rounds}")
        if not self._has_state:
            raise WireError("the device state has not come")
        self._runs = runs
        if isinstance(main, DestinationEnd):
            self._host.promise(Side.DESTINATION)
            runs = runs and self._host.runs_on_arrival
            await self._host.guest.arm(self._session, runs, self._take_over)
        await main.send(wire.Armed())

    async def _take_stream(self) -> None:
        """The whole stream has come, and the right to run with it."""
        if self._runs is None:
            raise WireError("the stream ended before all of it was promised")
        self._host.promise(Side.DESTINATION)
        runs = self._runs and self._host.runs_on_arrival
        await self._host.guest.take_over(self._session, runs, self._take_over)
        await self._taken.wait()

    async def _take_over(self, _at_ns: int) -> None:
        """The token is here: this guest is the one."""
        self._host.set_run_state(
            RunState.RUNNING if self._host.guest.is_running else RunState.PAUSED
        )
        self._taken.set()

    def wire_bytes(self) -> int:
        """What came in on multifd channels so far."""
        return sum(lane.progress[Count.WIRE_BYTES] for lane in self._lanes)
