"""Which codec the next batch gets: who decides, what it is told, and the one that never changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from engine.compress.codecs import Codec

if TYPE_CHECKING:
    from engine.compress.account import Account


@dataclass(frozen=True, slots=True)
class Arm:
    """One choice; without a codec, pages go as they are.

    :ivar kind: makes the codec of `level`, for one user.
    """

    name: str
    level: int = 0
    kind: Callable[[int], Codec] | None = None
    codec: Codec | None = field(default=None, compare=False)

    def made(self) -> Arm:
        """The same with a codec of its own."""
        codec = self.kind(self.level) if self.kind else None
        return Arm(self.name, self.level, self.kind, codec)


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one batch.

    :ivar ram_bytes: non-zero pages that it carried.
    :ivar tried_bytes: of these, given to the codec.
    :ivar encoded_bytes: what they became; `tried_bytes` when that was in vain.
    :ivar wire_bytes: what the channel took for all of it.
    :ivar codec_ns: CPU time of the codec.
    :ivar total_ns: from the end of the batch before to the end of this one, with the probe between.
    :ivar thread_ns: CPU time in `total_ns` of the thread that encodes; `worker_ns` with ZeroMQ's.
    :ivar waited_ns: of `total_ns`, until the channel or the bandwidth limit let it go.
    :ivar limit: bytes per ns, this channel's part of the bandwidth limit if it waited for that, or
        0.
    :ivar fair_share: of a CPU that the host has left for each sender, 0 to 1.
    :ivar is_whole: all of its pages went as pages: none as a delta, none was left out as unchanged.
    :ivar probed_ns: of `thread_ns`, for a probe.
    """

    arm: Arm
    at_ns: int
    ram_bytes: int
    tried_bytes: int
    encoded_bytes: int
    wire_bytes: int
    codec_ns: int
    total_ns: int
    thread_ns: int
    worker_ns: int
    waited_ns: int
    limit: float
    fair_share: float
    is_whole: bool = True
    probed_ns: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """The same pages, encoded a second time and not sent.

    :ivar used: the arm that they were sent with, and `used_bytes` what they became.
    :ivar ram_bytes: that they stand for; `tried_bytes` of those that looked worth it, if any did.
    :ivar codec_ns: CPU time of the codec; `sorting_ns` of looking for them, if they had not been
        looked for.
    """

    arm: Arm
    used: Arm
    at_ns: int
    ram_bytes: int
    tried_bytes: int
    encoded_bytes: int
    used_bytes: int
    codec_ns: int
    sorting_ns: int = 0


class Policy(Protocol):
    """Decides for one channel, batch by batch.

    :ivar is_curious: it wants to hear what became of a batch, which costs a little to measure."""

    is_curious: bool

    def choose(self, now_ns: int) -> Arm:
        """What the next batch gets."""

    def probe(self, now_ns: int) -> Arm | None:
        """What to encode that batch's pages with once more, to learn; usually nothing."""

    def learn(self, done: Done) -> None: ...

    def learn_probe(self, probe: Probe) -> None: ...

    def account(self) -> Account | None:
        """What it knows and why it chose, if there is anything to say."""


class Fixed:
    """Always the same, and never curious."""

    is_curious = False

    def __init__(self, arm: Arm) -> None:
        self._arm = arm.made()

    def choose(self, _now_ns: int) -> Arm:
        return self._arm

    def probe(self, _now_ns: int) -> Arm | None:
        return None

    def learn(self, done: Done) -> None: ...

    def learn_probe(self, probe: Probe) -> None: ...

    def account(self) -> None:
        return None
