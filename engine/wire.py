"""Every byte that crosses a process or a host.

Three borders, three layouts:

* **Main channel** (source control <-> destination control): one msgpack-encoded message of
  `ToDestination` or `ToSource` in one frame (`FRAME`, then so many bytes) of a TCP or unix stream,
  validated by its type, at most MAIN_BYTES_MAX; HELLO_BYTES_MAX until a Hello was right.
* **Multifd channels** (sender -> receiver): packets of one header frame and zero or more payload
  frames.
  The header frame is `HEADER` followed by run tables; page bytes are never interpreted.
* **Orders and reports** (control <-> worker, on a socket pair): one msgpack-encoded message of
  `Order` or `Report` in one datagram, at most ORDER_BYTES_MAX; descriptors travel beside `Prepare`.

All integers on multifd channels are little-endian. Zero is invalid wherever a value names
something: ids, numbers and counters start at 1, so cleared or cut memory never passes for a
message.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from engine.errors import WireError
from engine.memory.blocks import BLOCK_SIZE_MAX, PAGE_SIZE, RamBlock

VERSION: Final = 1
SESSION_BYTES: Final = 16
MAIN_BYTES_MAX: Final = 2 * 1024 * 1024  #: device state (1 MiB) and room for what is around it
STATE_BYTES_MAX: Final = 1024 * 1024
FRAME: Final = struct.Struct(">I")  #: length of the message that follows; 0 is invalid
ORDER_BYTES_MAX: Final = 64 * 1024
CHANNELS_MAX: Final = 255
#: One datagram carries no more (Linux: SCM_MAX_FD).
DESCRIPTORS_MAX: Final = 253
#: Beside the RAM blocks' descriptors in `PrepareSender`.
SENDER_FDS: Final = ("dirty", "in_flight", "candidates", "hashes", "progress", "budget")
#: RAM, and pagemap or bitmap, of every block go beside one order: 6 + 2 x 123 = 252.
BLOCKS_MAX: Final = (DESCRIPTORS_MAX - len(SENDER_FDS)) // 2
#: A block is at most 17 (map, tag) + 263 (name) + 14 (size) + 27 (backing_page_size) = 321 bytes;
#: the rest (tag, version, session, page size, channels, kind, runs, list) fits in 1 KiB.
HELLO_BYTES_MAX: Final = 1024 + BLOCKS_MAX * 321
REASON_CHARACTERS_MAX: Final = 1000

# -- multifd packets -----------------------------------------------------------------------------

MAGIC: Final = b"rfpk"
HEADER: Final = struct.Struct("<4sHBB16sHHIQIHHHHQQQ")
RUN: Final = struct.Struct("<II")
BATCH_PAGES_MAX: Final = 512  #: 2 MiB: one stripe of 4 KiB pages
ZERO_PAGES_MAX: Final = 16384  #: of one packet; what a sender looks at before it hears its orders
RUNS_MAX: Final = 512  #: of each run table: a whole batch in single-page runs
PAYLOAD_BYTES_MAX: Final = BATCH_PAGES_MAX * PAGE_SIZE
HEADER_BYTES_MAX: Final = HEADER.size + 2 * RUNS_MAX * RUN.size
PACKET_FRAMES_MAX: Final = (
    1 + 1 + RUNS_MAX
)  #: header, gathered pages, one frame for each direct run


class PacketKind(enum.IntEnum):
    """What a packet says."""

    OPEN = 1  #: first packet of an incarnation of a channel
    PAGES = 2
    ROUND_END = 3  #: all of the round was sent before; the counts are this channel's totals of it


class CodecId(enum.IntEnum):
    """Frozen for ever once released; 0 means "not a packet"."""

    RAW = 1


_KINDS: Final = frozenset(PacketKind)
_CODECS: Final = frozenset(CodecId)


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet's header frame.

    In PAGES, `pages`, `zero_pages` and `payload_bytes` count this packet's; in ROUND_END, the
    channel's totals of the round. The payload is the pages of `data_runs` in order: those of the
    first `gathered_runs` runs in one frame, then one frame for each further run.

    :ivar channel_id: channel index + 1.
    :ivar block_id: RAM block index + 1; 1 where no block is meant.
    :ivar incarnation: counts the times that the channel was made.
    :ivar sequence: counts the incarnation's packets; OPEN is 1. A gap is a lost packet.
    :ivar round_number: pass over RAM; 1 also where no round is meant.
    :ivar data_runs: table of `RUN` pairs (first page, page count).
    """

    kind: PacketKind
    session: bytes
    channel_id: int
    incarnation: int
    sequence: int
    round_number: int = 1
    block_id: int = 1
    codec: CodecId = CodecId.RAW
    pages: int = 0
    zero_pages: int = 0
    payload_bytes: int = 0
    gathered_runs: int = 0
    data_runs: bytes = b""
    zero_runs: bytes = b""

    def encode(self) -> bytes:
        """The header frame."""
        return b"".join(
            (
                HEADER.pack(
                    MAGIC,
                    VERSION,
                    self.kind,
                    self.codec,
                    self.session,
                    self.channel_id,
                    self.block_id,
                    self.incarnation,
                    self.sequence,
                    self.round_number,
                    self.gathered_runs,
                    len(self.data_runs) // RUN.size,
                    len(self.zero_runs) // RUN.size,
                    0,
                    self.pages,
                    self.zero_pages,
                    self.payload_bytes,
                ),
                self.data_runs,
                self.zero_runs,
            )
        )

    def frame_sizes(self) -> list[int]:
        """Bytes of each payload frame that must follow a raw PAGES header."""
        counts = _page_counts(self.data_runs)
        gathered = sum(counts[: self.gathered_runs]) * PAGE_SIZE
        direct = [count * PAGE_SIZE for count in counts[self.gathered_runs :]]
        return [gathered, *direct] if self.gathered_runs else direct


def _page_counts(runs: bytes) -> list[int]:
    return memoryview(runs).cast("I")[1::2].tolist() if runs else []


def decode_packet(frame: bytes | memoryview) -> Packet:
    """Check a header frame by itself: layout, ids, counts and limits.

    What needs the receiver's state is checked there: session, channel, incarnation, sequence, the
    round, the block, and that the runs lie inside it, in order, and have no page twice.

    :raise WireError: names what was wrong.
    """
    if not HEADER.size <= len(frame) <= HEADER_BYTES_MAX:
        raise WireError(
            f"packet header of {len(frame)} bytes; {HEADER.size} to {HEADER_BYTES_MAX} are allowed"
        )
    (magic, version, kind, codec, session, channel_id, block_id, incarnation, sequence,
     round_number, gathered, data_count, zero_count, reserved, pages, zero_pages, payload_bytes,
     ) = HEADER.unpack_from(frame)  # fmt: skip
    if magic != MAGIC:
        raise WireError(f"packet magic {bytes(magic)!r} expected {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"packet version {version} expected {VERSION}")
    if kind not in _KINDS or codec not in _CODECS:
        raise WireError(f"packet kind {kind} with codec {codec}; neither 0 nor unknown is allowed")
    if 0 in (channel_id, block_id, incarnation, sequence, round_number) or reserved:
        raise WireError("packet with a zero id, incarnation, sequence or round, or a reserved bit")
    if len(frame) != HEADER.size + (data_count + zero_count) * RUN.size:
        raise WireError(
            f"packet header of {len(frame)} bytes does not hold its {data_count} data and "
            f"{zero_count} zero runs"
        )
    if max(data_count, zero_count) > RUNS_MAX or gathered > data_count:
        raise WireError(
            f"packet with {data_count} data runs ({gathered} gathered), {zero_count} zero"
        )
    split = HEADER.size + data_count * RUN.size
    packet = Packet(
        PacketKind(kind), bytes(session), channel_id, incarnation, sequence, round_number, block_id,
        CodecId(codec), pages, zero_pages, payload_bytes, gathered,
        bytes(frame[HEADER.size : split]), bytes(frame[split:]),
    )  # fmt: skip
    _check_counts(packet)
    return packet


def _check_counts(packet: Packet) -> None:
    data_counts, zero_counts = _page_counts(packet.data_runs), _page_counts(packet.zero_runs)
    if packet.kind is not PacketKind.PAGES:
        if data_counts or zero_counts:
            raise WireError(f"{packet.kind.name} packet with runs")
        return
    if 0 in data_counts or 0 in zero_counts:
        raise WireError("packet with an empty run")
    if sum(data_counts) != packet.pages or sum(zero_counts) != packet.zero_pages:
        raise WireError(
            f"packet with {packet.pages} pages and {packet.zero_pages} zero pages, "
            f"but runs of {sum(data_counts)} and {sum(zero_counts)}"
        )
    if packet.pages > BATCH_PAGES_MAX:
        raise WireError(f"packet with {packet.pages} pages; at most {BATCH_PAGES_MAX} are allowed")
    if packet.zero_pages > ZERO_PAGES_MAX:
        raise WireError(
            f"packet with {packet.zero_pages} zero pages; at most {ZERO_PAGES_MAX} are allowed"
        )
    if packet.codec is CodecId.RAW and packet.payload_bytes != packet.pages * PAGE_SIZE:
        raise WireError(f"raw packet of {packet.pages} pages with {packet.payload_bytes} bytes")


# -- main channel --------------------------------------------------------------------------------


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Root of everything msgpack-encoded; the tag is the class name."""


class BlockShape(Message, frozen=True):
    """A RAM block as a peer or a worker needs to know it."""

    name: str
    size: int
    backing_page_size: int

    @classmethod
    def of(cls, block: RamBlock) -> BlockShape:
        return cls(block.name, block.size, block.backing_page_size)

    def check(self) -> None:
        """:raise WireError: a size that no block can have."""
        sizes = (PAGE_SIZE, 2 * 1024**2, 1024**3)
        if self.backing_page_size not in sizes or not 0 < self.size <= BLOCK_SIZE_MAX:
            raise WireError(f"RAM block '{self.name[:64]}' of {self.size} bytes is impossible")
        if self.size % self.backing_page_size or not 0 < len(self.name.encode()) <= 255:
            raise WireError(f"RAM block '{self.name[:64]}' is not whole pages or has a bad name")


def check_blocks(shapes: Sequence[BlockShape]) -> None:
    """Check a guest's RAM blocks, before a migration starts and when a Hello came.

    :raise WireError: too many or none, impossible ones, or two of one name."""
    if not 0 < len(shapes) <= BLOCKS_MAX:
        raise WireError(f"a guest of {len(shapes)} RAM blocks; 1 to {BLOCKS_MAX} can be migrated")
    for shape in shapes:
        shape.check()
    if len({shape.name for shape in shapes}) < len(shapes):
        raise WireError("two RAM blocks of one name")


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

# -- orders and reports --------------------------------------------------------------------------


class PrepareSender(Message, frozen=True):
    """Control -> sender. Beside it: the descriptors that `SENDER_FDS` names, then the RAM blocks'
    and,
    where the tracker has them, the pagemap or bitmap descriptor of each block."""

    index: int
    count: int
    session: bytes
    endpoint: str
    incarnation: int
    blocks: list[BlockShape]
    tracker: str
    addresses: list[int]
    detect_zero: bool
    hash_seed: int


class PrepareReceiver(Message, frozen=True):
    """Control -> receiver. Beside it: the placed bitmap, the progress page, then the RAM blocks."""

    index: int
    session: bytes
    bind: str
    incarnation: int
    blocks: list[BlockShape]


RECEIVER_FDS: Final = ("placed", "progress")


class OpenChannel(Message, frozen=True):
    """Control -> sender: drop what you send, make the channel anew."""

    endpoint: str
    incarnation: int


class Harvest(Message, frozen=True):
    """Control -> sender: move what the tracker found into the dirty bitmap."""

    number: int


class SendRound(Message, frozen=True):
    """Control -> sender: send the slice's dirty pages, then ROUND_END."""

    round_number: int


class Ready(Message, frozen=True):
    """Worker -> control: prepared; a receiver says where it listens and how it places pages."""

    endpoint: str = ""
    placement: str = ""


class Opened(Message, frozen=True):
    """Worker -> control: this incarnation is open; nothing older is used any more."""

    incarnation: int


class Harvested(Message, frozen=True):
    """Sender -> control: the answer to `Harvest`.

    :ivar dirty_pages: of the slice, now; what is in flight is not counted.
    :ivar found_pages: of the slice, found written since the last harvest, dirty before or not
        (content-hash looks at no page that is dirty, so there it is a lower bound).
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


class WorkerFailed(Message, frozen=True):
    """Worker -> control: an expected failure ends the worker."""

    reason: str


SenderOrder = PrepareSender | OpenChannel | Harvest | SendRound
ReceiverOrder = PrepareReceiver
SenderReport = Ready | Opened | Harvested | RoundSent | ChannelBroken | WorkerFailed
ReceiverReport = Ready | Opened | RoundReceived | ChannelBroken | WorkerFailed

_ENCODER: Final = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode(message: Message) -> bytes:
    """The bytes of a main-channel message, an order or a report."""
    return _ENCODER.encode(message)


class Decoder(Generic[T]):
    """Decodes the messages of one border, and names the border in its errors."""

    def __init__(self, types: Any, bytes_max: int, where: str) -> None:
        self._decoder = msgspec.msgpack.Decoder(types)
        self._bytes_max, self._where = bytes_max, where

    def decode(self, data: bytes | memoryview) -> T:
        """:raise WireError: too long, not msgpack, or not a message of this border."""
        if len(data) > self._bytes_max:
            raise WireError(
                f"{self._where}: message of {len(data)} bytes, {self._bytes_max} allowed"
            )
        try:
            message: T = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise WireError(f"{self._where}: {exc}") from exc
        return message


def cut(reason: str) -> str:
    """A reason in one line that fits a message."""
    return " ".join(reason.split())[:REASON_CHARACTERS_MAX]
