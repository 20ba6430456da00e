"""Noticing that nothing moves any more."""

from __future__ import annotations

import time
from typing import Final

WATCH_S: Final = 1.0


class Watch:
    """How long something has not moved, looked at once in WATCH_S."""

    def __init__(self) -> None:
        self._looked_ns = self._moved_ns = time.monotonic_ns()
        self._moved: int | None = None
        self._busy: int | None = None

    def is_due(self) -> bool:
        return time.monotonic_ns() - self._looked_ns >= int(WATCH_S * 1e9)

    def silent_ns(self, moved: int, busy: int | None) -> int:
        """Since `moved` was another number, or `busy` one number at one look and another at the
        next."""
        self._looked_ns = time.monotonic_ns()
        if moved != self._moved or (None not in (busy, self._busy) and busy != self._busy):
            self._moved_ns = self._looked_ns
        self._moved, self._busy = moved, busy
        return self._looked_ns - self._moved_ns
