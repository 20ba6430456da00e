"""Postcopy at its destination: the guest runs, and waits where a page is missing.

The guest's userfaultfd is closed when every page is here, and in no other case: without it a
missing page would read as zero.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from engine import wire
from engine.control.host import Host
from engine.control.postcopy.faultservice import FaultService
from engine.control.postcopy.pieces import put, received_pieces
from engine.control.receivers import ReceiverGroup
from engine.errors import WireError
from engine.guest.base import Missing
from engine.postcopy.statistics import FaultCount

NS_PER_MS = 1_000_000
#: Where nobody comes: faults wait until it is known from where the source comes.
NOWHERE = "tcp://127.0.0.1:*"


def _service(
    host: Host,
    session: bytes,
    missing: Missing,
    tell: Callable[[wire.Message], None],
    *,
    is_new: bool,
) -> FaultService:
    """For this host's guest; not started."""
    return FaultService(
        host.faults, session, host.guest.blocks, missing,
        lambda endpoint: tell(wire.FaultsMoved(endpoint)),
        prefetch_pages_max=host.parameters.x_postcopy_prefetch, is_new=is_new,
    )  # fmt: skip


class PostcopyDestination:
    """One migration's; owns the fault service."""

    def __init__(self, host: Host, missing: Missing, service: FaultService) -> None:
        self._host, self._missing, self.service = host, missing, service
        self.is_armed = False  #: the guest may run at any moment: nothing is freed any more
        self._final: dict[str, Any] = {}

    @classmethod
    async def begin(
        cls,
        host: Host,
        session: bytes,
        receivers: ReceiverGroup,
        bind: str,
        tell: Callable[[wire.Message], None],
    ) -> PostcopyDestination:
        """Every round so far is placed: from now on the guest would wait for what is missing.

        :raise MigrationError: there is no userfaultfd, or no fault service; nothing is left of it.
        :raise OSError: no memory or descriptors for it; nothing is left of it.
        :raise TimeoutError: the fault service does not answer; nothing is left of it."""
        missing = await host.guest.open_missing()
        async with contextlib.AsyncExitStack() as begun:
            begun.push_async_callback(host.guest.close_missing)
            service = _service(host, session, missing, tell, is_new=True)
            begun.push_async_callback(service.end)
            await service.start(bind)
            receivers.insert(missing, service.received)
            await receivers.inserting()
            begun.pop_all()
        return cls(host, missing, service)

    @classmethod
    async def again(
        cls, host: Host, session: bytes, tell: Callable[[wire.Message], None]
    ) -> PostcopyDestination:
        """After the death of the control process that had begun it. What has data is here; what
        was zero before, and every huge page, is asked for again.

        :raise MigrationError: the guest does not lend its userfaultfd, or there is no fault
            service.
        :raise OSError: no memory or descriptors for it.
        :raise TimeoutError: the fault service does not answer."""
        missing = await host.guest.open_missing()
        service = _service(host, session, missing, tell, is_new=False)
        try:
            await service.start(NOWHERE)
        except BaseException:
            await service.end()
            raise
        postcopy = cls(host, missing, service)
        postcopy.is_armed = True
        return postcopy

    def take_stale(self, message: wire.Stale) -> None:
        """:raise WireError: not a piece of our bitmaps, or too late."""
        if self.is_armed:
            raise WireError("pages cannot become stale once the guest may run")
        put(message, self.service.stale)

    async def discard(self) -> None:
        """Free what is stale.

        :raise WireError: it is too late for that.
        :raise MigrationError: the memory cannot be freed."""
        if self.is_armed:
            raise WireError("pages cannot be freed once the guest may run")
        await self.service.discard()

    async def load_state(self, state: bytes, lost: Coroutine[Any, Any, None]) -> None:
        """Have the guest load it, which may wait for a page as long as the source is there.

        :param lost: raises when it is not.
        :raise MigrationError: the guest refuses it, or the source is lost; it is of no more use."""
        loading = asyncio.ensure_future(self._host.guest.load_state(state))
        tasks: set[asyncio.Future[None]] = {loading, asyncio.ensure_future(lost)}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            (loading if loading in done else done.pop()).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def arm(self) -> None:
        """:raise WireError: something stale is left."""
        if self.service.stale.count():
            raise WireError("the guest cannot run while stale pages are left")
        self.is_armed = True

    def fetch_rest(self) -> None:
        """Everything was pushed.

        :raise WireError: pages may still become stale."""
        if not self.is_armed:
            raise WireError("the rest was pushed before the guest may run")
        self.service.fetch_rest()

    async def resync(self, receivers: ReceiverGroup, bind: str) -> list[wire.Received]:
        """Another way to the source: receivers that insert, a fault service that listens there.

        :return: what is here, to be told to the source.
        :raise MigrationError: the fault service cannot listen there.
        :raise TimeoutError: it does not answer."""
        receivers.insert(self._missing, self.service.received)
        await self.service.listen(bind)
        return list(received_pieces(self.service.received))

    # -- statistics ------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What a destination shows of its postcopy, in QEMU's names where it has some."""
        return self._final or self._read()

    def _read(self) -> dict[str, Any]:
        counts = self.service.statistics
        idle = [0] * (self._missing.vcpus - len(counts.threads))  # as QEMU: one for each vCPU
        return {
            "blocktime": counts[FaultCount.ALL_BLOCKED_NS] // NS_PER_MS,
            "vcpu-blocktime": [one.blocked_ns // NS_PER_MS for one in counts.threads] + idle,
            "latency": counts.latency_mean_ns,
            "latency-dist": counts.latency_distribution,
            "vcpu-latency": [one.blocked_ns // max(1, one.waits) for one in counts.threads] + idle,
            "faults": counts[FaultCount.EVENTS],
            "requests": counts[FaultCount.REQUESTS],
            "demand-pages": counts[FaultCount.DEMAND_PAGES],
            "prefetch-pages": counts[FaultCount.PREFETCH_PAGES],
            "rest-pages": counts[FaultCount.REST_PAGES],
            "missing-pages": self._missing_pages(),
        }

    def _missing_pages(self) -> int:
        received = self.service.received
        return sum(block.page_count for block in received.blocks) - received.count()

    async def end(self, *, is_closing: bool) -> None:
        """Give the fault service back; `is_closing`: the guest waits for nothing any more, because
        it has every page, or will never run. Again, where it was cancelled."""
        self._final = self._final or self._read()
        await self.service.end()
        if is_closing:
            await self._host.guest.close_missing()
