"""A live receiver behind a guest that may run: pages are inserted, nothing is ever written over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq.asyncio

from engine import wire
from engine.compress.codecs import CODECS
from engine.multifd.progress import Count
from engine.worker import BACKGROUND_NICE
from tests.hugepages import huge_pages
from tests.kernel import has_userfaultfd
from tests.multifd.encoded import encoded_packet, text
from tests.multifd.rig import Guest, ReceiverRig, guest, receiver
from tests.multifd.test_receiver import opened, packet, pages, round_end
from tests.multifd.test_receiver_rules import data, table, zeros
from tests.native.support import pages_of

__all__ = ["huge_pages"]

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]

PAGE = 4096
HUGE = 512 * PAGE
DELTA = {"payload_bytes": 5, "plain_bytes": 5, "pages": 1, "encoded_runs": 1}
Peer = tuple[ReceiverRig, Guest, zmq.asyncio.Socket]


@asynccontextmanager
async def inserting(page_count: int = 64, *, hugetlb: bool = False) -> AsyncIterator[Peer]:
    """A receiver in postcopy, its guest, and its opened channel."""
    async with receiver(page_count, hugetlb=hugetlb) as rig, rig.channel() as socket:
        with guest(rig.block) as made:
            await opened(rig, socket)
            made.insert_from_now_on(rig)
            yield rig, made, socket


def in_guest(made: Guest, page: int, count: int = 1) -> bytes:
    """What the guest reads; the pages must be there, or this never ends."""
    return made.ram[page * PAGE : (page + count) * PAGE]


def test_all_parts_of_a_packet_are_inserted_and_counted_once() -> None:
    """Encoded, gathered, direct and zero runs, twice; the guest wrote one page in between."""
    good, raw = text(3), os.urandom(2 * PAGE)
    fields = {"data_runs": table((4, 3), (0, 2)), "zero_pages": 2, "zero_runs": table((10, 2))}
    encoded = CODECS["zstd"]().encode(good)
    assert encoded is not None

    async def scenario() -> None:
        async with inserting() as (rig, made, socket):
            for sequence in (2, 4):
                message = encoded_packet(
                    "zstd", [(4, 3)], encoded, raw=raw, raw_runs=[(0, 2)], sequence=sequence,
                    header=fields,
                )  # fmt: skip
                await socket.send_multipart(message)
                await socket.send_multipart(data(sequence + 1, [(20, 1), (30, 4)], 0))
                await rig.until(lambda: rig.progress[Count.PACKETS] == sequence)  # noqa: B023
                made.ram[4 * PAGE : 4 * PAGE + 5] = b"guest"
            await socket.send(
                packet(
                    wire.PacketKind.ROUND_END, 6, pages=20, zero_pages=4,
                    payload_bytes=2 * (len(encoded) + 7 * PAGE),
                ).encode()
            )  # fmt: skip
            await rig.heard.next(wire.RoundReceived)
            assert in_guest(made, 4, 3) == b"guest" + good[5:]
            assert in_guest(made, 0, 2) == raw
            assert in_guest(made, 20) + in_guest(made, 30, 4) == b"x" * 5 * PAGE
            assert rig.block.allocated_bytes() == 10 * PAGE  # zero pages are holes
            assert pages_of(made.received[0]) == {0, 1, 4, 5, 6, 10, 11, 20, *range(30, 34)}
            assert rig.progress[Count.FRESH_PAGES] == 12
            assert rig.placed.count() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        pytest.param(zeros(2, (0, 9), (8, 1)), "there twice", id="zero-runs-overlap"),
        pytest.param(data(2, [(0, 2), (1, 1)], 1), "there twice", id="data-runs-overlap"),
        pytest.param(data(2, [(5, 1), (64, 1)], 0), "not within 64", id="last-direct-outside"),
        pytest.param(
            data(2, [(0, 2)], 1, zero_pages=1, zero_runs=table((64, 1))),
            "not within 64",
            id="zero-run-outside-after-right-ones",
        ),
        pytest.param(data(2, [(0, 1)], 1, block_id=2), "RAM block 2 of 1", id="no-such-block"),
        pytest.param(data(2, [(0, 1)], 1)[:1], "payload frames", id="payload-missing"),
        pytest.param(
            encoded_packet("lz4", [(1, 2)], b"junk", raw=b"x" * PAGE, raw_runs=[(5, 1)]),
            "LZ4 payload is wrong",
            id="encoded-frame-is-junk-and-the-gathered-one-right",
        ),
        pytest.param(
            [
                packet(wire.PacketKind.DELTAS, 2, data_runs=table((0, 1)), **DELTA).encode(),
                b"\3\0abc",
            ],
            "deltas for RAM block 'ram', whose guest may run",
            id="deltas",
        ),
    ],
)
def test_a_wrong_packet_breaks_the_channel_and_inserts_nothing(
    frames: list[bytes], reason: str
) -> None:
    async def scenario() -> None:
        async with inserting() as (rig, made, socket):
            await socket.send_multipart(frames)
            broken = await rig.heard.next(wire.ChannelBroken)
            assert reason in broken.reason
            assert rig.block.allocated_bytes() == made.received.count() == 0

    asyncio.run(scenario())


def test_a_receiver_that_replaces_another_inserts_from_its_first_packet_on() -> None:
    first, second = os.urandom(8 * PAGE), os.urandom(8 * PAGE)

    async def scenario() -> None:
        async with inserting() as (rig, made, socket):
            await socket.send_multipart(pages(2, 0, first))
            await rig.until(lambda: rig.progress[Count.FRESH_PAGES] == 8)  # placed, and counted
            made.ram[:5] = b"guest"
            os.kill(rig.worker.pid, signal.SIGKILL)
            await rig.worker.end()
            await rig.start(incarnation=2)
            made.insert_from_now_on(rig)
            async with rig.channel() as again:
                await opened(rig, again, incarnation=2)
                await again.send_multipart(pages(2, 0, first, incarnation=2))
                await again.send_multipart(pages(3, 8, second, incarnation=2))
                await again.send(round_end(4, 16, incarnation=2))
                await rig.heard.next(wire.RoundReceived)
            assert in_guest(made, 0, 16) == b"guest" + first[5:] + second
            assert rig.progress[Count.FRESH_PAGES] == 16

    asyncio.run(scenario())


def test_what_is_there_already_but_not_marked_is_marked_and_stays() -> None:
    """A receiver was killed between the page and its bit; or the fault service was first."""

    async def scenario() -> None:
        async with inserting() as (rig, made, socket):
            os.pwrite(rig.block.fd, (b"first" * 820)[:PAGE], 3 * PAGE)
            await socket.send_multipart(pages(2, 2, b"second" * 2048))
            await socket.send(round_end(3, 3))
            await rig.heard.next(wire.RoundReceived)
            assert in_guest(made, 2, 3) == (
                (b"second" * 2048)[:PAGE] + (b"first" * 820)[:PAGE] + (b"second" * 2048)[-PAGE:]
            )
            assert pages_of(made.received[0]) == {2, 3, 4}
            assert rig.progress[Count.FRESH_PAGES] == 2

    asyncio.run(scenario())


def test_a_guest_that_is_gone_ends_the_receiver_with_a_reason() -> None:
    async def scenario() -> wire.WorkerFailed:
        async with inserting() as (rig, made, socket):
            made.ram.close()
            await socket.send_multipart(pages(2, 0, b"x" * PAGE))
            failed: wire.WorkerFailed = await rig.heard.next(wire.WorkerFailed)
            return failed

    assert asyncio.run(scenario()) == wire.WorkerFailed(
        "the guest is gone, or has unmapped its RAM ([Errno 2] No such file or directory)",
        is_guest_gone=True,
    )


def test_every_thread_gives_way_to_vcpus_and_services() -> None:
    async def scenario() -> set[int]:
        async with inserting() as (rig, _, socket):
            await socket.send(round_end(2, 0))
            await rig.heard.next(wire.RoundReceived)
            threads = Path(f"/proc/{rig.worker.pid}/task").iterdir()
            return {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads}

    assert asyncio.run(scenario()) == {BACKGROUND_NICE}


# -- huge pages ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_come_whole_raw_encoded_or_zero() -> None:
    good, raw = text(512), os.urandom(HUGE)
    encoded = CODECS["lz4"]().encode(good)
    assert encoded is not None

    async def scenario() -> None:
        async with inserting(4 * 512, hugetlb=True) as (rig, made, socket):
            await socket.send_multipart(pages(2, 512, raw))
            await socket.send_multipart(encoded_packet("lz4", [(1024, 512)], encoded, sequence=3))
            await socket.send_multipart(zeros(4, (0, 512)))
            await socket.send(
                packet(
                    wire.PacketKind.ROUND_END, 5, pages=1024, zero_pages=512,
                    payload_bytes=HUGE + len(encoded),
                ).encode()
            )  # fmt: skip
            await rig.heard.next(wire.RoundReceived)
            assert in_guest(made, 512, 1024) == raw + good
            assert rig.block.allocated_bytes() == 2 * HUGE
            assert made.received.count() == rig.progress[Count.FRESH_PAGES] == 3 * 512

    asyncio.run(scenario())


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(data(2, [(0, 256)], 1), id="half"),
        pytest.param(data(2, [(256, 512)], 0), id="across"),
        pytest.param(data(2, [(0, 256), (256, 256)], 1), id="in-two-runs"),
        pytest.param(data(2, [(512, 512)], 0, zero_pages=1, zero_runs=table((0, 1))), id="zero"),
    ],
)
def test_packets_that_cut_huge_pages_break_the_channel_and_insert_nothing(
    frames: list[bytes],
) -> None:
    async def scenario() -> None:
        async with inserting(4 * 512, hugetlb=True) as (rig, made, socket):
            await socket.send_multipart(frames)
            broken = await rig.heard.next(wire.ChannelBroken)
            assert "not whole units of 512" in broken.reason
            assert rig.block.allocated_bytes() == made.received.count() == 0

    asyncio.run(scenario())
