"""A sender's choice of codec: what the policy decides by, measured batch by batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from engine import wire
from engine.compress.choice import policy_of
from engine.compress.policy import Arm, Done, Fixed, Policy, Probe
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.hostload import HostLoad
from engine.multifd.payload import Payload, sample_of
from engine.multifd.progress import Budget, Count, Progress

#: What a policy knows is shown so often: as often as somebody may ask.
PUBLISH_NS: Final = 100_000_000


class Clocks(NamedTuple):
    """What batches are measured by, in ns."""

    at: int
    thread: int  #: CPU time of this thread, `worker` of all
    worker: int
    stalled: int
    paced: int


class Chooser:
    """Follows one policy at a time, and tells it and the progress page what became of a batch."""

    def __init__(self, index: int, count: int, progress: Progress, budget: Budget) -> None:
        self._index, self._count = index, count
        self._progress, self._budget = progress, budget
        self._load = HostLoad(count)
        self._policy: Policy = Fixed(Arm("none"))
        self._chosen_by: Policy = self._policy  #: of the batch that is on its way
        self._before = self._clocks()  #: at the end of the batch before
        self._probed_ns = 0  #: CPU time of a probe since then
        self._published_ns = 0

    def follow(self, order: wire.Compress) -> None:
        """Another policy from the next batch on."""
        self._policy = policy_of(order, self._count, self._policy)
        self._budget.used_cpu(self._index, time.process_time_ns())  # others may measure before us
        self._publish()

    def begin_round(self) -> None:
        """What was between two rounds is nobody's cost."""
        if self._chosen_by.is_curious:
            self._before, self._probed_ns = self._clocks(), 0

    def choose(self) -> Arm:
        """The next batch's; an order may bring another policy before it is queued."""
        if self._chosen_by is not self._policy:
            self._chosen_by, self._before, self._probed_ns = self._policy, self._clocks(), 0
        return self._policy.choose(time.monotonic_ns())

    def _clocks(self) -> Clocks:
        progress = self._progress
        return Clocks(
            time.monotonic_ns(), time.thread_time_ns(), time.process_time_ns(),
            progress[Count.STALLED_NS], progress[Count.PACED_NS],
        )  # fmt: skip

    def learn(self, arm: Arm, ram_bytes: int, payloads: Sequence[Payload]) -> None:
        """What became of the batch that was chosen for, in one packet or two, now queued."""
        self._progress.chosen(arm.codec.wire_id if arm.codec else wire.CodecId.RAW, arm.level)
        if self._chosen_by.is_curious:
            self._tell(arm, ram_bytes, payloads)

    def _tell(self, arm: Arm, ram_bytes: int, payloads: Sequence[Payload]) -> None:
        """Measure the batch for the policy, and try another arm if it wants to."""
        now, before = self._clocks(), self._before
        self._before = now
        stalled_ns, paced_ns = now.stalled - before.stalled, now.paced - before.paced
        limit = self._budget.rate_bytes_per_s / self._count / 1_000_000_000
        self._budget.used_cpu(self._index, now.worker)
        self._chosen_by.learn(
            Done(
                arm,
                at_ns=now.at,
                ram_bytes=ram_bytes,
                tried_bytes=sum(len(payload.tried) for payload in payloads),
                encoded_bytes=sum(payload.encoded_bytes for payload in payloads),
                wire_bytes=sum(payload.payload_bytes for payload in payloads),
                codec_ns=sum(payload.codec_ns for payload in payloads),
                total_ns=now.at - before.at,
                thread_ns=now.thread - before.thread,
                worker_ns=now.worker - before.worker,
                waited_ns=stalled_ns + paced_ns,
                limit=limit if paced_ns > stalled_ns else 0.0,
                fair_share=self._load.fair_share(now.at, lambda: self._budget.cpu_ns),
                is_whole=_pages_in(payloads) * PAGE_SIZE == ram_bytes,
                probed_ns=self._probed_ns,
            )
        )
        self._probed_ns = 0
        if now.at >= self._published_ns + PUBLISH_NS:
            self._published_ns = now.at
            self._publish()
        fit = [each for each in payloads if (each.tried if arm.codec else each.pages)]
        if fit and (other := self._chosen_by.probe(now.at)) is not None:
            self._probe(arm, other, fit[0], ram_bytes)

    def _publish(self) -> None:
        """Show what the policy knows, or that it has nothing to say."""
        account = self._policy.account()
        self._progress.account(account.words() if account is not None else (0,))

    def _probe(self, used: Arm, other: Arm, payload: Payload, ram_bytes: int) -> None:
        """Encode the pages of a batch once more, to learn, or a sample of those that went as they
        are; nothing of it is sent."""
        assert other.codec is not None
        began_ns = time.thread_time_ns()
        tried, used_bytes = payload.tried, payload.encoded_bytes
        if used.codec is None:
            tried, part = sample_of(payload)
            ram_bytes, used_bytes = max(1, int(part * ram_bytes)), len(tried)
        sorted_ns = time.thread_time_ns()
        encoded = other.codec.encode(tried) if tried else None
        ended_ns = time.thread_time_ns()
        self._progress.add(Count.ENCODE_NS, ended_ns - began_ns)
        self._probed_ns = ended_ns - began_ns
        self._chosen_by.learn_probe(
            Probe(
                other,
                used,
                at_ns=time.monotonic_ns(),
                ram_bytes=ram_bytes,
                tried_bytes=len(tried),
                encoded_bytes=len(tried if encoded is None else encoded),
                used_bytes=used_bytes,
                codec_ns=ended_ns - sorted_ns,
                sorting_ns=sorted_ns - began_ns,
            )
        )


def _pages_in(payloads: Sequence[Payload]) -> int:
    """That go as pages."""
    return sum(each.pages for each in payloads if each.kind is wire.PacketKind.PAGES)
