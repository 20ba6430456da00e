"""One sender and its channel, and what is expected of it; and what all of them say together."""

from __future__ import annotations

from dataclasses import dataclass

from engine import wire
from engine.control.pool import Worker
from engine.multifd.progress import Progress


@dataclass(frozen=True, slots=True)
class RoundTotals:
    """A round as both ends counted it; the same on both sides."""

    packets: int
    pages: int
    zero_pages: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class HarvestTotals:
    """What all lanes said.

    :ivar dirty_pages: still to be sent, those of lost lanes included.
    :ivar found_pages: written since the last harvest that was no peek (see `wire.Harvested`).
    """

    dirty_pages: int
    found_pages: int


@dataclass(slots=True)
class Lane:
    """One sender, its channel, and what is expected of it. `worker` is owned by the group."""

    index: int
    endpoint: str
    progress: Progress
    worker: Worker[wire.SenderReport] | None = None
    incarnation: int = 1
    is_open: bool = False  #: this incarnation; what was lost with others is dirty again
    harvest_due: int = 0  #: number of the harvest that it has not answered
    unanswered: int = 0  #: harvests that this worker was ordered and has not answered
    harvested: wire.Harvested | None = None  #: what it said after the last harvest
    harvest_incarnation: int = 0  #: open when the harvest was ordered, or 0
    round_due: int = 0  #: number of the round that is not acknowledged
    sent: wire.RoundSent | None = None
    received: wire.RoundReceived | None = None
    has_ended: bool = False  #: of a stream: its sender touches it no more
