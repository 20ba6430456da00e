"""What a control process and its guest's agent say to each other, one message in one datagram.

Requests carry an id above 0, and get exactly one answer with the same id; `Event`s come unasked.
Descriptors travel beside `Start`, `Attached`, `Tracked`, `Judged` and `MissingOpened`, as their
docstrings say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from engine.guest.datagrams import DATAGRAM_BYTES_MAX
from engine.memory.pieces import TrackedPiece
from engine.wire import Decoder, Message

STATE_BYTES_MAX: Final = 32 * 1024  #: 64 vCPUs need 1.6 KiB
VCPUS_MAX: Final = 64
WORDS_MAX: Final = 508
BACK_ENDS_MAX: Final = 16

Natural = Annotated[int, msgspec.Meta(ge=0)]
ProcessId = Annotated[int, msgspec.Meta(ge=1)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]


class Options(Message, frozen=True):
    """What the vCPUs do; part of the device state, so a destination takes its source's over."""

    vcpus: Annotated[int, msgspec.Meta(ge=1, le=VCPUS_MAX)]
    pattern: Text
    rate_bytes_per_s: Natural
    words: Annotated[int, msgspec.Meta(ge=0, le=WORDS_MAX)]
    contents: Text
    seed: Natural
    timed: bool = False


class Request(Message, frozen=True):
    """Root of what control asks."""

    id: int


class Start(Request, frozen=True):
    """First request to a new agent, with the RAM's descriptor. Answer: Done, when RAM is filled.

    :ivar created_path: a file that was made for this RAM and goes with the guest, or empty.
    :ivar rundir: where the agent listens when its control process is gone.
    """

    size: int
    backing_page_size: int
    options: Options
    incoming: bool
    fill: bool
    run: bool
    created_path: Text
    rundir: Text


class Attach(Request, frozen=True):
    """First request to an orphaned agent. Answer: Attached; of a process that others have started
    ForeignStarted."""


class StartQemu(Request, frozen=True):
    """First request to a new agent, for a QEMU. Answer: ForeignStarted.

    :ivar qmp: path of its socket, for us alone.
    :ivar back_ends: processes that map its RAM, too.
    :ivar incoming: it was started with `-incoming defer`, and shall take a guest over.
    :ivar rundir: where an agent listens that must outlive its control process."""

    qmp: Text
    incoming: bool
    rundir: Text
    back_ends: Annotated[list[ProcessId], msgspec.Meta(max_length=BACK_ENDS_MAX)]


class StartProcess(Request, frozen=True):
    """First request to a new agent, for any process. Answer: ForeignStarted.

    :ivar path: of the file that it maps as its memory.
    :ivar incoming: it shall take a memory over, and stands until then.
    :ivar rundir: as of a QEMU."""

    pid: ProcessId
    path: Text
    incoming: bool
    rundir: Text


class StartHandoff(Request, frozen=True):
    """First request to a new agent, for a VMM that will connect. Answer: ForeignStarted, then.

    :ivar path: of the socket where it does.
    :ivar incoming: it shall take a guest over.
    :ivar rundir: as of a QEMU."""

    path: Text
    incoming: bool
    rundir: Text


class Pause(Request, frozen=True):
    """Answer: At."""

    for_migration: bool


class Resume(Request, frozen=True):
    """Answer: At."""

    for_migration: bool


class Sleep(Request, frozen=True):
    """The guest puts itself to sleep, or is woken. Answer: At."""

    asleep: bool


class Throttle(Request, frozen=True):
    """Answer: Throttled."""

    percent: int


class Writes(Request, frozen=True):
    """Answer: Count."""


class ReadTimes(Request, frozen=True):
    """Answer: Times."""


class Dirtying(Request, frozen=True):
    """Root of what is asked about the pages that the vCPUs dirty."""


class StartTracking(Dirtying, frozen=True):
    """Answer: Tracked. An empty name lets the agent choose."""

    wanted: Text


class StopTracking(Dirtying, frozen=True):
    """Answer: Done."""


class ClearSoftDirty(Dirtying, frozen=True):
    """Answer: Done."""


class StartCounting(Dirtying, frozen=True):
    """Answer: Done. Every page counts as clean from now on; the next StartTracking ends that."""


class CountWritten(Dirtying, frozen=True):
    """Answer: Count, the pages written since StartCounting, which ends."""


class CountDirty(Dirtying, frozen=True):
    """Answer: Done. Each vCPU counts what it dirties, or does no more."""

    on: bool


class LimitDirty(Dirtying, frozen=True):
    """Answer: Done. Without `vcpu` it is for all; 0 is no limit."""

    vcpu: Natural | None
    bytes_per_s: Natural


class ReadDirtied(Dirtying, frozen=True):
    """Answer: Dirtied."""


class SaveState(Request, frozen=True):
    """Answer: State."""


class LoadState(Request, frozen=True):
    """Answer: Done."""

    state: bytes


class LoadLongState(Request, frozen=True):
    """A state that no datagram holds; beside it a memfd of so many bytes. Answer: Done."""

    size: Natural


class Judge(Request, frozen=True):
    """Answer: Judged."""


class OpenMissing(Request, frozen=True):
    """From now on who touches a missing page waits. Answer: MissingOpened."""


class CloseMissing(Request, frozen=True):
    """What is missing reads as zero from now on. Answer: Done."""


class ListenHandover(Request, frozen=True):
    """Answer: Listening."""

    uri: Text


class Arm(Request, frozen=True):
    """Answer: Done."""

    session: bytes
    run: bool


class Disarm(Request, frozen=True):
    """Answer: Count, 1 when disarmed and 0 when the token was taken before."""


class ConnectHandover(Request, frozen=True):
    """Answer: Done."""

    endpoint: Text
    session: bytes


class CheckHandover(Request, frozen=True):
    """Answer: Done."""


class HandOver(Request, frozen=True):
    """Answer: HandedOver. `keeps_ram`: the agent then outlives control until ReleaseRam."""

    wait_ns: int
    keeps_ram: bool = False


class ReleaseRam(Request, frozen=True):
    """Who was handed over ends with its control process. Answer: Done."""


class GiveAway(Request, frozen=True):
    """The right to run goes with a stream. Answer: Done."""


class Settle(Request, frozen=True):
    """What became of a right that was given up, and nobody knew. Answer: Done."""

    taken: bool


class TakeOver(Request, frozen=True):
    """The right to run has come with a stream. Answer: Done, and `Taken` before it."""

    session: bytes
    run: bool


class CloseHandover(Request, frozen=True):
    """Answer: Done."""


class Quit(Request, frozen=True):
    """Answer: the end of the process."""


class Answer(Message, frozen=True):
    """Root of what the agent says; `id` is the request's."""

    id: int


class Done(Answer, frozen=True):
    """It is so now."""


class Failed(Answer, frozen=True):
    """It is not, and nothing was changed; `error` names the class in engine.errors."""

    error: str
    reason: str


class At(Answer, frozen=True):
    """Monotonic time since when it is so; `running` now, `stopped` by its user, `asleep` while it
    runs, and when it runs again."""

    at_ns: int
    running: bool
    stopped: bool
    asleep: bool = False


class Throttled(Answer, frozen=True):
    """It is throttled, or free again; `way` says how that is done."""

    way: Text


class Count(Answer, frozen=True):
    """A number."""

    value: int


class Dirtied(Answer, frozen=True):
    """For each vCPU: pages dirtied while it counted, and ns that it slept for its limit."""

    pages: list[int]
    slept_ns: list[int]


class Times(Answer, frozen=True):
    """How long page writes took, of a guest that times them.

    :ivar buckets: ns from, and how many took so long but less than the next bucket.
    """

    buckets: list[tuple[int, int]]
    longest_ns: int


class Attached(Answer, frozen=True):
    """Who the agent is; beside it the RAM's descriptor.

    :ivar unknown: nobody has said whether the guest runs at the destination of its last migration.
    :ivar missing: its userfaultfd is open.
    :ivar gone: it runs at the destination, and keeps its RAM for what was not sent."""

    size: int
    backing_page_size: int
    running: bool
    stopped: bool
    unknown: bool
    created_path: str
    missing: bool = False
    gone: bool = False
    asleep: bool = False


class ForeignStarted(Answer, frozen=True):
    """A process and its RAM blocks; beside it their descriptors, in this order. `stopped` and what
    follows: as `Attached`. `qmp_path`: of a QEMU's socket; else empty. `kind`: as of `Guest`, where
    `--guest` does not tell. `has_connection`: that of a VMM is behind them."""

    qmp_path: str
    pid: int
    names: list[str]
    sizes: list[int]
    page_sizes: list[int]
    running: bool
    stopped: bool
    unknown: bool
    missing: bool
    gone: bool
    kind: str = ""
    has_connection: bool = False


class TrackedBlocks(Answer, frozen=True):
    """As `Tracked`, for several blocks; beside it the pagemap of each process that is tracked.

    :ivar processes: these, as people are told of them."""

    name: str
    pieces: list[TrackedPiece]
    reason: str
    processes: list[str]


class LongState(Answer, frozen=True):
    """Device state that no datagram holds; beside it a memfd of so many bytes."""

    size: int


class Tracked(Answer, frozen=True):
    """The tracker in use; beside it the descriptor of its pagemap or bitmap, if it has one."""

    name: str
    address: int
    reason: str


class State(Answer, frozen=True):
    """Device state."""

    state: bytes


class Judged(Answer, frozen=True):
    """Every page judged; beside it a memfd with one 64-bit write counter a page."""

    wrong_pages: int
    first_wrong: int
    page_writes: int
    vcpu_writes: int


class MissingOpened(Answer, frozen=True):
    """Beside it a userfaultfd for each block. `addresses`: of the blocks; `vcpus`: as many as there
    are now, 0 if nobody can say."""

    addresses: list[int]
    vcpus: int


class Listening(Answer, frozen=True):
    """The endpoint to tell the peer."""

    endpoint: str


class HandedOver(Answer, frozen=True):
    """Value of `Handover`."""

    outcome: str


class Taken(Answer, frozen=True):
    """Unasked, id 0: the token came, this guest is the owner since `at_ns`."""

    at_ns: int
    running: bool
    asleep: bool = False


class Obeyed(Answer, frozen=True):
    """Unasked, id 0: what was taken over runs, if it shall. Only of a process that others own."""


class Untracked(Answer, frozen=True):
    """Unasked, id 0: what is written is not seen any more, and why."""

    reason: str


Event = Taken | Obeyed | Untracked

AnyRequest = (
    Start | StartQemu | StartProcess | StartHandoff | Attach | Pause | Resume | Sleep | Throttle
    | Writes | StartTracking | StopTracking | ClearSoftDirty | StartCounting | CountWritten
    | CountDirty | LimitDirty | ReadDirtied | ReadTimes | SaveState | LoadState | LoadLongState
    | Judge | OpenMissing | CloseMissing | ListenHandover | Arm | Disarm | ConnectHandover
    | CheckHandover | HandOver | ReleaseRam | GiveAway | Settle | TakeOver | CloseHandover | Quit
)  # fmt: skip
AnyAnswer = (
    Done | Failed | At | Throttled | Count | Dirtied | Times | Attached | ForeignStarted | Tracked
    | TrackedBlocks | State | LongState | Judged | MissingOpened | Listening | HandedOver | Event
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and the descriptors beside it; `spent` ones are closed once they are sent."""

    answer: Answer
    lent: Sequence[int] = ()
    spent: Sequence[int] = ()


def request_decoder() -> Decoder[AnyRequest]:
    """For the agent's end."""
    return Decoder(AnyRequest, DATAGRAM_BYTES_MAX, "guest agent")


def answer_decoder() -> Decoder[AnyAnswer]:
    """For the control process's end."""
    return Decoder(AnyAnswer, DATAGRAM_BYTES_MAX, "guest agent's control")
