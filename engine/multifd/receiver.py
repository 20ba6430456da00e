"""A receiver: one process, one multifd channel, all RAM blocks (`python -m engine.multifd.receiver
FD`).

Every packet is checked before a byte of RAM is written. A bad or lost packet breaks the incarnation
of the channel: nothing more of it is used, control is told, and the sender makes the channel anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import zmq

from engine import _native, unixsocket, wire
from engine.compress.codecs import decoders
from engine.errors import ChannelError, GuestError, MemoryRefused, UsageError, WireError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.insertion import Inserter
from engine.memory.placement import Placer
from engine.multifd.progress import Count, Progress
from engine.multifd.streamreader import StreamReader, frames_of
from engine.multifd.worker import set_channel_options
from engine.worker import Complaints, Inbox, blocks_of, give_way, log, run_worker

STREAM: Final = b"stream"  #: in place of the routing id of a ZeroMQ connection


class Receiver:
    """The loop's state; owns the socket, the mappings and everything `PrepareReceiver` lent it."""

    def __init__(self, inbox: Inbox[wire.ReceiverOrder]) -> None:
        self._inbox = inbox
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] | None = None
        self._stream: StreamReader | None = None  #: in place of the socket, until its end
        self._lent_fd = -1  #: the stream's, before the receiver is prepared
        self._identity = b""  #: routing id of the connection whose packets are used
        self._incarnation = 0  #: newest incarnation that was opened
        self._broken = True  #: nothing of the newest incarnation is used (any more)
        self._sequence = 0
        self._ended_round = 0  #: newest round that was acknowledged
        self._may_repeat = False  #: its acknowledgement may have been lost with its incarnation
        self._round_number = 0  #: going on; 0 until its first packet
        self._complaints = Complaints()
        self._decoders = decoders()
        self._clear_round()

    def run(self) -> None:
        """Serve until control closes the inbox (ParentGone) or placing fails (reported)."""
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        try:
            while True:
                if self._socket is not None and self._socket not in poller:
                    poller.register(self._socket, zmq.POLLIN)
                if self._stream is not None and self._stream.fd not in poller:
                    poller.register(self._stream.fd, zmq.POLLIN)
                ready = dict(poller.poll())
                if self._inbox.fileno() in ready:
                    self._take_orders()
                if self._socket is not None and self._socket in ready:
                    self._take_packet(self._socket)
                if self._stream is not None and self._stream.fd in ready:
                    fd = self._stream.fd
                    self._take_chunk(self._stream)
                    if self._stream.fd < 0:
                        poller.unregister(fd)
                        self._stream = None
        except zmq.ZMQError as exc:
            raise ChannelError(self._order.index, "receiving") from exc
        except (MemoryRefused, GuestError) as exc:
            cause = exc.__cause__
            reason = wire.cut(f"{exc} ({cause})" if cause else str(exc))
            self._inbox.report(wire.WorkerFailed(reason, isinstance(exc, GuestError)))

    def _take_orders(self) -> None:
        while (taken := self._inbox.take()) is not None:
            order, fds = taken
            match order:
                case wire.UseStream():
                    self._lent_fd = fds[0]
                case wire.PrepareReceiver():
                    self._prepare(order, fds)
                case wire.InsertPages():
                    self._insert(order, fds)

    def _prepare(self, order: wire.PrepareReceiver, fds: Sequence[int]) -> None:
        shared = dict(zip(wire.RECEIVER_FDS, fds, strict=False))
        self._order = order
        self._incarnation = order.incarnation - 1
        self._blocks = blocks_of(order.blocks, fds[len(wire.RECEIVER_FDS) :])
        placer = Placer(self._blocks, PageBitmaps(self._blocks, shared["placed"]))
        self._placer: Placer | Inserter = placer
        self._progress = Progress(shared["progress"])
        if self._lent_fd >= 0:
            self._stream = StreamReader(self._lent_fd)
            self._inbox.report(wire.Ready("stream", placer.method))
            return
        self._socket = self._context.socket(zmq.ROUTER)
        set_channel_options(self._socket, order.bind, may_postcopy=order.may_postcopy)
        try:
            if order.bind.startswith("ipc://"):  # libzmq removes whatever file is there
                unixsocket.claim(order.bind.removeprefix("ipc://"))
            self._socket.bind(order.bind)
        except UsageError as exc:
            raise MemoryRefused(f"cannot listen on {order.bind}: {exc}") from None
        except zmq.ZMQError as exc:
            raise MemoryRefused(f"cannot listen on {order.bind}: {exc.strerror}") from None
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self._inbox.report(wire.Ready(endpoint.rstrip(b"\0").decode(), placer.method))

    def _insert(self, order: wire.InsertPages, fds: Sequence[int]) -> None:
        """From now on pages are placed behind a guest that runs."""
        shared = dict(zip(wire.INSERTION_FDS, fds, strict=False))
        received = PageBitmaps(self._blocks, shared["received"])
        uffds = fds[len(wire.INSERTION_FDS) :]
        inserter = Inserter(self._blocks, uffds, order.addresses, received)
        self._placer.close()
        self._placer = inserter
        self._inbox.report(wire.Inserting())
        give_way()

    # -- packets ---------------------------------------------------------------------------------

    def _take_packet(self, socket: zmq.Socket[bytes]) -> None:
        """Take one multipart message; a wrong one costs the channel's incarnation or is dropped."""
        identity, header, payload = self._receive(socket)
        is_peer = identity == self._identity and not self._broken
        try:
            if header is None:
                raise WireError("message with too many frames or without a header")
            packet = wire.decode_packet(header)
            self._check_owner(packet)
            _check_frames(packet, payload)
            if packet.kind is wire.PacketKind.OPEN:
                self._open(identity, packet)
                return
            if not is_peer or packet.incarnation != self._incarnation:
                self._progress.add(Count.STRANGERS, 1)
                return  # left over from an incarnation that was given up
            self._use(packet, payload)
        except WireError as exc:
            if is_peer:
                self._break(str(exc))
            else:
                self._progress.add(Count.STRANGERS, 1)
                self._complaints.say(
                    f"channel {self._order.index} dropped a stranger's message: {exc}"
                )

    def _take_chunk(self, stream: StreamReader) -> None:
        """Take what has come, at most one packet. Nobody else writes to a stream: whatever is wrong
        there is its end."""
        try:
            if (taken := stream.read()) is None:
                return
            packet = wire.decode_packet(taken[0])
            self._check_owner(packet)
            frames = frames_of(packet, taken[1])
            _check_frames(packet, frames)
            if packet.kind is wire.PacketKind.OPEN and not self._sequence:
                self._open(STREAM, packet)
            elif packet.kind is wire.PacketKind.OPEN or packet.incarnation != self._incarnation:
                raise WireError(f"{packet.kind.name} of incarnation {packet.incarnation}")
            else:
                self._use(packet, frames)
        except (ConnectionError, WireError) as exc:
            self._break(str(exc))
            stream.close()

    def _check_owner(self, packet: wire.Packet) -> None:
        if packet.session != self._order.session:
            raise WireError("packet of another session")
        if packet.channel_id != self._order.index + 1:
            raise WireError(f"packet of channel id {packet.channel_id}")

    def _receive(
        self, socket: zmq.Socket[bytes]
    ) -> tuple[bytes, memoryview | None, list[memoryview]]:
        """Identity, header and payload frames; the header is None when the frames are too many."""
        frames: list[memoryview] = []
        while True:
            frame = socket.recv(copy=False)
            if len(frames) <= wire.PACKET_FRAMES_MAX:
                frames.append(frame.buffer)
            if not frame.more:
                break
        if not 2 <= len(frames) <= wire.PACKET_FRAMES_MAX:
            return bytes(frames[0]), None, []
        return bytes(frames[0]), frames[1], frames[2:]

    def _open(self, identity: bytes, packet: wire.Packet) -> None:
        if packet.incarnation <= self._incarnation or packet.sequence != 1:
            raise WireError(
                f"OPEN of incarnation {packet.incarnation} after {self._incarnation}, "
                f"sequence {packet.sequence}"
            )
        self._identity, self._incarnation = identity, packet.incarnation
        self._sequence, self._broken, self._may_repeat = 1, False, True
        self._clear_round()
        self._inbox.report(wire.Opened(packet.incarnation))

    def _use(self, packet: wire.Packet, payload: list[memoryview]) -> None:
        if packet.sequence != self._sequence + 1:
            raise WireError(f"packet {packet.sequence} after {self._sequence}: packets were lost")
        self._sequence = packet.sequence
        if packet.kind is wire.PacketKind.CHANNEL_END:
            self._end_channel()
            return
        self._check_round(packet.round_number)
        if packet.kind is wire.PacketKind.ROUND_END:
            self._end_round(packet)
            return
        if packet.block_id > len(self._blocks):
            raise WireError(f"packet for RAM block {packet.block_id} of {len(self._blocks)}")
        self._place(packet, payload)
        self._packets += 1
        self._pages += packet.pages
        self._zero_pages += packet.zero_pages
        self._payload_bytes += packet.payload_bytes
        self._progress.add(Count.PACKETS, 1)
        self._progress.add(Count.PAGES, packet.pages)
        self._progress.add(Count.ZERO_PAGES, packet.zero_pages)
        self._progress.add(Count.PAYLOAD_BYTES, packet.payload_bytes)
        header_bytes = wire.HEADER.size + len(packet.data_runs) + len(packet.zero_runs)
        self._progress.add(Count.WIRE_BYTES, header_bytes + packet.payload_bytes)

    def _check_round(self, number: int) -> None:
        """Rounds have rising numbers over all incarnations, so that each is placed and acknowledged
        once; only a new incarnation may repeat the newest."""
        if self._round_number:
            if number != self._round_number:
                raise WireError(f"packet of round {number} in round {self._round_number}")
            return
        if number < self._ended_round + (not self._may_repeat):
            raise WireError(f"packet of round {number} after the end of {self._ended_round}")
        self._round_number = number

    def _place(self, packet: wire.Packet, payload: list[memoryview]) -> None:
        """Place all pages; everything is checked and decoded before the first byte is written."""
        index, runs = packet.block_id - 1, memoryview(packet.data_runs)
        self._placer.check(
            index, packet.data_runs, packet.plane_runs, packet.encoded_runs, packet.gathered_runs,
            packet.zero_runs,
        )  # fmt: skip
        if packet.encoded_runs and packet.codec is not wire.CodecId.RAW:
            plain = self._decoders[packet.codec].decode(payload[0], packet.plain_bytes)
            payload[0] = memoryview(plain)
        if packet.kind is wire.PacketKind.DELTAS:
            self._placer.apply_deltas(index, payload[0], runs, packet.encoded_runs)
            return
        groups = [1] * (len(runs) // wire.RUN.size - packet.encoded_runs - packet.gathered_runs)
        groups = [one for one in (packet.encoded_runs, packet.gathered_runs) if one] + groups
        if packet.plane_runs:
            payload[:1] = _restored(payload[0], packet.plane_pages)
            groups[:1] = [packet.plane_runs, packet.encoded_runs - packet.plane_runs]
        fresh = start = 0
        for frame, count in zip(payload, groups, strict=True):
            end = start + count * wire.RUN.size
            fresh += self._placer.place(index, frame, runs[start:end], count)
            start = end
        if packet.zero_runs:
            zero_runs = memoryview(packet.zero_runs)
            received = self._placer.clear(index, zero_runs, len(zero_runs) // wire.RUN.size)
            fresh += received if isinstance(self._placer, Inserter) else 0
        self._progress.add(Count.FRESH_PAGES, fresh)

    # -- rounds ----------------------------------------------------------------------------------

    def _end_round(self, packet: wire.Packet) -> None:
        """Compare with what the sender counted, then acknowledge: all of it is placed."""
        ours = (self._pages, self._zero_pages, self._payload_bytes)
        if ours != (packet.pages, packet.zero_pages, packet.payload_bytes):
            raise WireError(
                f"round {packet.round_number}: {packet.pages} pages and {packet.zero_pages} zero "
                f"pages were sent, {self._pages} and {self._zero_pages} came"
            )
        self._inbox.report(
            wire.RoundReceived(
                self._order.index, self._incarnation, packet.round_number, self._packets,
                self._pages, self._zero_pages, self._payload_bytes,
            )
        )  # fmt: skip
        self._ended_round, self._may_repeat = packet.round_number, False
        self._clear_round()

    def _end_channel(self) -> None:
        """Of a stream: what follows is control's."""
        if self._stream is None or self._round_number:
            raise WireError("CHANNEL_END in the middle of a round, or where there is no stream")
        self._stream.close()
        self._inbox.report(wire.ChannelEnded(self._incarnation))

    def _clear_round(self) -> None:
        self._round_number = 0
        self._packets = self._pages = self._zero_pages = self._payload_bytes = 0

    def _break(self, reason: str) -> None:
        self._broken = True
        reason = wire.cut(reason)
        log.warning("channel %d is broken: %s", self._order.index, reason)
        self._inbox.report(wire.ChannelBroken(self._order.index, self._incarnation, reason))


def _check_frames(packet: wire.Packet, payload: Sequence[memoryview]) -> None:
    """:raise WireError: the frames are not what the header speaks of; those without pages have
    none."""
    if [len(frame) for frame in payload] != packet.frame_sizes():
        raise WireError("packet whose payload frames are not of the sizes that its runs say")


def _restored(plain: memoryview, plane_pages: int) -> list[memoryview]:
    """A decoded frame as two: the pages that were bit planes, and the others."""
    pages = _native.restore_planes(plain, plane_pages)
    return [memoryview(pages), plain[len(pages) :]]


def main(fd: int) -> None:
    """Serve control on the inherited descriptor `fd`."""
    Receiver(Inbox(fd, wire.ReceiverOrder, "orders to a receiver")).run()


if __name__ == "__main__":
    sys.exit(run_worker("receiver", main))
