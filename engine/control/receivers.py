"""The destination's receivers as one group: started, replaced when they die, told how to place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from engine import wire
from engine.control.pool import REPORT_WAIT_S, Pool, Worker
from engine.errors import GuestError, MemoryRefused, MigrationError, WireError, WorkerLost
from engine.guest.base import Missing
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import RamBlock
from engine.multifd.progress import Count, Progress


@dataclass(slots=True)
class Lane:
    """One receiver and its channel; the worker is owned by the group."""

    index: int
    progress: Progress
    worker: Worker[wire.ReceiverReport] | None = None
    endpoint: str = ""
    inserts: bool = False  #: the worker has said so
    incarnation: int = 1
    round_number: int = 0  #: newest round that was placed whole
    reopening: asyncio.Task[None] | None = None

    @property
    def is_alive(self) -> bool:
        return self.worker is not None and self.worker.is_alive


@dataclass(frozen=True, slots=True)
class Channels:
    """What a group serves.

    :ivar count: channels, one receiver each.
    :ivar bind: where the receiver of a channel listens; not asked for a stream.
    :ivar stream_fd: lent to the only receiver; -1: there is no stream.
    :ivar may_postcopy: the guest may wait for pages beside the receivers."""

    session: bytes
    count: int
    bind: Callable[[int], str]
    stream_fd: int = -1
    may_postcopy: bool = False


class ReceiverGroup:
    """All receivers of one migration; owns workers, bitmap and counters until `end`.

    `tell(message)` is for the source; `fail(exception)` is called when the group cannot go on;
    `on_stream_end()` when a stream's last packet was read.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        pool: Pool[wire.ReceiverReport],
        channels: Channels,
        *,
        heal_limit: int,
        tell: Callable[[wire.Message], None],
        fail: Callable[[Exception], None],
        on_stream_end: Callable[[], None] = lambda: None,
    ) -> None:
        """:raise OSError: no memory or descriptors for what they share."""
        self._blocks, self._pool, self._channels = tuple(blocks), pool, channels
        self._heal_limit, self._early_losses = heal_limit, 0
        self._tell, self._fail, self._on_stream_end = tell, fail, on_stream_end
        self.placement = "?"
        self._is_announced = False  #: the source knows where they listen
        self._missing: Missing | None = None
        self._received: PageBitmaps | None = None
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lanes: list[Lane] = []
        with contextlib.ExitStack() as stack:
            self._placed = PageBitmaps.create("placed", blocks)
            stack.callback(self._placed.close)
            for index in range(channels.count):
                self.lanes.append(Lane(index, Progress.create()))
                stack.callback(self.lanes[index].progress.close)
            stack.pop_all()

    @property
    def _is_stream(self) -> bool:
        return self._channels.stream_fd >= 0

    @property
    def endpoints(self) -> list[str]:
        return [lane.endpoint for lane in self.lanes]

    def behind(self, rounds: int) -> list[int]:
        """Channels that have not placed this round, or have placed a later one."""
        return [lane.index for lane in self.lanes if lane.round_number != rounds]

    def wire_bytes(self) -> int:
        """What came in so far."""
        return sum(lane.progress[Count.WIRE_BYTES] for lane in self.lanes)

    def pids(self) -> dict[int, int]:
        """Process ids by channel."""
        return {lane.index: lane.worker.pid for lane in self.lanes if lane.worker is not None}

    # -- start and end ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Employ all, and wait until they listen; from then on the source is told of losses.

        :raise MigrationError: no worker can be had.
        :raise TimeoutError: one does not answer."""
        for lane in self.lanes:
            self._employ(lane)
        await self._until(lambda: all(lane.endpoint for lane in self.lanes))
        self._is_announced = True

    def insert(self, missing: Missing, received: PageBitmaps) -> None:
        """Postcopy: from now on pages are only inserted where none is, by these and by those that
        replace them. Before `start`, or between two rounds."""
        self._missing, self._received = missing, received
        for lane in self.lanes:
            if lane.worker is not None:
                self._order_insertion(lane.worker)

    async def inserting(self) -> None:
        """Wait until those who live insert. Each unmaps all of RAM for that, 10 to 15 ms of a
        processor for 4 GiB, which the guest would stand for.

        :raise TimeoutError: one does not answer."""
        await self._until(lambda: all(lane.inserts or not lane.is_alive for lane in self.lanes))

    async def end(self) -> None:
        """Kill all receivers and give everything back. Idempotent."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers = [lane.worker for lane in self.lanes if lane.worker is not None]
        await asyncio.gather(*(worker.end() for worker in workers))
        for lane in self.lanes:
            lane.worker = None
            lane.progress.close()
        self._placed.close()

    def _employ(self, lane: Lane) -> None:
        worker = self._pool.take(lane.index)
        lane.worker, lane.endpoint, lane.inserts = worker, "", False
        worker.listen(
            lambda report: self._take(lane, worker, report), lambda lost: self._lose(lane, lost)
        )
        fds = [self._placed.fd, lane.progress.fd, *(block.fd for block in self._blocks)]
        shapes = [wire.BlockShape.of(block) for block in self._blocks]
        bind = "" if self._is_stream else self._channels.bind(lane.index)
        with contextlib.suppress(WorkerLost):  # `_lose` has been told
            if self._is_stream:
                worker.order(wire.UseStream(), [self._channels.stream_fd])
            order = wire.PrepareReceiver(
                lane.index,
                self._channels.session,
                bind,
                lane.incarnation,
                shapes,
                self._channels.may_postcopy,
            )
            worker.order(order, fds)
            if self._missing is not None:
                self._order_insertion(worker)

    def _order_insertion(self, worker: Worker[wire.ReceiverReport]) -> None:
        assert self._missing is not None
        assert self._received is not None
        with contextlib.suppress(WorkerLost):
            order = wire.InsertPages(list(self._missing.addresses))
            worker.order(order, [self._received.fd, *self._missing.uffds])

    # -- what they say ---------------------------------------------------------------------------

    def _take(self, lane: Lane, worker: Worker[wire.ReceiverReport], report: wire.Message) -> None:
        match report:
            case wire.Ready(endpoint, placement):
                lane.endpoint, self.placement = endpoint, placement
            case wire.Inserting():
                lane.inserts = True
            case wire.Opened(incarnation):
                lane.incarnation = max(lane.incarnation, incarnation)
            case wire.RoundReceived():
                lane.round_number = report.round_number
                self._tell(report)
            case wire.ChannelBroken(_, _, why) if self._is_stream:
                self._fail(WireError(why))
            case wire.ChannelBroken():
                self._tell(report)
            case wire.ChannelEnded() if self._is_stream:
                self._on_stream_end()
            case wire.WorkerFailed(reason, is_guest_gone):
                worker.on_lost = None
                self._fail(GuestError(reason) if is_guest_gone else MemoryRefused(reason))
        self._changed.set()

    def _lose(self, lane: Lane, lost: WorkerLost) -> None:
        """A dead receiver is replaced when the source makes its channel anew; before the source
        knows of the channels we start another by ourselves."""
        lane.endpoint = ""
        if self._is_stream:
            self._fail(lost)
        elif self._is_announced:
            self._tell(wire.ChannelBroken(lane.index, lane.incarnation, wire.cut(str(lost))))
        else:
            self._early_losses += 1
            if self._early_losses > self._heal_limit:
                self._fail(lost)
            else:
                self._beside(self._replace(lane))
        self._changed.set()

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except (MigrationError, OSError, TimeoutError) as exc:
                self._fail(exc)

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _replace(self, lane: Lane) -> None:
        """The old worker's port is free only when its process is gone."""
        if lane.worker is not None:
            await lane.worker.end()
        self._employ(lane)

    async def _until(self, is_done: Callable[[], object]) -> None:
        async with asyncio.timeout(REPORT_WAIT_S):
            while not is_done():
                self._changed.clear()
                await self._changed.wait()

    # -- channels that are made anew -------------------------------------------------------------

    def reopen(self, index: int, incarnation: int) -> None:
        """The source wants the channel anew: `Reopened` says where; a newer wish ends an older.

        :raise WireError: there is no such channel."""
        if not 0 <= index < len(self.lanes) or incarnation <= 0:
            raise WireError(f"channel {index}, incarnation {incarnation} cannot be made anew")
        lane = self.lanes[index]
        if lane.reopening is not None:
            lane.reopening.cancel()
        lane.reopening = self._beside(self._reopen(lane, incarnation))

    async def _reopen(self, lane: Lane, incarnation: int) -> None:
        lane.incarnation = incarnation
        if not lane.is_alive:
            await self._replace(lane)
        await self._until(lambda: lane.endpoint)  # one that a former wish began may not listen yet
        self._tell(wire.Reopened(lane.index, incarnation, lane.endpoint))
