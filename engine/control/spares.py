"""Workers that wait for work: their interpreters start before anybody waits for them."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from engine.control.notifiers import Side
from engine.control.pool import (
    fault_service_pool,
    page_service_pool,
    receiver_pool,
    sender_pool,
)
from engine.control.status import ENDED, Status
from engine.errors import MigrationError

log = logging.getLogger("ramferry.control")

#: Workers that wait for work; more channels than these start their workers when they are needed.
WARM_WORKERS_MAX: Final = 16
#: In postcopy, of each kind; whoever follows a dead one needs no interpreter to start.
SPARES: Final = 1


class Spares:
    """The pools of all kinds of workers; owns who waits in them."""

    def __init__(self) -> None:
        self.senders, self.receivers = sender_pool(), receiver_pool()
        self.pages, self.faults = page_service_pool(), fault_service_pool()

    def keep(self, side: Side, status: Status, channels: int) -> None:
        """In postcopy the guest may wait for a worker that follows a dead one, and in a pause for
        all of them."""
        is_paused, has_ended = status is Status.POSTCOPY_PAUSED, status in ENDED
        count = min(channels, WARM_WORKERS_MAX) if is_paused else SPARES
        is_source = side is Side.SOURCE
        (self.senders if is_source else self.receivers).keep(0 if has_ended else count)
        (self.pages if is_source else self.faults).keep(0 if has_ended else SPARES)

    def warm(self, side: Side, channels: int, *, postcopy: bool) -> None:
        """For a migration that may begin; if workers cannot be started, they start then."""
        is_source, spares = side is Side.SOURCE, SPARES * postcopy
        pool = self.senders if is_source else self.receivers
        service = self.pages if is_source else self.faults
        try:
            pool.warm(min(channels, WARM_WORKERS_MAX) + spares)
            service.warm(2 * spares)
        except (MigrationError, OSError) as exc:
            log.warning("workers are not started ahead: %s", exc)

    async def close(self) -> None:
        """End everybody who waits. Idempotent."""
        pools = (self.senders, self.receivers, self.pages, self.faults)
        await asyncio.gather(*(pool.close() for pool in pools))
