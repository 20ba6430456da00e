"""How fast RAM really moves with a codec, whatever the reasons are.

What is measured of its cost and of the drain may be wrong, for both change as soon as it is used.
The time is taken by the byte on the wire: content that comes in runs changes the time of a byte of
RAM, but less that of what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

MS: Final = 1_000_000
#: A pace is that of about the last so many ns, and is sure after fewer.
PACE_NS: Final = 300 * MS
SURE_NS: Final = 60 * MS
#: So many batches after a change still go at the pace of the packets that were queued before it.
SETTLING_BATCHES: Final = 4
#: What was seen of a codec holds for so long after it was left.
SEEN_NS: Final = 1_000 * MS


class Seen(NamedTuple):
    """What a byte on the wire took with a codec when it was left."""

    at_ns: int = -SEEN_NS
    ns_per_byte: float = 0.0

    def ns_with(self, left: float, now_ns: int) -> float:
        """For a byte of RAM of which this part is sent; 0 if it was not in use a moment ago."""
        return 0.0 if now_ns > self.at_ns + SEEN_NS else self.ns_per_byte * left


@dataclass(slots=True)
class Pace:
    """Of the codec in use, since it is.

    :ivar is_steady: all the time the channel was full."""

    settling: int = SETTLING_BATCHES
    is_steady: bool = False
    _total_ns: int = 0
    _wire_bytes: int = 0

    def learn(self, total_ns: int, wire_bytes: int, *, is_steady: bool) -> None:
        """A batch; the first one that found the channel otherwise than those before begins anew."""
        if self.settling:
            self.settling -= 1
            return
        if is_steady is not self.is_steady:
            self.is_steady, self._total_ns, self._wire_bytes = is_steady, 0, 0
        part = min(1.0, PACE_NS / max(1, self._total_ns + total_ns))
        self._total_ns = int(part * (self._total_ns + total_ns))
        self._wire_bytes = int(part * (self._wire_bytes + wire_bytes))

    @property
    def is_sure(self) -> bool:
        return self._total_ns >= SURE_NS

    @property
    def ns_per_byte(self) -> float:
        """On the wire; 0 while nothing is known."""
        return self._total_ns / max(1, self._wire_bytes)
