"""The fault service: the destination's worker process for missing pages (`python -m
engine.postcopy.faults FD`).

It reads the guest's faults, asks the page service, and places what comes: all in native code. Here
are orders, connections, and the decision what to ask for in advance. It can be killed at any
instant: the received bitmap and the guest's userfaultfd are all that its successor needs.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Sequence

from engine import _native, wire
from engine.errors import MigrationError, UsageError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.insertion import discard, placing_failed, unit_pages
from engine.postcopy.channel import Lobby
from engine.postcopy.prefetch import Prefetcher
from engine.postcopy.statistics import FaultCount, FaultStatistics
from engine.worker import Inbox, blocks_of, log, run_worker

WAIT_MS = 1000  #: between two looks at strangers that say nothing


class FaultServer:
    """The process's state; owns its connections, mappings and everything that was lent."""

    def __init__(self, inbox: Inbox[wire.FaultsOrder]) -> None:
        self._inbox = inbox
        self._poller = select.epoll()
        self._poller.register(inbox, select.EPOLLIN)
        self._lobby: Lobby | None = None
        self._channel: socket.socket | None = None
        self._incarnation = 0  #: newest that was opened
        self._has_all = False  #: said so: whoever closes the channel now is right
        self._service: _native.FaultService | None = None
        self._prefetcher = Prefetcher(0)

    def run(self) -> None:
        """Serve until control closes the inbox (ParentGone) or an expected failure was reported."""
        try:
            while True:
                if self._service is None:
                    self._attend(None)
                else:
                    self._serve(self._service)
                if self._lobby is not None:
                    self._lobby.expire()
        except MigrationError as exc:
            self._inbox.report(wire.WorkerFailed(wire.cut(str(exc))))

    def _serve(self, service: _native.FaultService) -> None:
        """One stay in the native loop, and what it came back for.

        :raise MemoryRefused: a page cannot be placed.
        :raise GuestError: the guest is gone."""
        channel = -1 if self._channel is None else self._channel.fileno()
        try:
            happened = _native.faults_run(service, channel, self._poller.fileno(), WAIT_MS)
        except OSError as exc:
            raise placing_failed(exc) from exc
        if happened & _native.FAULTS_NEWS:
            self._prefetch(service)
        if happened & _native.FAULTS_LOST:
            self._lose_channel(_native.faults_reason(service))
        if happened & _native.FAULTS_COMPLETE:
            self._has_all = True
            self._inbox.report(wire.AllReceived())
        if happened & _native.FAULTS_WOKEN:
            self._attend(0)

    def _prefetch(self, service: _native.FaultService) -> None:
        for block, page in _native.faults_news(service):
            page_count = self._blocks[block].page_count
            if unit_pages(self._blocks[block]) > 1:
                continue  # each fault brings 2 MiB already
            for span in self._prefetcher.faulted(block, page):
                first, end = max(0, span.first_page), min(span.first_page + span.pages, page_count)
                if first < end:
                    _native.faults_prefetch(service, block, first, end - first)

    # -- orders ----------------------------------------------------------------------------------

    def _attend(self, wait_s: float | None) -> None:
        for fd, _ in self._poller.poll(wait_s):
            if fd == self._inbox.fileno():
                self._take_orders()
            elif self._lobby is not None and (opened := self._lobby.attend(fd)) is not None:
                self._open_channel(*opened)

    def _take_orders(self) -> None:
        while (taken := self._inbox.take()) is not None:
            order, fds = taken
            match order:
                case wire.PrepareFaults():
                    self._prepare(order, fds)
                    self._listen(order.bind)
                case wire.ListenFaults():
                    self._listen(order.bind)
                case wire.Discard():
                    self._discard()
                case wire.FetchRest():
                    assert self._service is not None
                    _native.faults_fetch_rest(self._service)

    def _prepare(self, order: wire.PrepareFaults, fds: Sequence[int]) -> None:
        """Map what was lent, and hear those whom a predecessor has left waiting."""
        count = len(order.blocks)
        shared = dict(zip(wire.FAULTS_FDS, fds, strict=False))
        rest = list(fds[len(wire.FAULTS_FDS) :])
        self._blocks = blocks_of(order.blocks, rest[count : 2 * count])
        self._received = PageBitmaps(self._blocks, shared["received"])
        self._stale = PageBitmaps(self._blocks, shared["stale"])
        self._statistics = FaultStatistics(shared["statistics"])
        self._session, self._incarnation = order.session, order.incarnation - 1
        self._prefetcher = Prefetcher(order.prefetch_pages_max)
        targets = zip(rest[:count], order.addresses, self._blocks, self._received, strict=True)
        try:
            self._service = _native.faults_open(
                [(uffd, address, block.page_count, unit_pages(block), received)
                 for uffd, address, block, received in targets],
                order.session, self._statistics.words, order.vcpus, order.prefetch_pages_max > 0,
            )  # fmt: skip
            _native.faults_wake_all(self._service)
        except OSError as exc:
            raise placing_failed(exc) from exc

    def _listen(self, bind: str) -> None:
        if self._lobby is not None:
            self._lobby.close()
        self._lobby = Lobby(bind, self._session, self._poller)
        self._inbox.report(wire.Ready(self._lobby.endpoint, "UFFDIO_COPY"))

    def _discard(self) -> None:
        """:raise UsageError: the guest has touched RAM already: punching would lose its writes."""
        if self._statistics[FaultCount.EVENTS]:
            raise UsageError("pages cannot be discarded once the guest runs")
        self._inbox.report(wire.Discarded(discard(self._blocks, self._received, self._stale)))

    # -- the channel -----------------------------------------------------------------------------

    def _open_channel(self, connection: socket.socket, incarnation: int) -> None:
        """Use the newest incarnation; what is open is asked for again over it."""
        assert self._service is not None
        if incarnation <= self._incarnation:
            connection.close()
            return
        frame = wire.FaultFrame(wire.FaultKind.OPENED, self._session, 1, incarnation)
        try:
            connection.send(frame.encode())
        except OSError:
            connection.close()
            return
        if self._channel is not None:
            self._channel.close()
        self._channel, self._incarnation = connection, incarnation
        _native.faults_reconnect(self._service)
        self._inbox.report(wire.FaultChannelOpened(incarnation))

    def _lose_channel(self, reason: str) -> None:
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        if not self._has_all:
            log.warning("the fault channel is broken: %s", reason)
        self._inbox.report(wire.FaultChannelBroken(self._incarnation, wire.cut(reason)))


def main(fd: int) -> None:
    """Serve control on the inherited descriptor `fd`."""
    FaultServer(Inbox(fd, wire.FaultsOrder, "orders to a fault service")).run()


if __name__ == "__main__":
    sys.exit(run_worker("faults", main, is_prompt=True))
