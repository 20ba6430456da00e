"""Callbacks on every change of a migration's status, for programs that run the engine in-process
(QEMU: migration_add_notifier, migration/migration.c).
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass

from engine.control.status import Status
from engine.errors import MigrationError

log = logging.getLogger("ramferry.control")


class Side(enum.Enum):
    """Whose status it is; one process may have been both."""

    SOURCE = "source"
    DESTINATION = "destination"


class Moment(enum.Enum):
    """BEFORE anybody else hears of the change and anything is done about it, or AFTER the event
    went out and the work has begun."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Change:
    """One change of status, told twice."""

    side: Side
    previous: Status
    status: Status
    moment: Moment


Callback = Callable[[Change], None]


class Notifiers:
    """Who wants to know. Callbacks run in the event loop, one after the other, and do not block."""

    def __init__(self) -> None:
        self._callbacks: list[Callback] = []

    def add(self, callback: Callback) -> Callable[[], None]:
        """Call it from now on; what is returned takes it back (idempotent).

        A MigrationError from a callback BEFORE a source's `setup` is a veto: that migration fails
        with its text. Whatever else a callback raises is logged and changes nothing."""
        self._callbacks.append(callback)

        def remove() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return remove

    def tell(self, change: Change) -> str | None:
        """Tell everybody; return the text of a veto, if there was one."""
        veto = None
        for callback in tuple(self._callbacks):
            try:
                callback(change)
            except MigrationError as exc:
                if _may_veto(change):
                    veto = veto or str(exc)
                else:
                    log.warning("a notifier refused what cannot be refused: %s", exc)
            except Exception:
                log.exception("internal error in a notifier of %s", change)
        return veto


def _may_veto(change: Change) -> bool:
    return (change.side, change.status, change.moment) == (
        Side.SOURCE,
        Status.SETUP,
        Moment.BEFORE,
    )
