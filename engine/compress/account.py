"""What `auto` knows and why it chose, as the few words that a sender shows to control."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple

from engine.compress.policy import Arm

RATE_MAX: Final = 2**62


class Why(enum.IntEnum):
    """What the last change was for; 0 is no change yet."""

    START = 0
    STRONGER = 1
    WEAKER = 2
    DISPROVED = 3

    @property
    def text(self) -> str:
        """For people."""
        return _TEXTS[self]


_TEXTS: Final = {
    Why.START: "nothing was better so far",
    Why.STRONGER: "the channel is slower than the encoder",
    Why.WEAKER: "encoding took longer than sending",
    Why.DISPROVED: "less RAM was moved with it",
}


class Estimate(NamedTuple):
    """Of one arm.

    :ivar times: that it was seen; the rest says nothing while this is 0.
    :ivar codec_ps: CPU time of the codec, picoseconds for a byte that is worth trying.
    :ivar left_ppm: of such a byte, on the wire.
    :ivar ram_rate: bytes of RAM per second that this channel would move with it.
    """

    times: int = 0
    codec_ps: int = 0
    left_ppm: int = 0
    ram_rate: int = 0


class Account(NamedTuple):
    """At one moment. Parts are in 1/1000.

    :ivar current: index of the arm in use, `before` of the one that it took the place of.
    :ivar changed_ns: when, on the monotonic clock; 0: never.
    :ivar drain_rate: bytes per second that the channel takes; 0: it was never full.
    :ivar cpu_share: of a CPU that the host has for this sender.
    :ivar cpu_budget: of a CPU that encoding may take.
    :ivar worth: part of the RAM that looks worth trying.
    """

    current: int
    before: int
    changes: int
    changed_ns: int
    why: Why
    drain_rate: int
    is_full: bool
    cpu_share: int
    cpu_budget: int
    worth: int
    estimates: tuple[Estimate, ...]

    def words(self) -> list[int]:
        """All of it, as words that are never negative."""
        rest = [word for estimate in self.estimates for word in estimate]
        return [len(self.estimates), *map(int, self[:-1]), *rest]


_FIXED: Final = len(Account._fields)  #: words before the estimates


def words_count(ladder: Sequence[Arm]) -> int:
    """How many words an account of these arms has."""
    return _FIXED + len(ladder) * len(Estimate._fields)


def account_of(words: Sequence[int], ladder: Sequence[Arm]) -> Account | None:
    """What `words` say; nothing if nobody wrote them, or if they are being written."""
    count, current, before, changes, changed_ns, why, *rest = words[:_FIXED]
    if count != len(ladder) or max(current, before) >= count or why not in list(Why):
        return None
    size = len(Estimate._fields)
    estimates = [
        Estimate(*words[at : at + size]) for at in range(_FIXED, words_count(ladder), size)
    ]
    drain_rate, is_full, cpu_share, cpu_budget, worth = rest
    return Account(
        current, before, changes, changed_ns, Why(why), drain_rate, bool(is_full), cpu_share,
        cpu_budget, worth, tuple(estimates),
    )  # fmt: skip
