"""The page service: the source's worker process for requested pages (`python -m
engine.postcopy.pages FD`).

It answers requests in native code; here are orders and connections. It holds nothing that its
successor needs: what it took and did not deliver, the destination asks for again.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Sequence

from engine import _native, wire
from engine.errors import MemoryRefused, MigrationError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.insertion import unit_pages
from engine.postcopy.channel import connect
from engine.postcopy.statistics import PageStatistics
from engine.worker import Inbox, blocks_of, log, run_worker

WAIT_MS = 60_000


class PageServer:
    """The process's state; owns its connection, mappings and everything that was lent."""

    def __init__(self, inbox: Inbox[wire.PagesOrder]) -> None:
        self._inbox = inbox
        self._channel: socket.socket | None = None
        self._incarnation = 0
        self._service: _native.PageService | None = None

    def run(self) -> None:
        """Serve until control closes the inbox (ParentGone) or an expected failure was reported."""
        try:
            while True:
                if self._service is None or self._channel is None:
                    select.select([self._inbox], [], [])
                    self._take_orders()
                else:
                    self._serve(self._service, self._channel)
        except MigrationError as exc:
            self._inbox.report(wire.WorkerFailed(wire.cut(str(exc))))

    def _serve(self, service: _native.PageService, channel: socket.socket) -> None:
        """One stay in the native loop.

        :raise MemoryRefused: RAM cannot be read."""
        try:
            happened = _native.pages_run(
                service, channel.fileno(), self._inbox.fileno(), WAIT_MS
            )  # fmt: skip
        except OSError as exc:
            raise MemoryRefused(f"cannot read the source's RAM: {exc.strerror}") from exc
        if happened & _native.PAGES_LOST:
            self._drop_channel()
            self._report_broken(_native.pages_reason(service))
        if happened & _native.PAGES_WOKEN:
            self._take_orders()

    def _take_orders(self) -> None:
        while (taken := self._inbox.take()) is not None:
            order, fds = taken
            match order:
                case wire.PreparePages():
                    self._prepare(order, fds)
                    self._inbox.report(wire.Ready())
                    self._open(order.endpoint, order.incarnation)
                case wire.OpenFaultChannel():
                    self._open(order.endpoint, order.incarnation)

    def _prepare(self, order: wire.PreparePages, fds: Sequence[int]) -> None:
        shared = dict(zip(wire.PAGES_FDS, fds, strict=False))
        blocks = blocks_of(order.blocks, fds[len(wire.PAGES_FDS) :])
        dirty = PageBitmaps(blocks, shared["dirty"])
        self._session = order.session
        self._statistics = PageStatistics(shared["statistics"])
        self._service = _native.pages_open(
            [(block.fd, block.page_count, unit_pages(block), bitmap)
             for block, bitmap in zip(blocks, dirty, strict=True)],
            order.session, self._statistics.words,
        )  # fmt: skip

    def _open(self, endpoint: str, incarnation: int) -> None:
        """Make the connection anew."""
        assert self._service is not None
        self._drop_channel()
        self._incarnation = incarnation
        try:
            self._channel = connect(endpoint, self._session, incarnation)
        except (ConnectionError, MigrationError) as exc:
            self._report_broken(str(exc))
            return
        _native.pages_reconnect(self._service)
        self._inbox.report(wire.FaultChannelOpened(incarnation))

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _report_broken(self, reason: str) -> None:
        log.warning("the fault channel is broken: %s", reason)
        self._inbox.report(wire.FaultChannelBroken(self._incarnation, wire.cut(reason)))


def main(fd: int) -> None:
    """Serve control on the inherited descriptor `fd`."""
    PageServer(Inbox(fd, wire.PagesOrder, "orders to a page service")).run()


if __name__ == "__main__":
    sys.exit(run_worker("pages", main, is_prompt=True))
