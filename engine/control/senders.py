"""The source's senders as one group: harvest on all, a round on all, and a lost one made anew.

What is on its way is known at every instant: a page's bit moves from `dirty` to `in_flight` when it
is taken, and from there to `delivered` when the destination has acknowledged the round. A sender or
channel that is lost gives its `in_flight` bits back to `dirty`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from engine import wire
from engine.control.pool import REPORT_WAIT_S, Pool, Worker
from engine.control.statistics import ChannelSample, MigrationNumbers
from engine.errors import MigrationError, WorkerLost
from engine.guest.base import TrackerName, Tracking
from engine.memory.bitmaps import PageBitmaps, shared_memory
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.tracking import hash_table_bytes
from engine.multifd.progress import Budget, Count, Progress

#: No byte and no acknowledgement for so long ends the migration (heartbeats notice most deaths
#: sooner).
STALL_NS: Final = 30_000_000_000
WATCH_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class RoundTotals:
    """A round as both ends counted it; the same on both sides."""

    packets: int
    pages: int
    zero_pages: int
    payload_bytes: int


@dataclass(slots=True)
class Lane:
    """One sender, its channel, and what is expected of it. `worker` is owned by the group."""

    index: int
    endpoint: str
    progress: Progress
    worker: Worker[wire.SenderReport] | None = None
    incarnation: int = 1
    is_open: bool = False
    harvest_due: int = 0  #: number of the harvest that it has not answered
    dirty_pages: int = 0  #: what it said after the last harvest
    round_due: int = 0  #: number of the round that is not acknowledged
    sent: wire.RoundSent | None = None
    received: wire.RoundReceived | None = None


class SenderGroup:
    """All senders of one migration; owns workers, bitmaps, counters and the budget.

    `on_lost(index, reason)` is called once for each incarnation that is lost; the migration decides
    whether to `heal`.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        pool: Pool[wire.SenderReport],
        session: bytes,
        endpoints: Sequence[str],
        on_lost: Callable[[int, str], None],
    ) -> None:
        self._blocks, self._pool, self._session = tuple(blocks), pool, session
        self._on_lost = on_lost
        self._changed = asyncio.Event()
        self._hash_seed = int.from_bytes(os.urandom(8), "little")
        self._tracking: Tracking | None = None
        self._detect_zero = True
        self._hashes_fd = -1
        self.dirty = PageBitmaps.create("dirty", blocks)
        self.in_flight = PageBitmaps.create("in-flight", blocks)
        self.delivered = PageBitmaps.create("delivered", blocks)
        self.budget = Budget.create()
        self.lanes = [Lane(i, where, Progress.create()) for i, where in enumerate(endpoints)]

    @property
    def count(self) -> int:
        return len(self.lanes)

    def total(self, count: Count) -> int:
        """A counter's sum over all lanes."""
        return sum(lane.progress[count] for lane in self.lanes)

    def count_up(self, numbers: MigrationNumbers) -> None:
        """Refresh the totals from the workers' counters, at any time."""
        numbers.channels = numbers.channels or [ChannelSample() for _ in self.lanes]
        for lane, sample in zip(self.lanes, numbers.channels, strict=True):
            sample.wire_bytes = lane.progress[Count.WIRE_BYTES]
            sample.incarnation = lane.incarnation
            sample.pages = lane.progress[Count.PAGES]
            sample.zero_pages = lane.progress[Count.ZERO_PAGES]
        numbers.pages, numbers.zero_pages = self.total(Count.PAGES), self.total(Count.ZERO_PAGES)
        numbers.wire_bytes = self.total(Count.WIRE_BYTES)
        numbers.payload_bytes = self.total(Count.PAYLOAD_BYTES)
        numbers.remaining_bytes = self.dirty.count() * PAGE_SIZE

    # -- start and end ---------------------------------------------------------------------------

    async def start(self, tracking: Tracking, *, detect_zero: bool) -> None:
        """Prepare every worker and wait until every channel is open; mark all data as dirty.

        :raise WorkerLost: a worker did not start, or did not open its channel in time."""
        self._tracking, self._detect_zero = tracking, detect_zero
        if tracking.name is TrackerName.HASH:
            self._hashes_fd = shared_memory("hashes", hash_table_bytes(self._blocks))
        for lane in self.lanes:
            self._employ(lane)
        self.dirty.set_data()
        await self._all(lambda lane: lane.is_open, "opening its channel")

    def _employ(self, lane: Lane) -> None:
        assert self._tracking is not None
        worker = self._pool.take(lane.index)
        lane.worker = worker
        worker.listen(
            lambda report: self._take(lane, worker, report),
            lambda lost: self._lose(lane, str(lost)),
        )
        blocks = self._tracking.blocks
        fds = [self.dirty.fd, self.in_flight.fd, self.delivered.fd]
        hashes_fd = self._hashes_fd if self._hashes_fd >= 0 else self.dirty.fd
        fds += [hashes_fd, lane.progress.fd, self.budget.fd]
        fds += [block.fd for block in self._blocks]
        fds += [block.pagemap_fd for block in blocks if block.pagemap_fd >= 0]
        fds += [block.bitmap_fd for block in blocks if block.bitmap_fd >= 0]
        shapes = [wire.BlockShape(b.name, b.size, b.backing_page_size) for b in self._blocks]
        self._order(
            lane,
            wire.PrepareSender(
                lane.index,
                self.count,
                self._session,
                lane.endpoint,
                lane.incarnation,
                shapes,
                self._tracking.name.value,
                [block.address for block in blocks],
                self._detect_zero,
                self._hash_seed,
            ),
            fds,
        )

    async def end(self) -> None:
        """Kill all senders and give everything back. Idempotent."""
        workers = [lane.worker for lane in self.lanes if lane.worker is not None]
        await asyncio.gather(*(worker.end() for worker in workers))
        for lane in self.lanes:
            lane.worker = None
            lane.progress.close()
        for bitmaps in (self.dirty, self.in_flight, self.delivered):
            bitmaps.close()
        self.budget.close()
        if self._hashes_fd >= 0:
            os.close(self._hashes_fd)
            self._hashes_fd = -1

    # -- what comes in ---------------------------------------------------------------------------

    def _take(self, lane: Lane, worker: Worker[wire.SenderReport], report: wire.Message) -> None:
        match report:
            case wire.Opened(incarnation) if incarnation == lane.incarnation:
                lane.is_open = True
            case wire.Harvested(number, dirty_pages) if number == lane.harvest_due:
                lane.harvest_due, lane.dirty_pages = 0, dirty_pages
            case wire.RoundSent(incarnation) if incarnation == lane.incarnation:
                lane.sent = report
                self._settle(lane)
            case wire.ChannelBroken(_, incarnation, reason):
                self._break(lane, incarnation, reason)
            case wire.WorkerFailed(reason):
                worker.give_up(reason)
            case _:
                pass  # of an incarnation that was given up
        self._changed.set()

    def received(self, report: wire.RoundReceived) -> None:
        """The destination says what it placed; only what matches the sender's count is believed."""
        lane = self.lanes[report.index]
        if report.incarnation == lane.incarnation and report.round_number == lane.round_due:
            lane.received = report
            self._settle(lane)
            self._changed.set()

    def broken(self, report: wire.ChannelBroken) -> None:
        """The destination gave up an incarnation of a channel."""
        self._break(self.lanes[report.index], report.incarnation, report.reason)
        self._changed.set()

    def _settle(self, lane: Lane) -> None:
        """Both counts are here: equal ones deliver the lane's part of the round."""
        if lane.sent is None or lane.received is None or not lane.round_due:
            return
        sent, got = lane.sent, lane.received
        if (sent.packets, sent.pages, sent.zero_pages, sent.payload_bytes) != (
            got.packets, got.pages, got.zero_pages, got.payload_bytes,
        ):  # fmt: skip
            self._break(lane, lane.incarnation, "the two ends counted a round differently")
            return
        lane.round_due = 0
        self.in_flight.move_to(self.delivered, lane.index, self.count)

    def _break(self, lane: Lane, incarnation: int, reason: str) -> None:
        if incarnation == lane.incarnation:
            self._lose(lane, f"multifd channel {lane.index} is lost: {reason}")

    def _lose(self, lane: Lane, reason: str) -> None:
        """From now on nothing of this incarnation counts."""
        lane.incarnation += 1
        lane.is_open = False
        self._on_lost(lane.index, reason)

    # -- orders ----------------------------------------------------------------------------------

    async def harvest(self, number: int) -> int:
        """Collect dirty bits on all lanes; return the dirty pages now."""
        if self._tracking is not None and self._tracking.name is TrackerName.HASH:
            self.delivered.set_data()  # what has data now is looked at, whether sent before or not
        for lane in self.lanes:
            lane.harvest_due = number
            self._order(lane, wire.Harvest(number))
        await self._all(lambda lane: not lane.harvest_due, "collecting dirty pages")
        return sum(lane.dirty_pages for lane in self.lanes)

    async def send_round(self, number: int) -> tuple[RoundTotals, int]:
        """Send what is dirty on all lanes; return the totals that both sides agree on, and the
        monotonic time (ns) when the last lane had sent its part."""
        for lane in self.lanes:
            lane.round_due, lane.sent, lane.received = number, None, None
            if lane.is_open:
                self._order(lane, wire.SendRound(number))
        await self._all(lambda lane: lane.sent is not None, None)
        sent_ns = time.monotonic_ns()
        await self._all(lambda lane: not lane.round_due, None)
        ends = [lane.received for lane in self.lanes if lane.received is not None]
        return RoundTotals(
            sum(end.packets for end in ends),
            sum(end.pages for end in ends),
            sum(end.zero_pages for end in ends),
            sum(end.payload_bytes for end in ends),
        ), sent_ns

    def _order(self, lane: Lane, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """A worker that takes no orders is lost; its `on_lost` has said so."""
        try:
            if lane.worker is not None:
                lane.worker.order(message, fds)
        except WorkerLost:
            return

    async def _all(self, is_done: Callable[[Lane], bool], doing: str | None) -> None:
        """Wait until every lane is done; with `doing`, for REPORT_WAIT_S at most, else as long as
        bytes move."""
        deadline = None if doing is None else time.monotonic_ns() + int(REPORT_WAIT_S * 1e9)
        moved, moved_ns = -1, time.monotonic_ns()
        while not all(is_done(lane) for lane in self.lanes):
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
            except TimeoutError:
                now_ns = time.monotonic_ns()
                moving = self.total(Count.WIRE_BYTES) + self.total(Count.PACED_NS)
                if moving != moved:
                    moved, moved_ns = moving, now_ns
                late = next(lane for lane in self.lanes if not is_done(lane))
                if deadline is not None and now_ns > deadline:
                    raise WorkerLost("sender", late.index, f"no answer while {doing}") from None
                if deadline is None and now_ns - moved_ns > STALL_NS:
                    raise MigrationError("no byte moved for 30 seconds") from None

    # -- healing ---------------------------------------------------------------------------------

    async def heal(self, index: int, reopen: Callable[[int, int], Awaitable[str]]) -> None:
        """Make a lost lane anew: what it had not delivered is dirty again, and is sent again.

        :param reopen: asks the destination for a fresh endpoint of (index, incarnation).
        :raise MigrationError: the destination or a new worker cannot serve."""
        lane = self.lanes[index]
        incarnation = lane.incarnation
        lane.endpoint = await reopen(index, incarnation)
        if lane.worker is None or not lane.worker.is_alive:
            if lane.worker is not None:
                await lane.worker.end()
            self._employ(lane)
            self._forget_harvest(lane)
        else:
            self._order(lane, wire.OpenChannel(lane.endpoint, incarnation))
        deadline_ns = time.monotonic_ns() + int(REPORT_WAIT_S * 1e9)
        while not lane.is_open:
            self._changed.clear()
            if lane.incarnation != incarnation:
                return  # lost again; the next heal goes on from here
            if time.monotonic_ns() > deadline_ns:
                raise WorkerLost("sender", index, "no answer while opening its channel anew")
            try:
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
            except TimeoutError:
                continue
        self.in_flight.move_to(self.dirty, index, self.count)
        if lane.harvest_due:
            self._order(lane, wire.Harvest(lane.harvest_due))
        if lane.round_due:
            lane.sent = lane.received = None
            self._order(lane, wire.SendRound(lane.round_due))

    def _forget_harvest(self, lane: Lane) -> None:
        """A sender that died while it harvested may have re-armed pages without telling: everything
        in its slice that ever had data is dirty again."""
        if lane.harvest_due:
            self.delivered.set_data()
            self.delivered.move_to(self.dirty, lane.index, self.count)
