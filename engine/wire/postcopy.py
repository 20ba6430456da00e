"""Postcopy: orders and reports of its two services, and the frames of the fault channel.

The fault channel is one connection, which the source's page service makes to the destination's
fault service. Each side's first frame is OPEN or OPENED; then requests go one way and answers the
other. A frame is `FAULT_FRAME` and, in DATA, page bytes; integers are little-endian. The hot loops
read and write frames in native code (native/fault_frames.h), which keeps to what is said here.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from engine.errors import WireError
from engine.memory.blocks import PAGE_SIZE
from engine.wire.messages import SESSION_BYTES, BlockShape, Message
from engine.wire.orders import Ready, WorkerFailed

# -- orders and reports ------------------------------------------------------------------------

#: Beside `PrepareFaults`: these, then each block's userfaultfd (the guest's), then the RAM blocks.
FAULTS_FDS: Final = ("received", "stale", "statistics")
#: Beside `PreparePages`: these, then the RAM blocks.
PAGES_FDS: Final = ("dirty", "statistics")


class PrepareFaults(Message, frozen=True):
    """Control -> fault service: listen for the page service, serve faults from now on.

    :ivar bind: `tcp://HOST:PORT` (`*`: any) or `ipc://PATH`.
    :ivar incarnation: the first that is taken; each later connection has a higher one.
    :ivar addresses: where each block begins in the guest.
    :ivar vcpus: threads that must wait for "all wait"; 0: unknown.
    :ivar prefetch_pages_max: asked for at once in advance; 0: no prefetch.
    """

    session: bytes
    bind: str
    incarnation: int
    blocks: list[BlockShape]
    addresses: list[int]
    vcpus: int
    prefetch_pages_max: int


class ListenFaults(Message, frozen=True):
    """Control -> fault service: listen here instead; the connection that there is goes on."""

    bind: str


class Discard(Message, frozen=True):
    """Control -> fault service: free the pages that `stale` names, whole units; they are not
    received any more, and not stale. Only before the guest runs."""


class FetchRest(Message, frozen=True):
    """Control -> fault service: the background is done; ask for what is missing, then say
    `AllReceived`."""


class PreparePages(Message, frozen=True):
    """Control -> page service. The guest stands, and its RAM does not change any more."""

    session: bytes
    endpoint: str
    incarnation: int
    blocks: list[BlockShape]


class OpenFaultChannel(Message, frozen=True):
    """Control -> page service: drop the connection, make it anew."""

    endpoint: str
    incarnation: int


class FaultChannelOpened(Message, frozen=True):
    """Service -> control: this incarnation is open; demands that were open were sent again."""

    incarnation: int


class FaultChannelBroken(Message, frozen=True):
    """Service -> control: the fault channel is lost; nothing else is."""

    incarnation: int
    reason: str


class Discarded(Message, frozen=True):
    """Fault service -> control: the answer to `Discard`.

    :ivar pages: that it freed."""

    pages: int


class AllReceived(Message, frozen=True):
    """Fault service -> control: every page is there. The guest's userfaultfd may be closed."""


FaultsOrder = PrepareFaults | ListenFaults | Discard | FetchRest
FaultsReport = (
    Ready | FaultChannelOpened | FaultChannelBroken | Discarded | AllReceived | WorkerFailed
)
PagesOrder = PreparePages | OpenFaultChannel
PagesReport = Ready | FaultChannelOpened | FaultChannelBroken | WorkerFailed

# -- frames --------------------------------------------------------------------------------------

FAULT_MAGIC: Final = b"rfpf"
FAULT_VERSION: Final = 1  #: of native/fault_frames.c, too
FAULT_FRAME: Final = struct.Struct("<4sHBB16sQQIIIHH")
FAULT_PAGES_MAX: Final = 512  #: of one request or answer: a huge page of 2 MiB
FAULT_CODEC_RAW: Final = 1
INCARNATION_MAX: Final = 2**64 - 1


class FaultKind(enum.IntEnum):
    """What a frame says. Pages of a request are answered in order, by one or more frames."""

    OPEN = 1  #: source -> destination, first: `request` is the incarnation
    OPENED = 2  #: destination -> source, first: the incarnation is the one that is used
    DEMAND = 3  #: a vCPU waits: always answered, before all else
    PREFETCH = 4  #: answered as far as nobody has sent the pages
    REST = 5  #: always answered, behind demands
    DATA = 6
    ZERO = 7  #: the pages are zero
    SKIPPED = 8  #: of a PREFETCH: others have sent them


_KINDS: Final = frozenset(FaultKind)


@dataclass(frozen=True, slots=True)
class FaultFrame:
    """One frame without its page bytes.

    :ivar sequence: counts the frames of one direction of one connection; the first is 1.
    :ivar request: rises in each request; an answer names its request's.
    :ivar block_id: RAM block index + 1; 1 where no block is meant.
    :ivar pages: 1 where none are meant.
    """

    kind: FaultKind
    session: bytes
    sequence: int
    request: int
    block_id: int = 1
    first_page: int = 0
    pages: int = 1

    @property
    def payload_bytes(self) -> int:
        return self.pages * PAGE_SIZE if self.kind is FaultKind.DATA else 0

    def encode(self) -> bytes:
        """The frame's header."""
        return FAULT_FRAME.pack(
            FAULT_MAGIC, FAULT_VERSION, self.kind, FAULT_CODEC_RAW, self.session, self.sequence,
            self.request, self.first_page, self.pages, self.payload_bytes, self.block_id, 0,
        )  # fmt: skip


def decode_fault_frame(header: bytes | memoryview) -> FaultFrame:
    """Check a header by itself. Session, sequence and what is asked are checked where they are
    known.

    :raise WireError: names what was wrong."""
    if len(header) != FAULT_FRAME.size:
        raise WireError(f"fault frame of {len(header)} bytes; {FAULT_FRAME.size} expected")
    (magic, version, kind, codec, session, sequence, request, first_page, pages, payload_bytes,
     block_id, reserved) = FAULT_FRAME.unpack(header)  # fmt: skip
    if magic != FAULT_MAGIC or version != FAULT_VERSION:
        raise WireError(f"fault frame with magic {bytes(magic)!r} and version {version}")
    if kind not in _KINDS or codec != FAULT_CODEC_RAW:
        raise WireError(f"fault frame of kind {kind} with codec {codec}")
    if 0 in (sequence, request, block_id) or reserved or len(session) != SESSION_BYTES:
        raise WireError("fault frame with a zero id or sequence, or a reserved bit")
    if not 0 < pages <= FAULT_PAGES_MAX:
        raise WireError(f"fault frame of {pages} pages; 1 to {FAULT_PAGES_MAX} are allowed")
    frame = FaultFrame(
        FaultKind(kind), bytes(session), sequence, request, block_id, first_page, pages
    )
    if payload_bytes != frame.payload_bytes:
        raise WireError(f"{frame.kind.name} frame of {pages} pages with {payload_bytes} bytes")
    return frame
