"""Postcopy at its source: what the machine's effects do from `migrate-start-postcopy` on.

Before the guest stands, the destination learns what it has of old pages and frees them; what became
dirty since then is told in the pause, which is short therefore. Then senders push what is dirty,
the page service answers demands, and both take a page's dirty bit before they send it. A pause of
the migration gives all of that back: RAM and session are enough to go on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final, Protocol

from engine import wire
from engine.control import machine as machines
from engine.control.agreement import Agreement
from engine.control.compression import channels_of, codecs_of, compression_of
from engine.control.conversation import Conversation
from engine.control.dirtysync import DirtySync
from engine.control.driver import Work
from engine.control.encryption import check_encryption
from engine.control.framestream import ConnectionLost
from engine.control.host import Host
from engine.control.notifiers import Side
from engine.control.postcopy.pageservice import PageService
from engine.control.postcopy.pieces import Announced, Collected
from engine.control.senders import SenderGroup
from engine.control.statistics import MigrationNumbers
from engine.control.status import RunState
from engine.control.watch import WATCH_S, Watch
from engine.errors import MigrationError, PeerRefused
from engine.guest.base import TrackerName, Tracking
from engine.memory.blocks import PAGE_SIZE
from engine.memory.insertion import widen
from engine.postcopy.statistics import PageCount, PageStatistics

log = logging.getLogger("ramferry.source")

#: Between the last acknowledged page and the destination's last word, with nothing asked for.
SILENCE_NS: Final = 30_000_000_000
#: What may be so where nobody waits for us: its last word was lost with the connection.
OR_COMPLETE: Final = "if it says 'completed' there, it has every page, and this side can quit"

#: Dirty pages are collected so often before the guest stands, or until so few were found: what is
#: left is collected and freed in the pause. A collection that finds next to nothing in 4 GiB takes
#: about 4 ms, one that finds 60 MiB took 64 ms.
CATCH_UPS_MAX: Final = 4
LEFT_PAGES_FEW: Final = 512


class Migration(Protocol):
    """What `PostcopySource` uses of the outgoing migration that it belongs to."""

    @property
    def host(self) -> Host: ...
    @property
    def session(self) -> bytes: ...

    is_outcome_unknown: bool  #: nobody has said who has the right to run

    @property
    def machine(self) -> machines.Outgoing: ...
    @property
    def numbers(self) -> MigrationNumbers: ...
    @property
    def senders(self) -> SenderGroup: ...
    @property
    def sync(self) -> DirtySync: ...
    @property
    def conversation(self) -> Conversation:
        """:raise MigrationError: it is a stream, which has no room for postcopy."""
        ...

    def handle(self, event: machines.Event) -> None: ...
    @property
    def round_number(self) -> int:
        """Newest that was ordered."""
        ...

    def next_round(self) -> int:
        """Number of the round that comes."""
        ...

    def use(self, agreement: Agreement) -> SenderGroup:
        """Make senders for these channels; they are the migration's."""
        ...

    def refresh(self) -> None:
        """Bring the numbers up to this moment."""
        ...

    def waited_until(self, now_ns: int) -> None:
        """The guest has stood for `migrate-continue` until now."""
        ...

    def begin_pass(self) -> None:
        """A sync of the dirty bitmap, as MIGRATION_PASS counts them."""
        ...

    async def arm(self) -> None:
        """Send the device state, and have the destination promise all."""
        ...

    async def resume_guest(self) -> None:
        """The pause was in vain."""
        ...

    async def stop_serving(self) -> None:
        """Give senders and connections back; RAM, guest and session stay."""
        ...


class PostcopySource:
    """One migration's; owns the page service and its statistics."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._announced = Announced(migration.host.guest.blocks)
        self.statistics = PageStatistics.create()
        self._service = PageService(
            migration.host.pages,
            migration.session,
            migration.host.guest.blocks,
            self.statistics,
            lambda reason: migration.handle(machines.Failure(reason)),
        )

    @property
    def service_pid(self) -> int | None:
        """Of the page service, if it is at work."""
        return self._service.pid

    @property
    def work(self) -> dict[machines.Effect, Work]:
        """How each effect of postcopy is carried out."""
        return {
            machines.Effect.PREPARE_POSTCOPY: self._prepare,
            machines.Effect.RESUME_AND_PREPARE: self._resume_and_prepare,
            machines.Effect.ARM_POSTCOPY: self._arm,
            machines.Effect.HARVEST_AND_ARM_POSTCOPY: self._harvest_and_arm,
            machines.Effect.PUSH: self._push,
            machines.Effect.SUSPEND: self._suspend,
            machines.Effect.RECONNECT: self._reconnect,
            machines.Effect.RESYNC: self._resync,
        }

    # -- the switch ------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """All that can be done while the guest runs."""
        migration = self._migration
        conversation, senders = migration.conversation, migration.senders
        dirty_bytes = await migration.sync.collect(throttles=False)
        endpoint = await conversation.begin_postcopy(migration.round_number)
        await self._discard(dirty_bytes)
        await self._serve(endpoint, senders)
        await self._catch_up(dirty_bytes)
        migration.handle(machines.PostcopyPrepared())

    async def _catch_up(self, dirty_bytes: int) -> None:
        """What the guest has dirtied meanwhile, as long as each look finds much less than the one
        before.

        :param dirty_bytes: known so far."""
        found_before: int | None = None
        for _ in range(CATCH_UPS_MAX):
            now_bytes = await self._migration.sync.collect(throttles=False)
            found, dirty_bytes = now_bytes - dirty_bytes, now_bytes
            await self._discard(found)
            if found <= LEFT_PAGES_FEW * PAGE_SIZE:
                return
            if found_before is not None and found > found_before // 2:
                return
            found_before = found

    async def _serve(self, endpoint: str, senders: SenderGroup) -> None:
        """Have a page service answer demands."""
        conversation = self._migration.conversation
        conversation.on_faults_moved = self._service.move
        await self._service.start(endpoint, senders.dirty)

    async def _resume_and_prepare(self) -> None:
        await self._migration.resume_guest()
        await self._prepare()

    async def _discard(self, dirty_bytes: int) -> None:
        """Have the destination free what is dirty here, whole huge pages."""
        migration = self._migration
        dirty = migration.senders.dirty
        widen(migration.host.guest.blocks, dirty)
        await migration.conversation.say_stale(self._announced.news(dirty))
        await migration.conversation.discard_stale(dirty_bytes)

    async def _harvest_and_arm(self) -> None:
        """After `pre-switchover`: who else writes this RAM may have done so meanwhile."""
        migration, began_ns = self._migration, time.monotonic_ns()
        migration.waited_until(began_ns)
        await migration.sync.collect(throttles=False)
        migration.numbers.phases.harvest += time.monotonic_ns() - began_ns
        await self._arm()

    async def _arm(self) -> None:
        """The guest stands, and its last dirty pages are known."""
        migration, began_ns = self._migration, time.monotonic_ns()
        phases = migration.numbers.phases
        migration.begin_pass()
        await self._discard(migration.senders.dirty.count() * PAGE_SIZE)
        discarded_ns = time.monotonic_ns()
        phases.discard = discarded_ns - began_ns
        if not self._service.is_open:
            raise MigrationError("the fault channel was lost before the guest could use it")
        migration.senders.follow(self.statistics.fd)
        await migration.arm()
        phases.acknowledge = time.monotonic_ns() - discarded_ns

    # -- the rest --------------------------------------------------------------------------------

    async def _push(self) -> None:
        """Send what is dirty, then see to it that the destination gets what it still asks for; its
        word that it has all ends this.

        :raise MigrationError: the connections are lost; what was under way is in doubt."""
        migration = self._migration
        if migration.machine.error is not None:
            raise MigrationError(migration.machine.error)  # while the guest was handed over
        migration.numbers.postcopy.begin(time.monotonic_ns(), migration.numbers)
        self.bandwidth_changed()
        migration.conversation.on_complete = self._complete
        late = asyncio.ensure_future(self._hear_late())
        try:
            await migration.senders.send_round(migration.next_round())
            await migration.conversation.push_ended()
            await self._watch()
        finally:
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)

    async def _hear_late(self) -> None:
        """Nobody knew what became of the token; the destination's word may still come."""
        if self._migration.is_outcome_unknown:
            await self._migration.conversation.taken()
            await self.taken_for_sure()

    async def _watch(self) -> None:
        """:raise MigrationError: the destination is silent, and lacks pages."""
        watch = Watch()
        while True:
            await asyncio.sleep(WATCH_S)
            moved = self.statistics[PageCount.BYTES_SENT] + self._service.incarnation
            if watch.silent_ns(moved, None) > SILENCE_NS:
                raise MigrationError("the destination asks for nothing, and has not all pages")

    def _complete(self) -> None:
        """The destination has every page."""
        self._migration.refresh()
        self._migration.handle(machines.DestinationComplete())
        self._migration.host.set_run_state(RunState.POSTMIGRATE)

    def count_up(self) -> None:
        """Refresh the numbers from the page service's counters."""
        counts, numbers = self.statistics, self._migration.numbers.postcopy
        numbers.requests = counts[PageCount.REQUESTS]
        numbers.fault_bytes = counts[PageCount.BYTES_SENT]
        numbers.demand_pages = counts[PageCount.DEMAND_PAGES]
        numbers.prefetch_pages = counts[PageCount.PREFETCH_PAGES]
        numbers.rest_pages = counts[PageCount.REST_PAGES]

    def bandwidth_changed(self) -> None:
        """`max-postcopy-bandwidth` holds from now on; demands are never delayed."""
        settings = self._migration.host.parameters
        self._migration.senders.budget.rate_bytes_per_s = settings.max_postcopy_bandwidth

    # -- when connections are lost ---------------------------------------------------------------

    async def _suspend(self) -> None:
        await self._service.stop()
        await self._migration.stop_serving()
        self._migration.handle(machines.Suspended())

    async def _reconnect(self) -> None:
        try:
            await self._migration.conversation.reconnect()
        except PeerRefused as exc:
            log.warning("%s; %s", exc, OR_COMPLETE)
            raise
        self._migration.handle(machines.Reconnected())

    async def _resync(self) -> None:
        """What the destination has not is dirty. What never had data here it asks for."""
        migration, began_ns = self._migration, time.monotonic_ns()
        host, conversation = migration.host, migration.conversation
        blocks = host.guest.blocks
        check_encryption(host)
        question = wire.Resume(
            wire.VERSION,
            migration.session,
            [wire.BlockShape.of(block) for block in blocks],
            channels_of(host),
            codecs_of(compression_of(host)),
        )
        received = Collected(blocks)
        try:
            found = await conversation.resync(question, received.take)
        except ConnectionLost as exc:
            raise PeerRefused(f"{exc}; {OR_COMPLETE}") from exc
        if found is None:
            self._complete()
            return
        agreement, faults = found
        senders = migration.use(agreement)
        stands = Tracking(TrackerName.NONE, "postcopy")
        await senders.start(stands, detect_zero=host.parameters.zero_page_detection != "none")
        received.take_away_from(senders.dirty)
        widen(blocks, senders.dirty)
        senders.follow(self.statistics.fd)
        await self._serve(faults, senders)
        await self.taken_for_sure()
        conversation.on_complete = self._complete
        await conversation.go_on()
        left = senders.dirty.count()
        took_ms = (time.monotonic_ns() - began_ns) // 1_000_000
        log.info("postcopy goes on after %d ms: %d pages are missing", took_ms, left)
        migration.handle(machines.Resynced())

    async def taken_for_sure(self) -> None:
        """The destination goes on with its postcopy, or has said so: it has the right to run."""
        migration, host = self._migration, self._migration.host
        if migration.is_outcome_unknown or host.inherits_unknown:
            host.postcopy_begins(Side.SOURCE, migration.session)
            if host.guest.is_alive:
                await host.guest.settle(taken=True)
                if host.run_state is not RunState.POSTMIGRATE:
                    host.set_run_state(RunState.FINISH_MIGRATE)
        migration.is_outcome_unknown = False

    async def end(self) -> None:
        """Give everything back. Idempotent."""
        await self._service.stop()
        self.statistics.close()
