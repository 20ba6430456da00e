"""Multifd packets (sender -> receiver): one header frame and zero or more payload frames.

The header frame is `HEADER` followed by run tables; page bytes are never interpreted. All integers
are little-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from engine.errors import WireError
from engine.memory.blocks import PAGE_SIZE
from engine.wire.messages import VERSION

MAGIC: Final = b"rfpk"
HEADER: Final = struct.Struct("<4sHBB16sHHIQIHHHHHIQQQ")
RUN: Final = struct.Struct("<II")
BATCH_PAGES_MAX: Final = 512  #: 2 MiB: one stripe of 4 KiB pages
ZERO_PAGES_MAX: Final = 16384  #: of one packet; what a sender looks at before it hears its orders
RUNS_MAX: Final = 512  #: of each run table: a whole batch in single-page runs
PAYLOAD_BYTES_MAX: Final = BATCH_PAGES_MAX * PAGE_SIZE
HEADER_BYTES_MAX: Final = HEADER.size + 2 * RUNS_MAX * RUN.size
#: A length (u16), and at least a byte of delta behind it.
DELTA_BYTES_MIN: Final = 3
PACKET_FRAMES_MAX: Final = (
    1 + 2 + RUNS_MAX
)  #: header, encoded pages, gathered pages, one frame for each direct run


class PacketKind(enum.IntEnum):
    """What a packet says."""

    OPEN = 1  #: first packet of an incarnation of a channel
    PAGES = 2
    ROUND_END = 3  #: all of the round was sent before; the counts are this channel's totals of it
    DELTAS = 4  #: what changed in pages that the destination has (XBZRLE)
    CHANNEL_END = 5  #: of a stream: RAM is complete, what follows is control's


class CodecId(enum.IntEnum):
    """How a packet's first frame is encoded. Frozen for ever once released; 0 means "not a
    packet"."""

    RAW = 1
    ZLIB = 2
    ZSTD = 3
    LZ4 = 4


_KINDS: Final = frozenset(PacketKind)
_CODECS: Final = frozenset(CodecId)


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet's header frame.

    In PAGES and DELTAS, `pages`, `zero_pages` and `payload_bytes` count this packet's; in
    ROUND_END, the channel's totals of the round. The payload of PAGES is the pages of `data_runs`
    in order: those of the first `encoded_runs` runs in one frame encoded with `codec` (those of the
    first `plane_runs` of these were made bit planes before, see `native/planes.h`), those of the
    next `gathered_runs` in one frame as they are, then one frame for each further run. The payload
    of DELTAS is one frame for the pages of `data_runs`, all of them `encoded_runs`: for each its
    length (u16) and its delta, the whole encoded with `codec`.

    :ivar channel_id: channel index + 1.
    :ivar block_id: RAM block index + 1; 1 where no block is meant.
    :ivar incarnation: counts the times that the channel was made.
    :ivar sequence: counts the incarnation's packets; OPEN is 1. A gap is a lost packet.
    :ivar round_number: pass over RAM; 1 also where no round is meant.
    :ivar data_runs: table of `RUN` pairs (first page, page count).
    :ivar plain_bytes: of the encoded frame, when it is decoded; 0: there is none.
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
    plane_runs: int = 0
    encoded_runs: int = 0
    gathered_runs: int = 0
    plain_bytes: int = 0
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
                    self.plane_runs,
                    self.encoded_runs,
                    self.gathered_runs,
                    len(self.data_runs) // RUN.size,
                    len(self.zero_runs) // RUN.size,
                    self.plain_bytes,
                    self.pages,
                    self.zero_pages,
                    self.payload_bytes,
                ),
                self.data_runs,
                self.zero_runs,
            )
        )

    @property
    def plane_pages(self) -> int:
        """The pages of the first `plane_runs` runs."""
        return sum(_page_counts(self.data_runs)[: self.plane_runs])

    def frame_sizes(self) -> list[int]:
        """Bytes of each payload frame that must follow the header."""
        counts = _page_counts(self.data_runs)
        gathered_end = self.encoded_runs + self.gathered_runs
        sizes = [count * PAGE_SIZE for count in counts[gathered_end:]]
        if self.gathered_runs:
            sizes.insert(0, sum(counts[self.encoded_runs : gathered_end]) * PAGE_SIZE)
        if self.encoded_runs:
            sizes.insert(0, self.payload_bytes - sum(sizes))
        return sizes


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
     round_number, planes, encoded, gathered, data_count, zero_count, plain_bytes, pages,
     zero_pages, payload_bytes,
     ) = HEADER.unpack_from(frame)  # fmt: skip
    if magic != MAGIC:
        raise WireError(f"packet magic {bytes(magic)!r} expected {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"packet version {version} expected {VERSION}")
    if kind not in _KINDS or codec not in _CODECS:
        raise WireError(f"packet kind {kind} with codec {codec}; neither 0 nor unknown is allowed")
    if 0 in (channel_id, block_id, incarnation, sequence, round_number):
        raise WireError("packet with a zero id, incarnation, sequence or round")
    if len(frame) != HEADER.size + (data_count + zero_count) * RUN.size:
        raise WireError(
            f"packet header of {len(frame)} bytes does not hold its {data_count} data and "
            f"{zero_count} zero runs"
        )
    is_too_much = max(data_count, zero_count) > RUNS_MAX or encoded + gathered > data_count
    if is_too_much or planes > encoded:
        raise WireError(
            f"packet with {data_count} data runs ({planes} as planes, {encoded} encoded, "
            f"{gathered} gathered), {zero_count} zero"
        )
    split = HEADER.size + data_count * RUN.size
    packet = Packet(
        PacketKind(kind), bytes(session), channel_id, incarnation, sequence, round_number, block_id,
        CodecId(codec), pages, zero_pages, payload_bytes, planes, encoded, gathered, plain_bytes,
        bytes(frame[HEADER.size : split]), bytes(frame[split:]),
    )  # fmt: skip
    _check_counts(packet)
    return packet


def _check_counts(packet: Packet) -> None:
    data_counts, zero_counts = _page_counts(packet.data_runs), _page_counts(packet.zero_runs)
    if packet.kind in (PacketKind.OPEN, PacketKind.ROUND_END):
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
    _check_sizes(packet, sum(data_counts[: packet.encoded_runs]))


def _check_sizes(packet: Packet, encoded_pages: int) -> None:
    """What is encoded shrinks, and the header promises no more than its pages can hold."""
    is_raw = packet.codec is CodecId.RAW
    encoded_bytes = packet.payload_bytes - (packet.pages - encoded_pages) * PAGE_SIZE
    if packet.kind is PacketKind.DELTAS:
        is_right = encoded_pages == packet.pages and not packet.zero_pages + packet.plane_runs
        least = encoded_pages * DELTA_BYTES_MIN
        is_right &= 0 < least <= packet.plain_bytes <= packet.pages * PAGE_SIZE
    else:
        is_right = packet.plain_bytes == encoded_pages * PAGE_SIZE
        is_right &= is_raw is not bool(encoded_pages)
    if is_raw:
        is_right &= encoded_bytes == packet.plain_bytes
    else:
        is_right &= 0 < encoded_bytes < packet.plain_bytes
    if not is_right:
        raise WireError(
            f"{packet.codec.name} packet of {packet.pages} pages in {packet.payload_bytes} bytes, "
            f"{encoded_pages} pages encoded from {packet.plain_bytes} bytes"
        )
