"""A look at the dirty bits within a round, where whole rounds do not bring the end nearer.

A guest that writes as much as is sent finds all of its memory dirty at the end of each round,
however short its writes are behind the sending. As soon as the rest of such a round fits in the
limit it is looked what was written meanwhile, and if both fit the guest is stopped there (QEMU does
so in every round: migration_iteration_run, pending_exact). Rounds that shrink are left alone: what
they leave is less, and so is the downtime. A look arms no page: each that is armed costs the
guest a fault, and a look that finds too much would cost it one for all that it writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from engine.control.convergence import Convergence
from engine.control.dirtysync import DirtySync
from engine.control.statistics import MigrationNumbers

PERIOD_S: Final = 0.03  #: between two looks at how much is left


class LookAhead:
    """One migration's."""

    def __init__(self, convergence: Convergence, numbers: MigrationNumbers) -> None:
        self._convergence, self._numbers = convergence, numbers
        self._fitting_bytes: int | None = None

    def take(self) -> int | None:
        """What was dirty when a round was ended because it fits; once, None: it was not."""
        found, self._fitting_bytes = self._fitting_bytes, None
        return found

    async def run(
        self,
        sync: DirtySync,
        is_sending: Callable[[], bool],
        refresh: Callable[[], None],
        end_round: Callable[[], None],
    ) -> None:
        """Until cancelled. `refresh` brings the numbers up to date."""
        while sync.is_cheap:
            await asyncio.sleep(PERIOD_S)
            if self._fitting_bytes is not None or not self._convergence.looks_ahead:
                continue
            refresh()
            rest_bytes = self._numbers.remaining_bytes
            if not (is_sending() and self._convergence.may_pause(rest_bytes)):
                continue
            dirty_bytes = await sync.peek()
            if is_sending() and self._convergence.may_pause(dirty_bytes):
                self._fitting_bytes = dirty_bytes
                end_round()
