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
from engine.compress.codecs import Codec
from engine.compress.delta import memory_bytes
from engine.errors import ChannelError, MigrationError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE
from engine.memory.demands import NewestDemand
from engine.memory.tracking import (
    ContentHash,
    GuestBitmap,
    Harvester,
    SoftDirty,
    StoppedGuest,
    TrackerName,
    TrackingLost,
    WriteProtected,
    hash_tables,
)
from engine.multifd.channel import Channel, SocketChannel, StreamChannel, Superseded
from engine.multifd.chooser import Chooser
from engine.multifd.deltas import Deltas
from engine.multifd.elision import Elision
from engine.multifd.payload import (
    Frame,
    Payload,
    copied_payload,
    encoded_payload,
    lent_payload,
    whole_payload,
)
from engine.multifd.progress import Budget, Count, Progress
from engine.multifd.rounds import Batches, Round, Taken
from engine.worker import Inbox, allow_private_memory, blocks_of, give_way, run_worker

#: Under a limit a batch is at most what may go in so much time, so that the rate holds in any
#: second.
PACING_NS: Final = 5_000_000
PACED_PAGES_MIN: Final = 16
BURST_NS: Final = 20_000_000


class Sender:
    """The loop's state between orders; owns everything that `PrepareSender` lent it."""

    def __init__(self, inbox: Inbox[wire.SenderOrder]) -> None:
        self._inbox = inbox
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._channel: Channel | None = None
        self._stream_fd = -1  #: in place of ZeroMQ, until its channel has it
        self._round: Round | None = None
        self._demands: NewestDemand | None = None  #: in postcopy: the RAM stands
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
            channel.watch(self._news, self._room)

    def _wait(self, poller: zmq.Poller) -> None:
        """Sleep until `poller` wakes; take orders, follow the connection."""
        channel = self._channel
        ready = dict(poller.poll())
        if self._inbox.fileno() in ready:
            self._take_orders()
        if channel is not None and channel is self._channel and channel.has_news(ready):
            self._follow_channel(channel)

    def _take_orders(self) -> None:
        while (taken := self._inbox.take()) is not None:
            order, fds = taken
            match order:
                case wire.UseStream():
                    self._stream_fd = fds[0]
                case wire.PrepareSender():
                    self._prepare(order, fds)
                    self._inbox.report(wire.Ready())
                    self._open(wire.OpenChannel(order.endpoint, order.incarnation))
                case wire.OpenChannel():
                    self._open(order)
                case wire.Compress():
                    self._compress(order)
                case wire.Harvest():
                    self._harvest(order)
                case wire.SendRound():
                    page_counts = [block.page_count for block in self._blocks]
                    self._round = Round(order.round_number, page_counts, self._demands)
                    self._chooser.begin_round()
                case wire.EndRound():
                    if self._round is not None:
                        self._round.is_over = True
                case wire.FollowDemands():
                    self._follow_demands(order, fds)
                case wire.EndChannel():
                    self._end_channel()

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
        self._batches = Batches(
            self._blocks, self._views, self._slices, self._dirty,
            PageBitmaps(self._blocks, shared["in_flight"]), detect_zero=order.detect_zero,
        )  # fmt: skip
        self._progress = Progress(shared["progress"])
        self._budget = Budget(shared["budget"])
        self._chooser = Chooser(order.index, order.count, self._progress, self._budget)
        self._deltas = Deltas(self._slices, self._progress)
        self._elision = Elision(self._blocks, self._progress)
        self._harvester = self._make_harvester(order, shared, tracker_fds)

    def _make_harvester(
        self, order: wire.PrepareSender, shared: dict[str, int], tracker_fds: Sequence[int]
    ) -> Harvester:
        where = (self._blocks, order.index, order.count)
        match TrackerName(order.tracker):
            case TrackerName.UFFD:
                return WriteProtected(*where, tracker_fds, order.pieces)
            case TrackerName.SOFT_DIRTY:
                return SoftDirty(*where, tracker_fds, order.pieces)
            case TrackerName.BITMAP:
                return GuestBitmap(*where, tracker_fds)
            case TrackerName.NONE:
                return StoppedGuest(*where)
            case TrackerName.HASH:
                candidates = PageBitmaps(self._blocks, shared["candidates"])
                hashes = hash_tables(self._blocks, shared["hashes"])
                return ContentHash(*where, self._ram, candidates, hashes, order.hash_seed)

    def _compress(self, order: wire.Compress) -> None:
        """From the next batch on."""
        self._chooser.follow(order)
        if self._demands is None:
            self._remember(order.xbzrle_cache_bytes // self._order.count, order.elide)

    def _remember(self, cache_bytes: int, elide: str) -> None:
        """Of what was sent: so much, and hashes or not; it comes on top of a worker's memory."""
        wanted = self._deltas.useful_bytes(cache_bytes)
        allow_private_memory(self._deltas.memory_bytes + memory_bytes(wanted))  # both, for a while
        self._deltas.resize(wanted)
        allow_private_memory(self._deltas.memory_bytes)
        self._elision.set(elide)

    def _follow_demands(self, order: wire.FollowDemands, fds: Sequence[int]) -> None:
        """From the next round on. The guest runs at the destination: nothing is written here any
        more, and nothing said of the destination's pages."""
        shared = dict(zip(wire.DEMANDS_FDS, fds, strict=False))
        self._demands = NewestDemand(shared["statistics"])
        self._harvester = StoppedGuest(self._blocks, self._order.index, self._order.count)
        self._remember(0, "off")
        give_way()

    def _harvest(self, order: wire.Harvest) -> None:
        """Collect what was written; between two pieces say how far it is, and look after control.

        :raise ParentGone: control is gone."""
        began_ns, found = time.monotonic_ns(), 0
        try:
            for piece in self._harvester.harvest(self._dirty, is_peek=order.is_peek):
                found += piece.found
                self._progress.add(Count.HARVEST_PAGES, piece.pages)
                self._inbox.check()
        except TrackingLost as exc:
            self._inbox.report(wire.TrackerLost(exc.process, exc.is_gone))
            raise
        self._progress.put(Count.HARVEST_NS, time.monotonic_ns() - began_ns)
        dirty_pages = self._dirty.count(self._order.index, self._order.count)
        self._inbox.report(wire.Harvested(order.number, dirty_pages, found))

    # -- the channel -----------------------------------------------------------------------------

    def _open(self, order: wire.OpenChannel) -> None:
        """Drop what was being sent and make the channel anew; control repeats the round's order."""
        self._drop_channel()
        self._deltas.forget()
        self._elision.forget()
        if self._stream_fd >= 0:
            channel = StreamChannel(self._stream_fd, order.incarnation)
            self._stream_fd = -1
            self._watch(channel)
            self._follow_channel(channel)
            return
        try:
            may_postcopy = self._order.may_postcopy
            self._watch(SocketChannel(self._context, order, may_postcopy=may_postcopy))
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

    def _end_channel(self) -> None:
        """Of a stream, between two rounds: nothing of ours follows."""
        channel = self._channel
        if channel is None:
            return  # lost a moment ago
        try:
            self._send(self._packet(wire.PacketKind.CHANNEL_END), [])
        except Superseded:
            return
        except (ConnectionError, ChannelError) as exc:
            self._lose_channel(str(exc.__cause__ or exc))
            return
        self._drop_channel()
        self._inbox.report(wire.ChannelEnded(channel.incarnation))

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

    def _send_batch(self, round_: Round) -> None:
        """Send the next batch of the round, or its end."""
        try:
            where = round_.next()
            if where is None:
                self._end_round(round_)
                return
            take = self._batches.take if self._demands is None else self._batches.take_whole
            cursor, taken = take(*where, self._batch_pages_max())
            is_empty = not (taken.pages or taken.zero_pages)
            round_.went_on(cursor, is_empty=is_empty)
            if not is_empty:
                self._send_taken(round_, taken)
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

    def _send_taken(self, round_: Round, taken: Taken) -> None:
        """Send what the run tables hold, in one packet or two."""
        began_cpu_ns, arm = time.thread_time_ns(), self._chooser.choose()
        payloads = self._payloads(round_.number, taken, arm.codec)
        i, zeros, count = taken.block_index, self._batches.zero_runs, taken.zero_count
        zero_runs = bytes(zeros[: count * wire.RUN.size])
        self._harvester.sent_zeros(i, zeros, count)
        self._deltas.sent_zeros(i, round_.number, zeros, count)
        self._elision.sent_otherwise(i, zeros, count)
        self._progress.add(Count.ENCODE_NS, time.thread_time_ns() - began_cpu_ns)
        if not zero_runs and not any(payload.pages for payload in payloads):
            self._wait_for_room()  # no packet, but a look at orders and connection all the same
        for payload in payloads:
            if payload.pages or zero_runs:
                self._send_payload(round_, taken, payload, zero_runs)
            zero_runs = b""
        if taken.pages:
            self._chooser.learn(arm, taken.pages * PAGE_SIZE, payloads)

    def _payloads(self, round_number: int, taken: Taken, codec: Codec | None) -> list[Payload]:
        """Of the taken data runs; the first may have no pages."""
        i, count = taken.block_index, taken.data_count
        ram, runs = self._views[i], self._batches.data_runs
        if self._harvester.needs_private_copy:
            copy = _native.gather(ram, runs, count)
            self._harvester.sent(i, copy, runs, count)
            return [copied_payload(copy, runs, count, codec)]
        if self._deltas.are_due(round_number):
            self._elision.sent_otherwise(i, runs, count)
            return self._deltas.payloads(i, round_number, ram, runs, count, codec)
        if count and self._elision.is_due(round_number, i, wire.RUN.unpack_from(runs)[0]):
            return [copied_payload(*self._elision.gather(i, ram, runs, count), codec)]
        self._elision.sent_otherwise(i, runs, count)
        if self._demands is not None and self._blocks[i].backing_page_size > PAGE_SIZE:
            return [whole_payload(ram, runs, count, codec)]
        if codec is not None and count:
            return [encoded_payload(ram, runs, count, codec)]
        return [lent_payload(ram, runs, count)]

    def _send_payload(
        self, round_: Round, taken: Taken, payload: Payload, zero_runs: bytes
    ) -> None:
        packet = self._packet(
            payload.kind,
            round_number=round_.number,
            block_id=taken.block_index + 1,
            codec=payload.codec,
            pages=payload.pages,
            zero_pages=taken.zero_pages if zero_runs else 0,
            payload_bytes=payload.payload_bytes,
            plane_runs=payload.plane_runs,
            encoded_runs=payload.encoded_runs,
            gathered_runs=payload.gathered_runs,
            plain_bytes=payload.plain_bytes,
            data_runs=payload.data_runs,
            zero_runs=zero_runs,
        )
        self._send(packet, payload.frames)
        round_.sent(packet)
        self._count(packet, payload)

    def _count(self, packet: wire.Packet, payload: Payload) -> None:
        progress = self._progress
        if packet.kind is wire.PacketKind.PAGES:
            progress.add(Count.PAGES, packet.pages)
        progress.add(Count.ZERO_PAGES, packet.zero_pages)
        progress.add(Count.PAYLOAD_BYTES, packet.payload_bytes)
        progress.add(Count.GATHERED_PAGES, payload.copied_pages)
        progress.add(Count.TRIED_BYTES, len(payload.tried))
        if payload.codec is not wire.CodecId.RAW:
            progress.add(Count.PLAIN_BYTES, payload.plain_bytes)
            progress.add(Count.ENCODED_BYTES, payload.encoded_bytes)

    def _end_round(self, round_: Round) -> None:
        assert self._channel is not None
        packet = self._packet(
            wire.PacketKind.ROUND_END,
            round_number=round_.number,
            pages=round_.pages,
            zero_pages=round_.zero_pages,
            payload_bytes=round_.payload_bytes,
        )
        self._send(packet, [])
        self._round = None
        self._inbox.report(
            wire.RoundSent(
                self._channel.incarnation, round_.number, round_.packets, round_.pages,
                round_.zero_pages, round_.payload_bytes,
            )
        )  # fmt: skip

    def _packet(self, kind: wire.PacketKind, **fields: object) -> wire.Packet:
        assert self._channel is not None
        self._channel.sequence += 1
        return wire.Packet(
            kind, self._order.session, self._order.index + 1, self._channel.incarnation,
            self._channel.sequence, **fields,  # type: ignore[arg-type]
        )  # fmt: skip

    def _send(self, packet: wire.Packet, frames: Sequence[Frame]) -> None:
        """Queue one packet when bandwidth and the channel allow.

        :raise ConnectionError: the channel is lost.
        :raise ChannelError: ZeroMQ refused.
        :raise Superseded: control wants the channel anew; the packet was not sent."""
        channel = self._channel
        assert channel is not None
        header = packet.encode()
        wire_bytes = len(header)
        if packet.kind in (wire.PacketKind.PAGES, wire.PacketKind.DELTAS):
            wire_bytes += packet.payload_bytes
            self._pace(channel, wire_bytes)  # the others are few and short
        parts: list[Frame] = [header, *frames]
        while True:
            self._wait_for_room()
            try:
                if channel.send(parts):
                    break
            except zmq.ZMQError as exc:
                raise ChannelError(self._order.index, "sending") from exc
        self._progress.add(Count.PACKETS, 1)
        self._progress.add(Count.WIRE_BYTES, wire_bytes)

    def _wait_for_room(self) -> None:
        """The one look at orders and connection between two packets."""
        channel, began_ns = self._channel, time.monotonic_ns()
        self._wait(self._room)
        self._progress.add(Count.STALLED_NS, time.monotonic_ns() - began_ns)
        if self._channel is not channel:
            raise Superseded

    def _pace(self, channel: Channel, wire_bytes: int) -> None:
        """Wait until the shared budget lets `wire_bytes` go; another rate begins the wait anew, the
        round's end ends it."""
        now_ns, generation = time.monotonic_ns(), self._budget.generation
        until_ns = self._budget.take(wire_bytes, now_ns, BURST_NS)
        while now_ns < until_ns and not (self._round and self._round.is_over):
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
