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
    CHANNEL_END = 4  #: of a stream: RAM is complete, what follows is control's


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
