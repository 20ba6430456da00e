"""The source's senders as one group: harvest on all, a round on all, and a lost one made anew.

What is on its way is known at every instant: a page's bit moves from `dirty` to `in_flight` when it
is taken, and from there to `delivered` when the destination has acknowledged the round. A lane that
was lost gets its `in_flight` bits back to `dirty` in the instant that its new incarnation is open,
and in the same instant the order to send the round again: nobody else orders it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Final

import msgspec

from engine import wire
from engine.control.agreement import Agreement
from engine.control.compression import codecs_of, compression_info, delta_statistics, lacking_codecs
from engine.control.lane import HarvestTotals, Lane, RoundTotals
from engine.control.pool import REPORT_WAIT_S, Pool, Worker
from engine.control.statistics import ChannelSample, MigrationNumbers
from engine.control.watch import WATCH_S, Watch
from engine.errors import MemoryRefused, MigrationError, WorkerLost
from engine.guest.base import TrackerName, Tracking
from engine.memory.bitmaps import PageBitmaps, shared_memory
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.tracking import hash_table_bytes
from engine.multifd.progress import Budget, Count, Progress

log = logging.getLogger("ramferry.source")

#: A round that does not get on for so long ends the migration (most deaths are noticed sooner).
STALL_NS: Final = 30_000_000_000


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
        agreement: Agreement,
        on_lost: Callable[[int, str], None],
        *,
        may_postcopy: bool = False,
    ) -> None:
        """
        :param agreement: a stream is lent to the only lane in place of an endpoint. Where it is not
            acknowledged, a round that was sent counts as placed, as nothing tells `received`.
        :param may_postcopy: a guest may wait for pages beside the lanes."""
        wire.check_blocks([wire.BlockShape.of(block) for block in blocks])
        self._blocks, self._pool, self._session = tuple(blocks), pool, session
        self._on_lost = on_lost
        self._stream_fd = agreement.stream_fd
        self._is_acknowledged, self._may_postcopy = agreement.is_acknowledged, may_postcopy
        self._waiters: set[asyncio.Future[None]] = set()
        self._hash_seed = int.from_bytes(os.urandom(8), "little")
        self._tracking: Tracking | None = None
        self._lost: MemoryRefused | None = None  #: what is written is not known any more
        self._detect_zero = True
        self._compress = wire.Compress("none")
        self._finding: asyncio.Future[int] | None = None  #: a thread that marks all data as dirty
        self._hashes_fd = -1
        self._demands_fd = -1  #: the page service's statistics, in postcopy
        self.lanes: list[Lane] = []
        with ExitStack() as stack:  # hundreds of descriptors: when one cannot be had, none is kept
            self.dirty = PageBitmaps.create("dirty", blocks)
            stack.callback(self.dirty.close)
            self.in_flight = PageBitmaps.create("in-flight", blocks)
            stack.callback(self.in_flight.close)
            self.delivered = PageBitmaps.create("delivered", blocks)
            stack.callback(self.delivered.close)
            self.budget = Budget.create()
            stack.callback(self.budget.close)
            for i, where in enumerate(agreement.endpoints):
                self.lanes.append(Lane(i, where, Progress.create()))
                stack.callback(self.lanes[i].progress.close)
            stack.pop_all()

    @property
    def count(self) -> int:
        return len(self.lanes)

    def total(self, count: Count) -> int:
        """A counter's sum over all lanes."""
        return sum(lane.progress[count] for lane in self.lanes)

    @property
    def sent_ram_bytes(self) -> int:
        """RAM that was sent, as it is or shorter; what was left out as unchanged costs no time."""
        deltas = self.total(Count.DELTA_HITS) - self.total(Count.DELTA_OVERFLOWS)
        deltas -= self.total(Count.DELTA_UNCHANGED)
        return (self.total(Count.PAGES) + deltas) * PAGE_SIZE

    @property
    def _moved(self) -> int:
        """Grows as long as a round gets on, also where nothing of it is worth a byte."""
        unsent = self.total(Count.ELIDED_PAGES) + self.total(Count.DELTA_UNCHANGED)
        return self.total(Count.WIRE_BYTES) + self.total(Count.PACED_NS) + unsent

    def count_up(self, numbers: MigrationNumbers) -> None:
        """Refresh the totals from the workers' counters, at any time."""
        numbers.channels = numbers.channels or [ChannelSample() for _ in self.lanes]
        for lane, sample in zip(self.lanes, numbers.channels, strict=True):
            sample.wire_bytes = lane.progress[Count.WIRE_BYTES]
            sample.incarnation, sample.is_open = lane.incarnation, lane.is_open
            sample.pages = lane.progress[Count.PAGES]
            sample.zero_pages = lane.progress[Count.ZERO_PAGES]
        carried = numbers.carried
        numbers.pages = carried.pages + self.total(Count.PAGES)
        numbers.zero_pages = carried.zero_pages + self.total(Count.ZERO_PAGES)
        numbers.wire_bytes = carried.wire_bytes + self.total(Count.WIRE_BYTES)
        numbers.payload_bytes = carried.payload_bytes + self.total(Count.PAYLOAD_BYTES)
        channels = [lane.progress for lane in self.lanes]
        numbers.compression = compression_info(channels)
        if not numbers.postcopy.began_ns:
            numbers.xbzrle.now = delta_statistics(channels)
        numbers.remaining_bytes = self.dirty.count() * PAGE_SIZE

    # -- start and end ---------------------------------------------------------------------------

    async def start(self, tracking: Tracking, *, detect_zero: bool) -> None:
        """Prepare every worker and wait until every channel is open; mark all data as dirty.

        :raise WorkerLost: a worker did not start, or did not open its channel in time.
        :raise OSError: no memory or descriptors."""
        self._tracking, self._detect_zero = tracking, detect_zero
        if tracking.name is TrackerName.HASH:
            self._hashes_fd = shared_memory("hashes", hash_table_bytes(self._blocks))
        for lane in self.lanes:
            self._employ(lane)
        loop = asyncio.get_running_loop()  # 10 ms a GiB: monitors are answered meanwhile
        self._finding = loop.run_in_executor(None, self.dirty.set_data)
        await self._all(lambda lane: lane.is_open, "opening its channel")
        await asyncio.shield(self._finding)

    def _employ(self, lane: Lane) -> None:
        """Take a worker for the lane; the one before is gone. A harvest that it left is for the
        new one; a worker that lives has its orders in its queue, and they are not repeated."""
        assert self._tracking is not None
        worker = self._pool.take(lane.index)
        lane.worker = worker
        worker.listen(
            lambda report: self._take(lane, worker, report),
            lambda lost: self._lose(lane, str(lost)),
        )
        fds = [self.dirty.fd, self.in_flight.fd, self.delivered.fd]
        hashes_fd = self._hashes_fd if self._hashes_fd >= 0 else self.dirty.fd
        fds += [hashes_fd, lane.progress.fd, self.budget.fd]
        fds += [block.fd for block in self._blocks]
        fds += self._tracking.fds
        shapes = [wire.BlockShape.of(block) for block in self._blocks]
        if self._stream_fd >= 0:
            self._order(lane, wire.UseStream(), [self._stream_fd])
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
                list(self._tracking.pieces),
                self._detect_zero,
                self._hash_seed,
                self._may_postcopy,
            ),
            fds,
        )
        self._order(lane, self._compress)
        if self._demands_fd >= 0:
            self._order(lane, wire.FollowDemands(), [self._demands_fd])
        if lane.unanswered:
            self._forget_harvests(lane)
        if lane.harvest_due:
            self._order_harvest(lane)

    def compress(self, wanted: wire.Compress, known: Sequence[int]) -> None:
        """From the next batch on, on all lanes; as before if the destination does not know how.

        :param known: codec ids that it can decode."""
        if lacking := lacking_codecs(codecs_of(wanted), known):
            log.warning("the destination cannot decode %s; the codec stays", lacking)
            wanted = msgspec.structs.replace(wanted, codec=self._compress.codec)
        if wanted != self._compress:
            self._compress = wanted
            for lane in self.lanes:
                self._order(lane, wanted)

    async def end(self) -> None:
        """Kill all senders and give everything back. Idempotent."""
        workers = [lane.worker for lane in self.lanes if lane.worker is not None]
        await asyncio.gather(*(worker.end() for worker in workers))
        if self._finding is not None:  # nor does a thread touch what is closed now
            await asyncio.gather(asyncio.shield(self._finding), return_exceptions=True)
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
                self._open(lane)
            case wire.Harvested(number):
                lane.unanswered -= 1
                if number == lane.harvest_due:
                    lane.harvest_due, lane.harvested = 0, report
            case wire.RoundSent(incarnation, number) if (
                incarnation == lane.incarnation and number == lane.round_due
            ):
                lane.sent = report
                if not self._is_acknowledged:
                    lane.received = wire.RoundReceived(lane.index, *msgspec.structs.astuple(report))
                self._settle(lane)
            case wire.ChannelEnded(incarnation) if incarnation == lane.incarnation:
                lane.has_ended = True
            case wire.ChannelBroken(_, incarnation, reason):
                self._break(lane, incarnation, reason)
            case wire.TrackerLost(process, is_gone) if self._tracking is not None:
                self._lost = self._tracking.lost(process, is_gone=is_gone)
            case wire.WorkerFailed(reason):
                worker.give_up(reason)
            case _:
                pass  # of an incarnation that was given up
        self._wake()

    def _open(self, lane: Lane) -> None:
        """A worker that has opened an incarnation sends nothing until it is told: so now, and in
        one step, what was lost becomes dirty and the round that is due is ordered."""
        self.in_flight.move_to(self.dirty, lane.index, self.count)
        lane.is_open = True
        if lane.round_due:
            self._order_round(lane)

    def received(self, report: wire.RoundReceived) -> None:
        """The destination says what it placed; only what matches the sender's count is believed."""
        lane = self.lanes[report.index]
        if report.incarnation == lane.incarnation and report.round_number == lane.round_due:
            lane.received = report
            self._settle(lane)
            self._wake()

    def broken(self, report: wire.ChannelBroken) -> None:
        """The destination gave up an incarnation of a channel."""
        self._break(self.lanes[report.index], report.incarnation, report.reason)
        self._wake()

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
            what = f"multifd channel {lane.index}" if self._stream_fd < 0 else "the stream"
            self._lose(lane, f"{what} is lost: {reason}")

    def _lose(self, lane: Lane, reason: str) -> None:
        """From now on nothing of this incarnation counts. It is not made anew where a new worker
        would find out no more."""
        lane.incarnation += 1
        lane.is_open = False
        if self._lost is None:
            self._on_lost(lane.index, reason)

    # -- orders ----------------------------------------------------------------------------------

    async def harvest(self, number: int, *, is_peek: bool = False) -> HarvestTotals:
        """Collect dirty bits on all lanes, also while a round is being sent: what is found behind a
        lane's cursor waits for the next round, what is found before it still goes with this one.
        One at a time.

        :param is_peek: the next one may find the same pages again.
        :raise WorkerLost: a lane neither answers nor gets on.
        :raise MemoryRefused: what was written is not known."""
        if self._tracking is not None and self._tracking.name is TrackerName.HASH:
            self.delivered.set_data()  # what has data now is looked at, whether sent before or not
        for lane in self.lanes:
            lane.harvest_due, lane.harvested = number, None
            lane.harvest_incarnation = lane.incarnation if lane.is_open else 0
            self._order_harvest(lane, is_peek=is_peek)
        await self._all(lambda lane: not lane.harvest_due, "collecting dirty pages")
        said = [lane.harvested for lane in self.lanes if lane.harvested is not None]
        return HarvestTotals(
            sum(self._dirty_pages(lane) for lane in self.lanes),
            sum(report.found_pages for report in said),
        )

    def _dirty_pages(self, lane: Lane) -> int:
        """What the lane said of its slice, if nothing else made pages dirty since: a lane that was
        lost gets back what it had in flight, when it is open again at the latest."""
        if lane.harvested is not None and lane.is_open:
            if lane.incarnation == lane.harvest_incarnation:
                return lane.harvested.dirty_pages
            return self.dirty.count(lane.index, self.count)
        lost = self.in_flight.count(lane.index, self.count)
        return self.dirty.count(lane.index, self.count) + lost

    async def send_round(self, number: int) -> tuple[RoundTotals, int]:
        """Send what is dirty on all lanes; return the totals that both sides agree on, and the
        monotonic time (ns) when the last lane had sent its part."""
        for lane in self.lanes:
            lane.round_due = number
            if lane.is_open:  # else it is ordered when the lane is open again
                self._order_round(lane)
            else:
                lane.sent = lane.received = None
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

    def end_round(self) -> None:
        """Have the round end soon; what was not taken stays dirty."""
        for lane in self.lanes:
            self._order(lane, wire.EndRound())

    def follow(self, demands_fd: int) -> None:
        """From now on all lanes send first what is near the newest demand, and nothing that the
        destination would need an older page for.

        :param demands_fd: the page service's statistics, lent."""
        self._demands_fd = demands_fd
        for lane in self.lanes:
            self._order(lane, wire.FollowDemands(), [demands_fd])

    async def end_channels(self) -> None:
        """Of a stream, after the last round: take it back from its sender.

        :raise WorkerLost: it does not give it back."""
        for lane in self.lanes:
            self._order(lane, wire.EndChannel())
        await self._all(lambda lane: lane.has_ended, "giving the stream back")

    def check_all_delivered(self) -> None:
        """After the last round: the destination has acknowledged every page, and none is dirty.

        :raise MigrationError: it is not so; the destination must not run."""
        dirty, in_flight = self.dirty.count(), self.in_flight.count()
        behind = [lane.index for lane in self.lanes if lane.round_due or lane.unanswered]
        if dirty or in_flight or behind:
            raise MigrationError(
                f"after the last round {dirty} pages are dirty and {in_flight} in flight, and "
                f"lanes {behind} have not answered; the guest stays here"
            )

    def _order_harvest(self, lane: Lane, *, is_peek: bool = False) -> None:
        if self._order(lane, wire.Harvest(lane.harvest_due, is_peek)):
            lane.unanswered += 1

    def _order_round(self, lane: Lane) -> None:
        lane.sent = lane.received = None
        self._order(lane, wire.SendRound(lane.round_due))

    def _order(self, lane: Lane, message: wire.Message, fds: Sequence[int] = ()) -> bool:
        """Give an order. A worker that takes none is lost; its `on_lost` has said so."""
        if lane.worker is None:
            return False
        try:
            lane.worker.order(message, fds)
        except WorkerLost:
            return False
        return True

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _news(self) -> None:
        """Wait for news of any lane, not for long; any number may wait."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=WATCH_S)
        finally:
            self._waiters.discard(waiter)

    async def _all(self, is_done: Callable[[Lane], bool], doing: str | None) -> None:
        """Wait until every lane is done: with `doing`, for REPORT_WAIT_S after the last sign of
        life (of a harvest, or a lane that is made anew); else as long as bytes move."""
        watch = Watch()
        while not all(is_done(lane) for lane in self.lanes):
            await self._news()
            if self._lost is not None:
                raise self._lost
            if not watch.is_due():
                continue
            made_anew = sum(lane.incarnation for lane in self.lanes)
            harvested = self.total(Count.HARVEST_PAGES)
            if doing is None:
                moved = self._moved + made_anew
                # A long harvest holds the bytes up; short ones say nothing about them.
                busy = harvested if any(lane.harvest_due for lane in self.lanes) else None
                if watch.silent_ns(moved, busy) > STALL_NS:
                    raise MigrationError("no byte moved for 30 seconds")
            elif watch.silent_ns(harvested + made_anew, None) > int(REPORT_WAIT_S * 1e9):
                late = next(lane for lane in self.lanes if not is_done(lane))
                raise WorkerLost("sender", late.index, f"no answer while {doing}")

    # -- healing ---------------------------------------------------------------------------------

    async def heal(self, index: int, reopen: Callable[[int, int], Awaitable[str]]) -> None:
        """Make a lost lane anew: what it had not delivered is dirty again, and is sent again.

        :param reopen: asks the destination for a fresh endpoint of (index, incarnation).
        :raise MigrationError: the destination or a new worker cannot serve."""
        lane = self.lanes[index]
        incarnation = lane.incarnation
        endpoint = await reopen(index, incarnation)
        if lane.worker is not None and not lane.worker.is_alive:
            await lane.worker.end()  # from now on it touches nothing
        if lane.incarnation != incarnation:
            return  # lost again; the next heal goes on from here
        lane.endpoint = endpoint
        if lane.worker is None or not lane.worker.is_alive:
            self._employ(lane)
        else:
            self._order(lane, wire.OpenChannel(lane.endpoint, incarnation))
        await self._until_open(lane, incarnation)

    async def _until_open(self, lane: Lane, incarnation: int) -> None:
        """`_open` does what is to do then; this only watches that it comes to pass."""
        began_ns, harvested = time.monotonic_ns(), -1
        while not lane.is_open and lane.incarnation == incarnation:
            if harvested != lane.progress[Count.HARVEST_PAGES]:  # it is at that, and will come
                harvested, began_ns = lane.progress[Count.HARVEST_PAGES], time.monotonic_ns()
            if time.monotonic_ns() - began_ns > int(REPORT_WAIT_S * 1e9):
                raise WorkerLost("sender", lane.index, "no answer while opening its channel anew")
            await self._news()

    def _forget_harvests(self, lane: Lane) -> None:
        """A sender that died while it harvested may have re-armed pages without telling: everything
        in its slice that ever had data is dirty again."""
        lane.unanswered = 0
        self.delivered.set_data()
        self.delivered.move_to(self.dirty, lane.index, self.count)
