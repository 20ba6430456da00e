"""Rounds that stop to shrink: a migration that goes on for ever, unless somebody does something.

QEMU has no word for it; its users watch `remaining` by eye. A round makes progress when it leaves
clearly less dirty than the best one before it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

#: So many rounds, and so much time, without progress are a stall: short rounds alone are noise.
ROUNDS_MIN: Final = 3
TIME_MIN_NS: Final = 1_000_000_000
#: Progress is to leave at most this part of the best round's dirty bytes.
SHRINKS_TO: Final = 0.9


class OnStall(enum.Enum):
    """Parameter `x-on-stall`: what to do besides the event."""

    NOTHING = "nothing"
    THROTTLE = "throttle"  #: as with the capability `auto-converge`, from now on
    SWITCHOVER = "switchover"  #: stop the guest now, whatever `downtime-limit` says
    POSTCOPY = "postcopy"  #: as `migrate-start-postcopy`
    CANCEL = "cancel"


def describe(
    action: OnStall, dirty_bytes: int, expected_downtime_ns: int, rounds: int
) -> dict[str, object]:
    """What the event says."""
    return {
        "action": action.value,
        "dirty-bytes": dirty_bytes,
        "expected-downtime": expected_downtime_ns // 1_000_000,
        "pass": rounds,
    }


@dataclass(slots=True)
class StallDetector:
    """One migration's; plain numbers in, a fact out."""

    _best_bytes: int | None = None
    _since_ns: int = 0  #: of the last progress
    _rounds: int = 0  #: since then
    _is_stalled: bool = False

    def after_round(self, dirty_bytes: int, now_ns: int) -> bool:
        """Take what a round left dirty; True when a stall begins, once for each."""
        if self._best_bytes is None or dirty_bytes <= self._best_bytes * SHRINKS_TO:
            self._best_bytes, self._since_ns = dirty_bytes, now_ns
            self._rounds, self._is_stalled = 0, False
            return False
        self._rounds += 1
        is_long = self._rounds >= ROUNDS_MIN and now_ns - self._since_ns >= TIME_MIN_NS
        begins = is_long and not self._is_stalled
        self._is_stalled = self._is_stalled or begins
        return begins
