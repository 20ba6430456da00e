"""Two postcopy services with nothing of control around them: for tests and measurements."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from engine import wire
from engine.control.pool import Worker
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import RamBlock
from engine.postcopy.statistics import FaultCount, FaultStatistics, PageStatistics
from perf.toucher import MESSAGE_BYTES_MAX, Touches, command

SESSION: Final = b"session-postcopy"
DEADLINE_S: Final = 60.0


class Heard:
    """What a worker reported, and its death."""

    def __init__(self, worker: Worker[Any]) -> None:
        self.reports: list[Any] = []
        self.lost: list[str] = []
        self._news = asyncio.Event()
        worker.listen(self._report, self._lose)

    def _report(self, report: Any) -> None:
        self.reports.append(report)
        self._news.set()

    def _lose(self, lost: Exception) -> None:
        self.lost.append(str(lost))
        self._news.set()

    def of(self, kind: type[Any]) -> list[Any]:
        return [report for report in self.reports if isinstance(report, kind)]

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def next(self, kind: type[Any], count: int = 1) -> Any:
        """The `count`-th report of a kind."""
        await self.until(lambda: self.lost or len(self.of(kind)) >= count)
        if len(self.of(kind)) < count:
            raise AssertionError((kind, self.reports, self.lost))
        return self.of(kind)[count - 1]


class Toucher:
    """The guest's process; owns it, our end of its socket, and the descriptor it lent."""

    def __init__(self, ram_fd: int, source_fd: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "perf.toucher", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(DEADLINE_S)
        socket.send_fds(ours, [b"ram"], [ram_fd, source_fd])
        address, (self.uffd,), _, _ = socket.recv_fds(ours, 16, 1)
        self.address = int.from_bytes(address, "little")

    async def ask(self, touches: Touches | None) -> dict[str, Any]:
        """Touch pages (None: count those that were marked) and wait for the answer."""

        def talk() -> dict[str, Any]:
            self._socket.send(command(touches))
            answer: dict[str, Any] = json.loads(self._socket.recv(MESSAGE_BYTES_MAX))
            return answer

        return await asyncio.to_thread(talk)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()
        os.close(self.uffd)


@dataclass
class Rig:
    """A source that stands, a destination that runs, and the services between them."""

    source: RamBlock
    block: RamBlock
    toucher: Toucher
    received: PageBitmaps
    stale: PageBitmaps
    dirty: PageBitmaps
    prefetch_pages_max: int = 0
    vcpus: int = 0
    bind: str = "tcp://127.0.0.1:*"
    incarnation: int = 0
    endpoint: str = ""
    fault_statistics: FaultStatistics = field(default_factory=FaultStatistics.create)
    page_statistics: PageStatistics = field(default_factory=PageStatistics.create)
    workers: list[Worker[Any]] = field(default_factory=list)

    def shapes(self) -> list[wire.BlockShape]:
        return [wire.BlockShape.of(self.block)]

    async def start_faults(self) -> tuple[Worker[wire.FaultsReport], Heard]:
        """A fault service that listens; `endpoint` says where."""
        worker: Worker[wire.FaultsReport] = Worker("faults", wire.FaultsReport)
        self.workers.append(worker)
        heard = Heard(worker)
        worker.order(
            wire.PrepareFaults(
                SESSION, self.bind, self.incarnation + 1, self.shapes(), [self.toucher.address],
                self.vcpus, self.prefetch_pages_max,
            ),
            [self.received.fd, self.stale.fd, self.fault_statistics.fd, self.toucher.uffd,
             self.block.fd],
        )  # fmt: skip
        self.endpoint = (await heard.next(wire.Ready)).endpoint
        return worker, heard

    async def start_pages(self) -> tuple[Worker[wire.PagesReport], Heard]:
        """A page service that connects, or says that it cannot."""
        worker: Worker[wire.PagesReport] = Worker("pages", wire.PagesReport)
        self.workers.append(worker)
        heard = Heard(worker)
        self.incarnation += 1
        worker.order(
            wire.PreparePages(SESSION, self.endpoint, self.incarnation, self.shapes()),
            [self.dirty.fd, self.page_statistics.fd, self.source.fd],
        )
        await heard.next(wire.Ready)
        return worker, heard

    async def start(self) -> tuple[Heard, Heard]:
        """Both, connected."""
        _, faults = await self.start_faults()
        _, pages = await self.start_pages()
        await pages.next(wire.FaultChannelOpened)
        return faults, pages

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for what a service does to shared memory and tells nobody; a guest goes on a moment
        before its fault is counted."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Every demand has its answer, and is counted."""
        await self.until(lambda: self.fault_statistics[FaultCount.OPEN] == 0)

    def reconnect(self, pages: Worker[wire.PagesReport]) -> None:
        """Order the channel to be made anew."""
        self.incarnation += 1
        pages.order(wire.OpenFaultChannel(self.endpoint, self.incarnation))


def memory(size: int, *, hugetlb: bool = False) -> int:
    """A memfd; the caller closes it."""
    flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if hugetlb else 0)
    fd = os.memfd_create("ramferry-postcopy", flags)
    os.ftruncate(fd, size)
    return fd


@asynccontextmanager
async def rig(source_fd: int, *, hugetlb: bool = False, **options: Any) -> AsyncIterator[Rig]:
    """A destination for this source's RAM, all of it missing, and the guest on it."""
    size = os.fstat(source_fd).st_size
    backing = 2 * 1024 * 1024 if hugetlb else 4096
    source = RamBlock("ram", size, source_fd, backing)
    with contextlib.ExitStack() as stack:
        fd = memory(size, hugetlb=hugetlb)
        stack.callback(os.close, fd)
        block = RamBlock("ram", size, fd, backing)
        toucher = Toucher(fd, source_fd)
        stack.callback(toucher.close)
        received, stale, dirty = (
            PageBitmaps.create(name, [block]) for name in ("received", "stale", "dirty")
        )
        made = Rig(source, block, toucher, received, stale, dirty, **options)
        for owned in (received, stale, dirty, made.fault_statistics, made.page_statistics):
            stack.callback(owned.close)
        try:
            yield made
        finally:
            for worker in made.workers:
                await worker.end()
