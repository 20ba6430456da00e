"""A sender: one process, one slice of RAM, one multifd channel (`python -m engine.multifd.sender
FD`).

It holds no policy. Orders say when to harvest and which round to send; between two batches it looks
for the next order, the state of its connection, and the bandwidth that is left.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Sequence
from typing import Final

import zmq

from engine import _native, wire
from engine.errors import ChannelError, MigrationError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE
from engine.memory.tracking import (
    ContentHash,
    GuestBitmap,
    Harvester,
    SoftDirty,
    StoppedGuest,
    TrackerName,
    WriteProtected,
    hash_tables,
)
from engine.multifd.channel import Channel, Superseded
from engine.multifd.progress import Budget, Count, Progress
from engine.worker import Inbox, blocks_of, run_worker

#: Runs of at least so many pages are lent to ZeroMQ, shorter ones are copied together.
DIRECT_RUN_PAGES_MIN: Final = 64
#: Under a limit a batch is at most what may go in so much time, so that the rate holds in any
#: second.
PACING_NS: Final = 5_000_000
PACED_PAGES_MIN: Final = 16
BURST_NS: Final = 20_000_000


class RoundTotals:
    """What ROUND_END will say."""

    def __init__(self, round_number: int) -> None:
        self.round_number = round_number
        self.packets = self.pages = self.zero_pages = self.payload_bytes = 0
        self.block_index = 0
        self.cursor = 0


class Sender:
    """The loop's state between orders; owns everything that `PrepareSender` lent it."""

    def __init__(self, inbox: Inbox[wire.SenderOrder]) -> None:
        self._inbox = inbox
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._channel: Channel | None = None
        self._round: RoundTotals | None = None
        self._data_runs = memoryview(bytearray(wire.RUNS_MAX * wire.RUN.size))
        self._zero_runs = memoryview(bytearray(wire.RUNS_MAX * wire.RUN.size))
        self._watch(None)

    # -- orders ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until control closes the inbox (ParentGone) or an expected failure was reported."""
        try:
            while True:
                if self._round and self._channel and self._channel.is_open:
                    self._send_batch(self._round)
                else:
                    self._wait(self._news)
        except (MigrationError, OSError, zmq.ZMQError) as exc:
            self._inbox.report(wire.WorkerFailed(wire.cut(str(exc))))

    def _watch(self, channel: Channel | None) -> None:
        """Make `channel` the one that is used. `_news` wakes on orders and on what happens to the
        connection, `_room` also when a packet can be queued."""
        self._channel = channel
        self._news, self._room = zmq.Poller(), zmq.Poller()
        for poller in (self._news, self._room):
            poller.register(self._inbox, zmq.POLLIN)
            if channel is not None:
                poller.register(channel.monitor, zmq.POLLIN)
        if channel is not None:
            self._room.register(channel.socket, zmq.POLLOUT)

    def _wait(self, poller: zmq.Poller) -> None:
        """Sleep until `poller` wakes; take orders, follow the connection."""
        channel = self._channel
        ready = dict(poller.poll())
        if self._inbox.fileno() in ready:
            self._take_orders()
        if channel is not None and channel is self._channel and channel.monitor in ready:
            self._follow_channel(channel)

    def _take_orders(self) -> None:
        while (taken := self._inbox.take()) is not None:
            order, fds = taken
            match order:
                case wire.PrepareSender():
                    self._prepare(order, fds)
                    self._inbox.report(wire.Ready())
                    self._open(wire.OpenChannel(order.endpoint, order.incarnation))
                case wire.OpenChannel():
                    self._open(order)
                case wire.Harvest():
                    self._harvest(order)
                case wire.SendRound():
                    self._round = RoundTotals(order.round_number)

    def _prepare(self, order: wire.PrepareSender, fds: Sequence[int]) -> None:
        """Map what was lent; from now on this worker is sender `index` of `count`."""
        self._order = order
        shared = dict(zip(wire.SENDER_FDS, fds, strict=False))
        rest = list(fds[len(wire.SENDER_FDS) :])
        self._blocks = blocks_of(order.blocks, rest[: len(order.blocks)])
        tracker_fds = rest[len(order.blocks) :]
        self._ram = [block.map() for block in self._blocks]
        self._views = [memoryview(ram) for ram in self._ram]
        self._slices = [block.slice_of(order.index, order.count) for block in self._blocks]
        self._dirty = PageBitmaps(self._blocks, shared["dirty"])
        self._in_flight = PageBitmaps(self._blocks, shared["in_flight"])
        self._progress = Progress(shared["progress"])
        self._budget = Budget(shared["budget"])
        self._harvester = self._make_harvester(order, shared, tracker_fds)

    def _make_harvester(
        self, order: wire.PrepareSender, shared: dict[str, int], tracker_fds: Sequence[int]
    ) -> Harvester:
        where = (self._blocks, order.index, order.count)
        match TrackerName(order.tracker):
            case TrackerName.UFFD:
                return WriteProtected(*where, tracker_fds, order.addresses)
            case TrackerName.SOFT_DIRTY:
                return SoftDirty(*where, tracker_fds, order.addresses)
            case TrackerName.BITMAP:
                return GuestBitmap(*where, tracker_fds)
            case TrackerName.NONE:
                return StoppedGuest(*where)
            case TrackerName.HASH:
                candidates = PageBitmaps(self._blocks, shared["candidates"])
                hashes = hash_tables(self._blocks, shared["hashes"])
                return ContentHash(*where, self._ram, candidates, hashes, order.hash_seed)

    def _harvest(self, order: wire.Harvest) -> None:
        """Collect what was written; between two pieces say how far it is, and look after control.

        :raise ParentGone: control is gone."""
        began_ns, found = time.monotonic_ns(), 0
        for piece in self._harvester.harvest(self._dirty):
            found += piece.found
            self._progress.add(Count.HARVEST_PAGES, piece.pages)
            self._inbox.check()
        self._progress.put(Count.HARVEST_NS, time.monotonic_ns() - began_ns)
        dirty_pages = self._dirty.count(self._order.index, self._order.count)
        self._inbox.report(wire.Harvested(order.number, dirty_pages, found))

    # -- the channel -----------------------------------------------------------------------------

    def _open(self, order: wire.OpenChannel) -> None:
        """Drop what was being sent and make the channel anew; control repeats the round's order."""
        self._drop_channel()
        try:
            self._watch(Channel(self._context, order))
        except zmq.ZMQError as exc:
            self._report_broken(order.incarnation, str(exc))

    def _follow_channel(self, channel: Channel) -> None:
        try:
            if channel.check():
                self._send(self._packet(wire.PacketKind.OPEN), [])
                self._inbox.report(wire.Opened(channel.incarnation))
        except Superseded:
            return
        except (ConnectionError, ChannelError) as exc:
            self._lose_channel(str(exc.__cause__ or exc))

    def _lose_channel(self, reason: str) -> None:
        assert self._channel is not None
        incarnation = self._channel.incarnation
        self._drop_channel()
        self._report_broken(incarnation, reason)

    def _drop_channel(self) -> None:
        """Give the channel up, and the round that went over it. Idempotent."""
        self._round = None
        if self._channel is not None:
            self._channel.close()
        self._watch(None)

    def _report_broken(self, incarnation: int, reason: str) -> None:
        self._inbox.report(wire.ChannelBroken(self._order.index, incarnation, wire.cut(reason)))

    # -- one batch -------------------------------------------------------------------------------

    def _send_batch(self, totals: RoundTotals) -> None:
        """Send the next batch of the round, or its end."""
        try:
            if totals.block_index == len(self._blocks):
                self._end_round(totals)
                return
            i = totals.block_index
            cursor, data_count, zero_count, pages, zero_pages = _native.take_batch(
                self._ram[i], self._dirty[i], self._in_flight[i], self._slices[i], totals.cursor,
                self._batch_pages_max(), self._order.detect_zero, self._data_runs, self._zero_runs,
            )  # fmt: skip
            totals.cursor = cursor
            if cursor >= self._blocks[i].page_count:
                totals.block_index, totals.cursor = i + 1, 0
            if pages or zero_pages:
                self._send_pages(totals, i, data_count, zero_count, pages, zero_pages)
        except Superseded:
            return
        except (ConnectionError, ChannelError) as exc:
            self._lose_channel(str(exc.__cause__ or exc))

    def _batch_pages_max(self) -> int:
        rate = self._budget.rate_bytes_per_s
        if rate == 0:
            return wire.BATCH_PAGES_MAX
        paced = rate * PACING_NS // (1_000_000_000 * PAGE_SIZE)
        return max(PACED_PAGES_MIN, min(wire.BATCH_PAGES_MAX, paced))

    def _send_pages(
        self, totals: RoundTotals, i: int, data_count: int, zero_count: int, pages: int, zeros: int
    ) -> None:
        gathered_count, frames = self._payload(i, data_count)
        packet = self._packet(
            wire.PacketKind.PAGES,
            round_number=totals.round_number,
            block_id=i + 1,
            pages=pages,
            zero_pages=zeros,
            payload_bytes=pages * PAGE_SIZE,
            gathered_runs=gathered_count,
            data_runs=bytes(self._data_runs[: data_count * wire.RUN.size]),
            zero_runs=bytes(self._zero_runs[: zero_count * wire.RUN.size]),
        )
        self._harvester.sent_zeros(i, self._zero_runs, zero_count)
        self._send(packet, frames)
        totals.packets += 1
        totals.pages += pages
        totals.zero_pages += zeros
        totals.payload_bytes += packet.payload_bytes
        self._progress.add(Count.PAGES, pages)
        self._progress.add(Count.ZERO_PAGES, zeros)
        self._progress.add(Count.PAYLOAD_BYTES, packet.payload_bytes)

    def _payload(self, i: int, data_count: int) -> tuple[int, list[bytes | memoryview]]:
        """Frames of the taken data runs: short runs copied together, long ones lent as they are.

        Lent pages may be written while ZeroMQ still reads them; they are then dirty again."""
        table = self._data_runs.cast("I")
        counts = table[1 : 2 * data_count : 2].tolist()
        if self._harvester.needs_private_copy or (counts and max(counts) < DIRECT_RUN_PAGES_MIN):
            copy = _native.gather(self._ram[i], self._data_runs, data_count)
            self._harvester.sent(i, copy, self._data_runs, data_count)
            self._progress.add(Count.GATHERED_PAGES, len(copy) // PAGE_SIZE)
            return data_count, [copy] if data_count else []
        runs = list(zip(table[0 : 2 * data_count : 2].tolist(), counts, strict=True))
        short = [run for run in runs if run[1] < DIRECT_RUN_PAGES_MIN]
        direct = [run for run in runs if run[1] >= DIRECT_RUN_PAGES_MIN]
        frames: list[bytes | memoryview] = []
        if short:
            for position, (first, count) in enumerate(short + direct):
                wire.RUN.pack_into(self._data_runs, position * wire.RUN.size, first, count)
            frames.append(_native.gather(self._ram[i], self._data_runs, len(short)))
            self._progress.add(Count.GATHERED_PAGES, len(frames[0]) // PAGE_SIZE)
        view = self._views[i]
        frames.extend(view[a * PAGE_SIZE : (a + n) * PAGE_SIZE] for a, n in direct)
        return len(short), frames

    def _end_round(self, totals: RoundTotals) -> None:
        assert self._channel is not None
        packet = self._packet(
            wire.PacketKind.ROUND_END,
            round_number=totals.round_number,
            pages=totals.pages,
            zero_pages=totals.zero_pages,
            payload_bytes=totals.payload_bytes,
        )
        self._send(packet, [])
        self._round = None
        self._inbox.report(
            wire.RoundSent(
                self._channel.incarnation, totals.round_number, totals.packets, totals.pages,
                totals.zero_pages, totals.payload_bytes,
            )
        )  # fmt: skip

    def _packet(self, kind: wire.PacketKind, **fields: object) -> wire.Packet:
        assert self._channel is not None
        self._channel.sequence += 1
        return wire.Packet(
            kind, self._order.session, self._order.index + 1, self._channel.incarnation,
            self._channel.sequence, **fields,  # type: ignore[arg-type]
        )  # fmt: skip

    def _send(self, packet: wire.Packet, frames: list[bytes | memoryview]) -> None:
        """Queue one packet when bandwidth and the channel allow.

        :raise ConnectionError: the channel is lost.
        :raise ChannelError: ZeroMQ refused.
        :raise Superseded: control wants the channel anew; the packet was not sent."""
        channel = self._channel
        assert channel is not None
        header = packet.encode()
        wire_bytes = len(header) + packet.payload_bytes * (packet.kind is wire.PacketKind.PAGES)
        if packet.kind is wire.PacketKind.PAGES:  # the others are few and short
            self._pace(channel, wire_bytes)
        parts: list[bytes | memoryview] = [header, *frames]
        while True:
            self._wait_for_room(channel)
            try:
                channel.socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
                break
            except zmq.Again:
                continue
            except zmq.ZMQError as exc:
                raise ChannelError(self._order.index, "sending") from exc
        self._progress.add(Count.PACKETS, 1)
        self._progress.add(Count.WIRE_BYTES, wire_bytes)

    def _wait_for_room(self, channel: Channel) -> None:
        """The one look at orders and connection between two packets."""
        began_ns = time.monotonic_ns()
        self._wait(self._room)
        self._progress.add(Count.STALLED_NS, time.monotonic_ns() - began_ns)
        if self._channel is not channel:
            raise Superseded

    def _pace(self, channel: Channel, wire_bytes: int) -> None:
        """Wait until the shared budget lets `wire_bytes` go; another rate begins the wait anew."""
        now_ns, generation = time.monotonic_ns(), self._budget.generation
        until_ns = self._budget.take(wire_bytes, now_ns, BURST_NS)
        while now_ns < until_ns:
            wait_ns = min(until_ns - now_ns, BURST_NS)
            if select.select([self._inbox], [], [], wait_ns / 1_000_000_000)[0]:
                self._take_orders()
            if self._channel is not channel:
                raise Superseded
            channel.check()
            waited_ns = time.monotonic_ns() - now_ns
            self._progress.add(Count.PACED_NS, waited_ns)
            now_ns += waited_ns
            if self._budget.generation != generation:
                generation = self._budget.generation
                until_ns = self._budget.take(wire_bytes, now_ns, BURST_NS)


def main(fd: int) -> None:
    """Serve control on the inherited descriptor `fd`."""
    Sender(Inbox(fd, wire.SenderOrder, "orders to a sender")).run()


if __name__ == "__main__":
    sys.exit(run_worker("sender", main))
