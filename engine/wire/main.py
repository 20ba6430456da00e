"""Main channel (source control <-> destination control): one message of `ToDestination` or
`ToSource` in one frame (`FRAME`, then so many bytes) of a TCP or unix stream, at most
MAIN_BYTES_MAX; HELLO_BYTES_MAX until a Hello was right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine.errors import WireError
from engine.wire.messages import BlockShape, Message

#: Of a piece of a bitmap: 2 GiB of RAM.
BITS_BYTES_MAX: Final = 64 * 1024


class Hello(Message, frozen=True):
    """Source -> destination, first message: who I am and what will come."""

    version: int
    session: bytes
    page_size: int
    blocks: list[BlockShape]
    channels: int
    guest_kind: str
    runs: bool  #: the guest was running: start it after the handover
    uuid: str = ""  #: the source's, with the capability `validate-uuid`
    codecs: tuple[int, ...] = ()  #: of `CodecId`: what the pages may be encoded with


class Reopen(Message, frozen=True):
    """Source -> destination: channel `index` is made anew; tell me where."""

    index: int
    incarnation: int


class DeviceState(Message, frozen=True):
    """Source -> destination: the paused guest's device state."""

    state: bytes


class Arm(Message, frozen=True):
    """Source -> destination: `rounds` rounds were acknowledged; may the token come?"""

    rounds: int
    runs: bool  #: start the guest when the token comes


class Abort(Message, frozen=True):
    """Source -> destination: this migration is over, the guest stays here."""

    reason: str


class Bits(Message, frozen=True):
    """Root of what carries a piece of a page bitmap, little-endian, from `first_page` on."""

    block: int  #: index of the RAM block
    first_page: int
    bits: bytes

    def check(self, page_counts: Sequence[int]) -> None:
        """:raise WireError: not a piece of the bitmaps of blocks with so many pages."""
        if not 0 <= self.block < len(page_counts):
            raise WireError(f"a bitmap of RAM block {self.block} of {len(page_counts)}")
        page_count, byte_count = page_counts[self.block], len(self.bits)
        is_whole = not (self.first_page % 64 or byte_count % 8)
        is_within = self.first_page >= 0 and self.first_page + 8 * byte_count < page_count + 64
        if not (is_whole and is_within and 0 < byte_count <= BITS_BYTES_MAX):
            raise WireError(
                f"{byte_count} bytes of a bitmap at page {self.first_page} of {page_count}"
            )
        if int.from_bytes(self.bits, "little") >> (page_count - self.first_page):
            raise WireError(f"a bitmap with bits for pages beyond {page_count}")


class BeginPostcopy(Message, frozen=True):
    """Source -> destination: `rounds` rounds were acknowledged, and none follows while the guest is
    here. Answer: `PostcopyReady`."""

    rounds: int


class Stale(Bits, frozen=True):
    """Source -> destination: what you have of these pages is old."""


class DiscardStale(Message, frozen=True):
    """Source -> destination: free what was said to be stale. Answer: `StaleDiscarded`."""


class Pushed(Message, frozen=True):
    """Source -> destination: all that was dirty has been sent and acknowledged; ask for what is
    still missing. Answer: `HasAll`."""


class Resume(Message, frozen=True):
    """Source -> destination, first message to a paused postcopy. Answer: `Received`, then
    `Resumed`."""

    version: int
    session: bytes
    blocks: list[BlockShape]
    channels: int
    codecs: tuple[int, ...]


class GoOn(Message, frozen=True):
    """Source -> destination: every channel is open again. Answer: `GoesOn`."""


class Welcome(Message, frozen=True):
    """Destination -> source: agreed; where the channels and the handover listen."""

    version: int
    session: bytes
    endpoints: list[str]
    handover: str
    placement: str
    codecs: tuple[int, ...] = ()  #: of `CodecId`: all that can be decoded here


class Refused(Message, frozen=True):
    """Destination -> source: no, and why."""

    reason: str


class Reopened(Message, frozen=True):
    """Destination -> source: channel `index` waits for this incarnation at `endpoint`."""

    index: int
    incarnation: int
    endpoint: str


class RoundReceived(Message, frozen=True):
    """Destination -> source: the channel's part of the round is placed; its totals."""

    index: int
    incarnation: int
    round_number: int
    packets: int
    pages: int
    zero_pages: int
    payload_bytes: int


class ChannelBroken(Message, frozen=True):
    """Destination -> source: this incarnation of the channel is unusable."""

    index: int
    incarnation: int
    reason: str


class Armed(Message, frozen=True):
    """Destination -> source: every promise about memory and devices is kept; send the token."""


class TookOver(Message, frozen=True):
    """Destination -> source: the guest has taken the token. It told the source's guest, too."""


class Failed(Message, frozen=True):
    """Destination -> source: the migration failed here; the guest has not taken the token and never
    will."""

    reason: str


class PostcopyReady(Message, frozen=True):
    """Destination -> source: the guest will wait for what is missing; `faults` is where the fault
    service listens."""

    faults: str


class StaleDiscarded(Message, frozen=True):
    """Destination -> source: nothing that is stale is left."""


class FaultsMoved(Message, frozen=True):
    """Destination -> source: the fault service listens here now."""

    faults: str


class Received(Bits, frozen=True):
    """Destination -> source: these pages are here."""


class Resumed(Message, frozen=True):
    """Destination -> source: all that is here was said; these are the ways for the rest."""

    version: int
    session: bytes
    endpoints: list[str]
    faults: str
    codecs: tuple[int, ...]


class GoesOn(Message, frozen=True):
    """Destination -> source: pages are awaited."""


class HasAll(Message, frozen=True):
    """Destination -> source: every page is here, and nothing more is needed from you."""


FirstWord = Hello | Resume
ToDestination = (
    Hello
    | Reopen
    | DeviceState
    | Arm
    | Abort
    | BeginPostcopy
    | Stale
    | DiscardStale
    | Pushed
    | Resume
    | GoOn
)
ToSource = (
    Welcome
    | Refused
    | Reopened
    | RoundReceived
    | ChannelBroken
    | Armed
    | TookOver
    | Failed
    | PostcopyReady
    | StaleDiscarded
    | FaultsMoved
    | Received
    | Resumed
    | GoesOn
    | HasAll
)
