"""Reasons why this guest must not be migrated now, kept by whoever knows one.

A guest adaptor that cannot move something adds a reason and takes it back when it can; a user does
the same with `x-add-migration-blocker`. The newest reason comes first, as in QEMU's list
(migrate_add_blocker, migration.c).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from engine.errors import UsageError, shown

BLOCKERS_MAX: Final = 64
REASON_CHARACTERS_MAX: Final = 1000


class Blockers:
    """All blockers of one process.

    :ivar only_migratable: `--only-migratable`: none may ever be added."""

    def __init__(self, is_migrating: Callable[[], bool], *, only_migratable: bool = False) -> None:
        self._is_migrating = is_migrating
        self.only_migratable = only_migratable
        self._ids = itertools.count(1)
        self._reasons: dict[str, str] = {}  #: by id, oldest first; never more than BLOCKERS_MAX

    def add(self, reason: str) -> str:
        """Refuse migrations from now on, with this reason; return the id that takes it back.

        :raise UsageError: a migration runs, `--only-migratable`, or too many; nothing was added."""
        if not reason.strip() or len(reason) > REASON_CHARACTERS_MAX:
            raise UsageError(
                f"a blocker's reason has 1 to {REASON_CHARACTERS_MAX} characters, not only blanks"
            )
        if self.only_migratable:
            raise UsageError(f"disallowing migration blocker (--only-migratable) for: {reason}")
        if self._is_migrating():
            raise UsageError(
                f"disallowing migration blocker (migration/snapshot in progress) for: {reason}"
            )
        if len(self._reasons) >= BLOCKERS_MAX:
            raise UsageError(f"there are {BLOCKERS_MAX} migration blockers already; remove one")
        identity = f"blocker{next(self._ids)}"
        self._reasons[identity] = reason
        return identity

    def remove(self, identity: str) -> None:
        """Take one back.

        :raise UsageError: there is none of that id."""
        if self._reasons.pop(identity, None) is None:
            raise UsageError(f"Migration blocker '{shown(identity)}' not found")

    def reasons(self) -> list[str]:
        """For `blocked-reasons` of query-migrate, which shows no empty list; newest first."""
        return list(reversed(self._reasons.values()))

    def check(self) -> None:
        """:raise UsageError: a migration must not begin; the newest reason in its own words."""
        for reason in self.reasons():
            raise UsageError(reason)
