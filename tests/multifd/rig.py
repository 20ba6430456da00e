"""A live receiver or sender with a test in control's place: real process, memory and ZeroMQ."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio

from engine import _native, wire
from engine.control.pool import Worker
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.missing import open_missing
from engine.memory.pieces import TrackedPiece
from engine.multifd.progress import Budget, Progress

SESSION = b"session-of-tests"
DEADLINE_S = 60.0


def memory(page_count: int, content: bytes = b"", *, hugetlb: bool = False) -> RamBlock:
    """A memfd block; the caller closes its descriptor."""
    flags = os.MFD_HUGETLB | os.MFD_HUGE_2MB if hugetlb else 0
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC | flags)
    os.ftruncate(fd, page_count * PAGE_SIZE)
    block = RamBlock("ram", page_count * PAGE_SIZE, fd, 512 * PAGE_SIZE if hugetlb else PAGE_SIZE)
    if content:
        with block.map() as ram:  # a hugetlbfs takes no pwrite
            ram[: len(content)] = content
    return block


def shapes(block: RamBlock) -> list[wire.BlockShape]:
    return [wire.BlockShape(block.name, block.size, block.backing_page_size)]


@dataclass
class Heard:
    """Reports of a worker, and its death."""

    reports: list[Any] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def listen(self, worker: Worker[Any]) -> None:
        def on_report(report: Any) -> None:
            self.reports.append(report)
            self._news.set()

        def on_lost(lost: Exception) -> None:
            self.lost.append(str(lost))
            self._news.set()

        worker.listen(on_report, on_lost)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def next(self, kind: type[Any], count: int = 1) -> Any:
        """The `count`-th report of a kind."""
        await self.until(lambda: self.lost or len(self.of(kind)) >= count)
        assert len(self.of(kind)) >= count, (kind, self.reports, self.lost)
        return self.of(kind)[count - 1]

    def of(self, kind: type[Any]) -> list[Any]:
        return [report for report in self.reports if isinstance(report, kind)]


@dataclass
class ReceiverRig:
    """A receiver that waits for channel 0."""

    block: RamBlock
    context: zmq.asyncio.Context
    placed: PageBitmaps
    progress: Progress
    worker: Worker[wire.ReceiverReport] = field(init=False)
    heard: Heard = field(init=False)
    endpoint: str = ""

    async def start(self, incarnation: int = 1) -> None:
        """Prepare a receiver, whose first incarnation is this one; a former one was ended."""
        self.worker, self.heard = Worker("receiver", wire.ReceiverReport), Heard()
        self.heard.listen(self.worker)
        self.worker.order(
            wire.PrepareReceiver(0, SESSION, "tcp://127.0.0.1:*", incarnation, shapes(self.block)),
            [self.placed.fd, self.progress.fd, self.block.fd],
        )
        self.endpoint = (await self.heard.next(wire.Ready)).endpoint

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that the worker does to shared memory, and tells nobody."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.001)

    def ram(self) -> bytes:
        return os.pread(self.block.fd, self.block.size, 0)

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[zmq.asyncio.Socket]:
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self.endpoint)
        try:
            yield socket
        finally:
            socket.close()


@asynccontextmanager
async def receiver(page_count: int = 64, *, hugetlb: bool = False) -> AsyncIterator[ReceiverRig]:
    block = memory(page_count, hugetlb=hugetlb)
    placed = PageBitmaps.create("placed", [block])
    progress = Progress.create()
    context = zmq.asyncio.Context()
    rig = ReceiverRig(block, context, placed, progress)
    try:
        await rig.start()
        yield rig
    finally:
        await rig.worker.end()
        context.destroy(linger=0)
        placed.close()
        progress.close()
        os.close(block.fd)


@dataclass
class Guest:
    """The guest of a `ReceiverRig`: this process, which touches nothing that is missing."""

    ram: mmap.mmap
    uffd: int
    received: PageBitmaps

    def insert_from_now_on(self, rig: ReceiverRig) -> None:
        """Order it of the rig's receiver."""
        rig.worker.order(
            wire.InsertPages([_native.mapping_address(self.ram)]), [self.received.fd, self.uffd]
        )


@contextmanager
def guest(block: RamBlock) -> Iterator[Guest]:
    """Its RAM is mapped and registered; nothing is received."""
    received = PageBitmaps.create("received", [block])
    with block.map() as ram:
        uffd = open_missing([ram])
        try:
            yield Guest(ram, uffd, received)
        finally:
            os.close(uffd)
            received.close()


async def first_report(bind: str) -> wire.Message:
    """What a receiver says first when it is told to listen at `bind`."""
    block = memory(1)
    placed, progress = PageBitmaps.create("placed", [block]), Progress.create()
    worker: Worker[wire.ReceiverReport] = Worker("receiver", wire.ReceiverReport)
    heard = Heard()
    try:
        heard.listen(worker)
        worker.order(
            wire.PrepareReceiver(0, SESSION, bind, 1, shapes(block)),
            [placed.fd, progress.fd, block.fd],
        )
        await heard.until(lambda: heard.reports or heard.lost)
        first: wire.Message = heard.reports[0]
        return first
    finally:
        await worker.end()
        placed.close()
        progress.close()
        os.close(block.fd)


@dataclass
class SenderRig:
    """A sender of channel 0 of 1, connected to a ROUTER of ours."""

    block: RamBlock
    worker: Worker[wire.SenderReport]
    heard: Heard
    socket: zmq.asyncio.Socket
    dirty: PageBitmaps
    in_flight: PageBitmaps
    budget: Budget
    delivered: PageBitmaps
    progress: Progress

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that the worker does to shared memory, and tells nobody."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.001)

    @property
    def endpoint(self) -> str:
        """Where the sender connects to."""
        where = self.socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(where, bytes)
        return where.rstrip(b"\0").decode()

    async def harvest(self, number: int, *, is_peek: bool = False) -> wire.Harvested:
        """Have it look at what was written."""
        self.worker.order(wire.Harvest(number, is_peek))
        report: wire.Harvested = await self.heard.next(wire.Harvested, number)
        return report

    async def packet(self) -> tuple[wire.Packet, bytes]:
        """The next packet and its payload."""
        async with asyncio.timeout(DEADLINE_S):
            _, header, *payload = await self.socket.recv_multipart()
        return wire.decode_packet(header), b"".join(payload)


@asynccontextmanager
async def sender(
    block: RamBlock,
    *,
    tracker: str = "none",
    tracker_fds: tuple[int, ...] = (),
    pieces: Sequence[TrackedPiece] = (),
    unread_packets_max: int = 1000,
) -> AsyncIterator[SenderRig]:
    dirty, in_flight, delivered = (
        PageBitmaps.create(name, [block]) for name in ("dirty", "in-flight", "delivered")
    )
    progress, budget = Progress.create(), Budget.create()
    hashes = os.memfd_create("test-hashes", os.MFD_CLOEXEC)
    os.ftruncate(hashes, block.page_count * 16)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, unread_packets_max)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    worker: Worker[wire.SenderReport] = Worker("sender", wire.SenderReport)
    heard = Heard()
    shared = (dirty.fd, in_flight.fd, delivered.fd, hashes, progress.fd, budget.fd)
    try:
        heard.listen(worker)
        worker.order(
            wire.PrepareSender(
                0,
                1,
                SESSION,
                f"tcp://127.0.0.1:{port}",
                1,
                shapes(block),
                tracker,
                list(pieces),
                True,
                7,
            ),
            [*shared, block.fd, *tracker_fds],
        )
        await heard.next(wire.Opened)
        yield SenderRig(block, worker, heard, socket, dirty, in_flight, budget, delivered, progress)
    finally:
        await worker.end()
        context.destroy(linger=0)
        for bitmaps in (dirty, in_flight, delivered):
            bitmaps.close()
        progress.close()
        budget.close()
        os.close(hashes)
