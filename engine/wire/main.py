"""Main channel (source control <-> destination control): one message of `ToDestination` or
`ToSource` in one frame (`FRAME`, then so many bytes) of a TCP or unix stream, at most
MAIN_BYTES_MAX; HELLO_BYTES_MAX until a Hello was right.
"""

from __future__ import annotations

from engine.wire.messages import BlockShape, Message


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


ToDestination = Hello | Reopen | DeviceState | Arm | Abort
ToSource = (
    Welcome
    | Refused
    | Reopened
    | RoundReceived
    | ChannelBroken
    | Armed
    | TookOver
    | TookOver
    | Failed
)
