"""Orders and reports (control <-> worker, on a socket pair): one message of `Order` or `Report` in
one datagram, at most ORDER_BYTES_MAX; descriptors travel beside `Prepare`.
"""

from __future__ import annotations

from typing import Final

from engine.memory.pieces import TrackedPiece
from engine.wire.main import ChannelBroken, RoundReceived
from engine.wire.messages import BlockShape, Message


class PrepareSender(Message, frozen=True):
    """Control -> sender. Beside it: the descriptors that `SENDER_FDS` names, then the RAM blocks'
    and, where the tracker has them, the pagemap of each tracked process or the bitmap of each
    block."""

    index: int
    count: int
    session: bytes
    endpoint: str
    incarnation: int
    blocks: list[BlockShape]
    tracker: str
    pieces: list[TrackedPiece]
    detect_zero: bool
    hash_seed: int
    may_postcopy: bool = False


class PrepareReceiver(Message, frozen=True):
    """Control -> receiver. Beside it: the placed bitmap, the progress page, then the RAM blocks."""

    index: int
    session: bytes
    bind: str
    incarnation: int
    blocks: list[BlockShape]
    may_postcopy: bool = False


RECEIVER_FDS: Final = ("placed", "progress")


class OpenChannel(Message, frozen=True):
    """Control -> sender: drop what you send, make the channel anew."""

    endpoint: str
    incarnation: int


class UseStream(Message, frozen=True):
    """Control -> worker, its first order: the channel is the descriptor beside this one."""


class EndChannel(Message, frozen=True):
    """Control -> sender of a stream: send CHANNEL_END and touch the stream no more."""


class Compress(Message, frozen=True):
    """Control -> sender: encode like this from the next batch on; before the first, nothing is
    encoded. `codec` is a value of `multifd-compression`; levels are those of the parameters.

    :ivar xbzrle_cache_bytes: of all senders together; 0: no deltas.
    """

    codec: str
    zlib_level: int = 1
    zstd_level: int = 1
    lz4_acceleration: int = 1
    cpu_percent: int = 100
    xbzrle_cache_bytes: int = 0
    elide: str = "off"  #: `x-elide-unchanged`


class Harvest(Message, frozen=True):
    """Control -> sender: move what the tracker found into the dirty bitmap.

    :ivar is_peek: the next harvest finds the same pages again, if it is cheaper so."""

    number: int
    is_peek: bool = False


class SendRound(Message, frozen=True):
    """Control -> sender: send the slice's dirty pages, then ROUND_END."""

    round_number: int


class EndRound(Message, frozen=True):
    """Control -> sender: end the round here; what was not taken stays dirty, what was goes before
    the end, without a wait for bandwidth. Without a round that goes on: nothing."""


class FollowDemands(Message, frozen=True):
    """Control -> sender, in postcopy, between two rounds: from now on send first what is near the
    newest demand, and huge pages whole. Beside it: what `DEMANDS_FDS` names, the page service's
    statistics. The RAM does not change any more; XBZRLE and elision end here."""


DEMANDS_FDS: Final = ("statistics",)


class InsertPages(Message, frozen=True):
    """Control -> receiver, between two rounds: the guest may run from now on, so pages are only
    inserted where none is. Beside it: what `INSERTION_FDS` names, then each block's userfaultfd.

    :ivar addresses: where each block begins in the guest."""

    addresses: list[int]


INSERTION_FDS: Final = ("received",)


class Ready(Message, frozen=True):
    """Worker -> control: prepared; a receiver says where it listens and how it places pages."""

    endpoint: str = ""
    placement: str = ""


class Inserting(Message, frozen=True):
    """Receiver -> control: the answer to `InsertPages`, once it has let go of its own mappings."""


class Opened(Message, frozen=True):
    """Worker -> control: this incarnation is open; nothing older is used any more."""

    incarnation: int


class Harvested(Message, frozen=True):
    """Sender -> control: the answer to `Harvest`.

    :ivar dirty_pages: of the slice, now; what is in flight is not counted.
    :ivar found_pages: of the slice, found written since the last harvest that was no peek, dirty
        before or not (content-hash looks at no page that is dirty, so there it is a lower bound).
    """

    number: int
    dirty_pages: int
    found_pages: int


class RoundSent(Message, frozen=True):
    """Sender -> control: the totals that ROUND_END says."""

    incarnation: int
    round_number: int
    packets: int
    pages: int
    zero_pages: int
    payload_bytes: int


class ChannelEnded(Message, frozen=True):
    """Worker -> control: CHANNEL_END was sent, or has come; the stream is control's again."""

    incarnation: int


class TrackerLost(Message, frozen=True):
    """Sender -> control: what process `process` wrote since the last harvest is not known, and no
    other sender would find it. WorkerFailed follows.

    :ivar gone: nothing is left of its memory; else not all of it is tracked."""

    process: int
    gone: bool


class WorkerFailed(Message, frozen=True):
    """Worker -> control: an expected failure ends the worker.

    :ivar is_guest_gone: the memory that pages were to be placed in is no more."""

    reason: str
    is_guest_gone: bool = False


SenderOrder = (
    UseStream
    | PrepareSender
    | OpenChannel
    | Compress
    | Harvest
    | SendRound
    | EndRound
    | FollowDemands
    | EndChannel
)
ReceiverOrder = UseStream | PrepareReceiver | InsertPages
SenderReport = (
    Ready | Opened | Harvested | RoundSent | ChannelBroken | ChannelEnded | TrackerLost
    | WorkerFailed
)  # fmt: skip
ReceiverReport = (
    Ready | Inserting | Opened | RoundReceived | ChannelBroken | ChannelEnded | WorkerFailed
)
