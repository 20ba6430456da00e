"""A live sender: what it sends, keeps in flight, and does when the channel is gone."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import time
from typing import Any

import pytest
import zmq
import zmq.asyncio

from engine import _native, wire
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.channel import SocketChannel
from engine.multifd.progress import Count
from engine.multifd.sender import Sender
from engine.multifd.worker import POSTCOPY_BUFFER_BYTES, SEND_BUFFER_BYTES, set_channel_options
from engine.worker import Inbox, ParentGone
from tests.multifd.rig import SenderRig, memory, sender

pytestmark = pytest.mark.process


async def one_round(rig: SenderRig, number: int = 1) -> tuple[list[wire.Packet], dict[int, bytes]]:
    """Order a round; return its packets and every page that was sent, zero pages as zeros."""
    rig.worker.order(wire.SendRound(number))
    packets: list[wire.Packet] = []
    sent: dict[int, bytes] = {}
    while True:
        packet, payload = await rig.packet()
        if packet.kind is wire.PacketKind.OPEN:
            continue
        packets.append(packet)
        if packet.kind is wire.PacketKind.ROUND_END:
            return packets, sent
        position = 0
        for first, count in wire.RUN.iter_unpack(packet.data_runs):
            for page in range(first, first + count):
                sent[page] = payload[position : position + PAGE_SIZE]
                position += PAGE_SIZE
        for first, count in wire.RUN.iter_unpack(packet.zero_runs):
            sent.update(dict.fromkeys(range(first, first + count), bytes(PAGE_SIZE)))


def test_a_round_carries_every_page_with_data_and_no_hole() -> None:
    """Runs short and long, zero pages in between, and a stretch that was never touched."""
    kinds = [os.urandom(PAGE_SIZE) if page % 7 else bytes(PAGE_SIZE) for page in range(300)]
    kinds += [os.urandom(PAGE_SIZE) for _ in range(300)]
    block = memory(4096, b"".join(kinds))

    async def scenario() -> tuple[list[wire.Packet], dict[int, bytes]]:
        async with sender(block) as rig:
            rig.dirty.set_data()
            return await one_round(rig)

    packets, sent = asyncio.run(scenario())
    assert sent == dict(enumerate(kinds))
    assert [packet.sequence for packet in packets] == list(range(2, 2 + len(packets)))
    end = packets[-1]
    assert (end.pages, end.zero_pages) == (600 - 43, 43)
    assert os.fstat(block.fd).st_blocks * 512 == 600 * PAGE_SIZE
    os.close(block.fd)


def test_what_was_taken_is_in_flight_and_no_longer_dirty() -> None:
    block = memory(64, os.urandom(10 * PAGE_SIZE))

    async def scenario() -> tuple[int, int]:
        async with sender(block) as rig:
            rig.dirty.set_data()
            await one_round(rig)
            return rig.dirty.count(), rig.in_flight.count()

    assert asyncio.run(scenario()) == (0, 10)
    os.close(block.fd)


def test_a_lost_connection_is_reported_and_an_order_opens_a_new_one() -> None:
    block = memory(64, os.urandom(10 * PAGE_SIZE))

    async def scenario() -> tuple[wire.ChannelBroken, dict[int, bytes]]:
        async with sender(block) as rig:
            rig.dirty.set_data()
            rig.socket.close(linger=0)
            broken = await rig.heard.next(wire.ChannelBroken)
            rig.socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
            rig.socket.setsockopt(zmq.LINGER, 0)
            port = rig.socket.bind_to_random_port("tcp://127.0.0.1")
            rig.worker.order(wire.OpenChannel(f"tcp://127.0.0.1:{port}", 2))
            await rig.heard.next(wire.Opened, 2)
            _, sent = await one_round(rig)
            rig.socket.close(linger=0)
            zmq.asyncio.Context.instance().term()
            return broken, sent

    broken, sent = asyncio.run(scenario())
    assert (broken.index, broken.incarnation) == (0, 1)
    assert len(sent) == 10
    os.close(block.fd)


def test_a_refused_connection_is_reported_not_waited_for() -> None:
    block = memory(64)

    async def scenario() -> wire.ChannelBroken:
        async with sender(block) as rig:
            rig.worker.order(wire.OpenChannel("tcp://127.0.0.1:9", 2))
            broken: wire.ChannelBroken = await rig.heard.next(wire.ChannelBroken)
            return broken

    broken = asyncio.run(scenario())
    assert (broken.incarnation, broken.reason) == (2, "connection refused")
    os.close(block.fd)


def test_content_that_changes_and_changes_back_is_never_taken_for_sent() -> None:
    """The hash is of what was sent: A is sent, B is found, A is back before it is sent."""
    a, b = os.urandom(PAGE_SIZE), os.urandom(PAGE_SIZE)
    block = memory(8, a)

    async def scenario() -> list[int]:
        async with sender(block, tracker="content-hash") as rig:
            rig.dirty.set_data()
            rig.delivered.set_data()
            await one_round(rig)
            found = [(await rig.harvest(1)).dirty_pages]
            os.pwrite(block.fd, b, 0)
            found.append((await rig.harvest(2)).dirty_pages)
            os.pwrite(block.fd, a, 0)
            _, sent = await one_round(rig, 2)
            assert sent == {0: a}
            found.append((await rig.harvest(3)).dirty_pages)
            os.pwrite(block.fd, bytes(PAGE_SIZE), 0)
            found.append((await rig.harvest(4)).dirty_pages)
            _, sent = await one_round(rig, 3)
            assert sent == {0: bytes(PAGE_SIZE)}
            os.pwrite(block.fd, a, 0)
            found.append((await rig.harvest(5)).dirty_pages)
            return found

    assert asyncio.run(scenario()) == [0, 1, 0, 1, 1]
    os.close(block.fd)


def test_the_budget_holds_the_rate_and_a_lifted_limit_ends_the_wait() -> None:
    """However busy the machine: no byte comes early, and the rest needs no 7 s any more."""
    rate, held_bytes = 2_000_000, 1_000_000
    block = memory(4096, os.urandom(4096 * PAGE_SIZE))

    async def scenario() -> tuple[int, float, float]:
        async with sender(block) as rig:
            rig.dirty.set_data()
            rig.budget.rate_bytes_per_s = rate
            sent_bytes, began = 0, time.monotonic()
            rig.worker.order(wire.SendRound(1))
            while sent_bytes < held_bytes:
                packet, _ = await rig.packet()
                sent_bytes += packet.payload_bytes
            held_s = time.monotonic() - began
            rig.budget.rate_bytes_per_s = 0
            lifted = time.monotonic()
            while packet.kind is not wire.PacketKind.ROUND_END:
                packet, _ = await rig.packet()
            return sent_bytes, held_s, time.monotonic() - lifted

    sent_bytes, held_s, rest_s = asyncio.run(scenario())
    assert held_s >= 0.8 * sent_bytes / rate  # the first packet goes at once
    assert rest_s < 0.9 * (block.size - sent_bytes) / rate
    os.close(block.fd)


async def waiting_for_bandwidth(rig: SenderRig) -> wire.Packet:
    """Order a round at 1 kB/s; return its first packet when the second has begun a wait of a
    minute."""
    rig.budget.rate_bytes_per_s = 1000
    rig.worker.order(wire.SendRound(1))
    while (packet := (await rig.packet())[0]).kind is not wire.PacketKind.PAGES:
        pass
    await rig.until(lambda: rig.progress[Count.PACED_NS])
    return packet


def test_a_raised_limit_ends_the_wait_at_the_old_one() -> None:
    block = memory(256, os.urandom(256 * PAGE_SIZE))

    async def scenario() -> int:
        async with sender(block) as rig:
            rig.dirty.set_data()
            pages = (await waiting_for_bandwidth(rig)).pages
            rig.budget.rate_bytes_per_s = 1_000_000_000
            while (packet := (await rig.packet())[0]).kind is not wire.PacketKind.ROUND_END:
                pages += packet.pages
            return pages

    assert asyncio.run(scenario()) == 256
    os.close(block.fd)


def test_a_channel_made_anew_in_a_wait_for_bandwidth_opens_at_once_and_sends_all() -> None:
    block = memory(64, os.urandom(64 * PAGE_SIZE))

    async def scenario() -> tuple[list[str], dict[int, bytes]]:
        async with sender(block) as rig:
            rig.dirty.set_data()
            await waiting_for_bandwidth(rig)
            rig.worker.order(wire.OpenChannel(rig.endpoint, 2))
            await rig.heard.next(wire.Opened, 2)  # 76 bytes more would take minutes at the limit
            rig.budget.rate_bytes_per_s = 0
            rig.in_flight.move_to(rig.dirty)
            while (packet := (await rig.packet())[0]).incarnation != 2:
                pass
            assert packet.kind is wire.PacketKind.OPEN
            _, sent = await one_round(rig)
            return rig.heard.lost, sent

    lost, sent = asyncio.run(scenario())
    assert lost == []
    assert len(sent) == 64
    os.close(block.fd)


def test_a_harvest_in_a_round_leaves_behind_the_cursor_and_adds_before_it() -> None:
    """Page 3 was sent, 40 is still to come, 100 was clean: all three are written in the round."""
    block = memory(128, os.urandom(128 * PAGE_SIZE))
    written = os.memfd_create("test-written", os.MFD_CLOEXEC)
    os.ftruncate(written, PAGE_SIZE)

    async def scenario() -> tuple[wire.Harvested, list[int], list[int]]:
        async with sender(block, tracker="guest-bitmap", tracker_fds=(written,)) as rig:
            _native.bitmap_set_range(rig.dirty[0], 0, 64)
            first = await waiting_for_bandwidth(rig)
            assert list(wire.RUN.iter_unpack(first.data_runs)) == [(0, 16)]
            with mmap.mmap(written, PAGE_SIZE) as bitmap:
                for page in (3, 40, 100):
                    _native.bitmap_set_range(bitmap, page, 1)
            rig.worker.order(wire.Harvest(1))
            harvested = await rig.heard.next(wire.Harvested)
            rig.budget.rate_bytes_per_s = 0
            rest: list[int] = []
            while (packet := (await rig.packet())[0]).kind is not wire.PacketKind.ROUND_END:
                for start, count in wire.RUN.iter_unpack(packet.data_runs):
                    rest += range(start, start + count)
            _, again = await one_round(rig, 2)
            return harvested, rest, sorted(again)

    harvested, rest, again = asyncio.run(scenario())
    assert harvested == wire.Harvested(1, 64 - 32 + 2, 3)
    assert rest == [*range(16, 64), 100]
    assert again == [3]
    os.close(block.fd)
    os.close(written)


def test_a_channel_that_cannot_connect_keeps_no_socket() -> None:
    made: list[zmq.Socket[bytes]] = []

    class Recording(zmq.Context[zmq.Socket[bytes]]):
        def socket(self, *arguments: Any, **options: Any) -> zmq.Socket[bytes]:
            made.append(super().socket(*arguments, **options))
            return made[-1]

    with Recording() as context:
        with pytest.raises(zmq.ZMQError):
            SocketChannel(context, wire.OpenChannel("no-such-transport://x", 1))
        assert [socket.closed for socket in made] == [True] * len(made)
        assert made


@pytest.mark.parametrize(
    ("endpoint", "may_postcopy", "send_bytes", "receive_bytes"),
    [
        ("tcp://127.0.0.1:1", False, SEND_BUFFER_BYTES, -1),
        ("tcp://127.0.0.1:1", True, POSTCOPY_BUFFER_BYTES, POSTCOPY_BUFFER_BYTES),
        ("tcp://192.0.2.1:1", True, -1, -1),
    ],
    ids=["precopy", "postcopy", "network"],
)
def test_no_call_moves_much_where_a_guest_may_wait_on_the_same_cpus(
    endpoint: str, may_postcopy: bool, send_bytes: int, receive_bytes: int
) -> None:
    """-1 is left to the kernel."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as bound:
        set_channel_options(bound, endpoint, may_postcopy=may_postcopy)
        order = wire.OpenChannel(endpoint, 1)
        channel = SocketChannel(context, order, may_postcopy=may_postcopy)
        found = [
            (one.getsockopt(zmq.SNDBUF), one.getsockopt(zmq.RCVBUF))
            for one in (channel.socket, bound)
        ]
        channel.close()

    assert found == [(send_bytes, receive_bytes)] * 2


def test_an_error_of_zeromq_is_reported_not_a_traceback() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inbox: Inbox[wire.SenderOrder] = Inbox(theirs.detach(), wire.SenderOrder, "test")

    def fail() -> None:
        raise zmq.ZMQError(zmq.ETERM)

    with ours:
        ours.send(wire.encode(wire.SendRound(1)))
        inbox.take = fail  # type: ignore[method-assign]
        worker = Sender(inbox)
        worker.run()
        worker._context.term()
        reports = wire.Decoder[Any](wire.SenderReport, wire.ORDER_BYTES_MAX, "test")
        assert isinstance(reports.decode(ours.recv(wire.ORDER_BYTES_MAX)), wire.WorkerFailed)
    with pytest.raises(ParentGone):  # and control's end is closed by now
        inbox.check()
    inbox.close()
