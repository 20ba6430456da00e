"""`auto`: the codec that moves the most RAM per second, by cost, gain, the drain of the channel and
the CPUs that are left.

The worker encodes while ZeroMQ's thread sends: so a byte of RAM takes the longest of preparing it,
sending what is left of it, and its CPU time at the share of a CPU that the worker gets. Cost and
gain are those of the pages that looked worth it. A probe encodes the pages of one batch a second
time, so that two codecs are compared on the same pages; of a batch that went as it is, a sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Final, NamedTuple

from engine.compress.account import RATE_MAX, Account, Estimate, Why
from engine.compress.codecs import Lz4, Zstd
from engine.compress.drain import WINDOW_NS, Drain
from engine.compress.pace import Pace, Seen
from engine.compress.policy import Arm, Done, Probe

MS: Final = 1_000_000
#: Weakest first; each takes several times longer than the one before, and leaves less.
LADDER: Final = (
    Arm("none"),
    Arm("lz4", 1, Lz4),
    Arm("zstd", 1, Zstd),
    Arm("zstd", 3, Zstd),
    Arm("zstd", 7, Zstd),
)
#: What is known of a codec that was seen so often is looked at again after so long.
AGE_MAX_NS: Final = 500 * MS
SURE_TIMES: Final = 4
#: A sample without a page that is worth trying says nothing of the next ones.
VAIN_NS: Final = 10 * MS
#: Probes take at most this part of the time, and so much at once: of each codec one batch.
PROBE_SHARE: Final = 0.01
PROBES_AT_ONCE_NS: Final = 60 * MS
#: So much of the CPU budget may be saved up.
CPU_AT_ONCE_NS: Final = 50 * MS
#: Another codec must promise so much more, or noise alone would change it all the time.
GAIN_MIN: Final = 1.03
#: After so long a stronger codec is judged: by what the channel drains of it, or if it is not full
#: by the RAM that was moved.
TRIAL_NS: Final = 200 * MS
#: A codec that promises so much is taken before the pace of the weaker one is known.
GAIN_CLEAR: Final = 1.1
#: One that was slower is avoided for so long, and each time twice as long.
AVOIDED_NS: Final = 1_000 * MS
DOUBLINGS_MAX: Final = 4
#: What is measured of a byte may be nothing, or less, by the clocks' own steps.
MADE_NS_MIN: Final = 1e-3
#: A trial is compared with the most that was drained in so long before it: a stall proves nothing.
PEAK_NS: Final = 300 * MS
#: Of what a batch of so many bytes tells, this part is believed; of a smaller one less.
LEARNING: Final = 0.25
LEARNING_BYTES: Final = 1024 * 1024
#: Of what a probe tells: there are few.
PROBE_LEARNING: Final = 0.5
#: So many times less of what it tells of the CPU that it got: a slice of the scheduler is longer
#: than a batch, so that is now all of a CPU and now a third.
SLOWER: Final = 4


@dataclass(slots=True)
class Knowledge:
    """What one codec does with a byte that is worth trying; nothing before it was tried."""

    codec_ns: float = 0.0
    left: float = 1.0
    times: int = 0
    seen_ns: int = 0
    vain_until_ns: int = 0  #: a sample had nothing worth trying
    disproved: int = 0  #: so often it was slower than the weaker one before
    avoided_until_ns: int = 0

    def learn(self, codec_ns: float, left: float, weight: float, now_ns: int) -> None:
        self.times += 1
        weight = max(weight, 1 / self.times)
        self.codec_ns += weight * (codec_ns - self.codec_ns)
        self.left += weight * (left - self.left)
        self.seen_ns, self.vain_until_ns = now_ns, 0

    def is_old(self, now_ns: int) -> bool:
        """One batch may be unlike the others, so the first ones are soon followed by more."""
        old_ns = self.seen_ns + AGE_MAX_NS * min(1.0, self.times / SURE_TIMES)
        return now_ns >= max(old_ns, self.vain_until_ns)


@dataclass(slots=True)
class Allowance:
    """CPU time: `share` of the time that passes, and at most `most_ns` at once."""

    share: float
    most_ns: float
    _left_ns: float = field(init=False)
    _earned_ns: int = 0  #: up to this time

    def __post_init__(self) -> None:
        self._left_ns = self.most_ns

    def is_left(self, now_ns: int) -> bool:
        earned_ns = self.share * (now_ns - (self._earned_ns or now_ns))
        self._left_ns = min(self.most_ns, self._left_ns + earned_ns)
        self._earned_ns = now_ns
        return self._left_ns > 0

    def spend(self, spent_ns: int) -> None:
        self._left_ns -= spent_ns


@dataclass(slots=True)
class Preparing:
    """CPU time for a byte of RAM beside its codec. For a codec pages are sorted and copied, which
    takes longer than LZ4 itself."""

    thread_ns: float = 0.0
    worker_ns: float = 0.0

    def learn(self, thread_ns: float, worker_ns: float, weight: float) -> None:
        self.thread_ns += weight * (thread_ns - self.thread_ns)
        self.worker_ns += weight * (worker_ns - self.worker_ns)


class Peak(NamedTuple):
    """The most that the channel drained of one codec, lately."""

    at_ns: int = 0
    rate: float = 0.0


class Trial(NamedTuple):
    """A stronger codec was taken instead of `weaker`, of which the channel drained `rate`; 0 if
    that was not known."""

    began_ns: int
    weaker: int
    rate: float


class Auto:
    """Decides for one channel; the same history gives the same choices."""

    is_curious = True

    def __init__(self, channels: int, cpus: int, cpu_percent: int = 100) -> None:
        """:param channels: that do as this one does.
        :param cpu_percent: of `cpus` that encoding may take on all channels."""
        self.drain = Drain()
        self.allow(channels, cpus, cpu_percent)
        self._probes = Allowance(PROBE_SHARE, PROBES_AT_ONCE_NS)
        self._share_left = self._share_seen = 1.0  #: of a CPU, that this thread may get, and gets
        self._arms = tuple(arm.made() for arm in LADDER)
        self._known = [Knowledge() for _ in LADDER]
        self._known[0].times = 1
        self._current = 0
        self._trial: Trial | None = None
        self._peaks = [Peak() for _ in LADDER]
        self.pace = Pace(settling=0)
        self._seen = [Seen() for _ in LADDER]
        self._changed_ns = self._held_until_ns = 0  #: the choice, and since when and until when
        self._worth = 1.0  #: part of the RAM that looks worth trying, seen in `_tries` batches
        self._tries = 0
        self._plain, self._sorted = Preparing(), Preparing()  #: without a codec, and for one
        self._before, self._changes, self._why = 0, 0, Why.START  #: the last change

    def allow(self, channels: int, cpus: int, cpu_percent: int) -> None:
        """Other limits, as for a new one; what was learnt stays."""
        self._cpu_share = cpu_percent / 100 * cpus / channels
        self._budget = Allowance(self._cpu_share, CPU_AT_ONCE_NS)

    # -- choices ---------------------------------------------------------------------------------

    def choose(self, now_ns: int) -> Arm:
        """The next batch's."""
        if not self._budget.is_left(now_ns):
            return self._arms[0]
        self._judge(now_ns)
        if now_ns < self._held_until_ns:
            return self._arms[self._current]
        allowed = [i for i, known in enumerate(self._known) if now_ns >= known.avoided_until_ns]
        best = min(allowed, key=lambda index: self._expected_ns(index, now_ns))
        if self._expected_ns(best, now_ns) * GAIN_MIN < self._ns_per_byte(self._current):
            must_wait = self._must_wait if best > self._current else self._must_stay
            if must_wait(best, now_ns):
                return self._arms[self._current]
            self._change(best, now_ns)
        return self._arms[self._current]

    def _expected_ns(self, index: int, now_ns: int) -> float:
        """For a byte of RAM; of a weaker codec that was in use a moment ago not less than it took
        then: a drain that is believed to have grown would be a reason to go back to it."""
        modelled_ns = self._ns_per_byte(index)
        return (
            max(modelled_ns, self._seen_ns(index, now_ns)) if index < self._current else modelled_ns
        )

    def _seen_ns(self, index: int, now_ns: int) -> float:
        return self._seen[index].ns_with(self._left(index), now_ns)

    def _paced_ns(self) -> float:
        """A byte of RAM with the current codec; 0 while nothing is known."""
        return self.pace.ns_per_byte * self._left(self._current)

    def _must_wait(self, best: int, now_ns: int) -> bool:
        """Whether what a stronger one gains may be noise and the pace without it is not known yet,
        or the current one was no good itself."""
        gain = self._ns_per_byte(self._current) / self._ns_per_byte(best)
        is_unsure = self.pace.is_steady and not self.pace.is_sure
        return (gain < GAIN_CLEAR and is_unsure) or self._judge(now_ns, is_early=True)

    def _must_stay(self, weaker: int, now_ns: int) -> bool:
        """Whether the current codec is seen to be no slower, or what the weaker one gains may be
        noise and the pace is not known yet. One that did not stand for long would look as good
        again at once: so it is avoided."""
        seen_ns = self._seen_ns(weaker, now_ns)
        is_sure = self.pace.is_sure and seen_ns > 0
        if is_sure and self._paced_ns() <= seen_ns * GAIN_MIN:
            return True
        if now_ns < self._changed_ns + TRIAL_NS:
            gain = self._ns_per_byte(self._current) / self._expected_ns(weaker, now_ns)
            if gain < GAIN_CLEAR and not self.pace.is_sure:
                return True
            self._avoid(now_ns, is_sure=is_sure)
        return False

    def _avoid(self, now_ns: int, *, is_sure: bool = True) -> None:
        """The current codec for a while, and stronger ones, which take still longer."""
        known = self._known[self._current]
        avoided_ns = AVOIDED_NS * 2 ** min(known.disproved, DOUBLINGS_MAX) if is_sure else TRIAL_NS
        for one in self._known[self._current :]:
            one.avoided_until_ns = max(one.avoided_until_ns, now_ns + avoided_ns)
        known.disproved += is_sure

    def _change(self, index: int, now_ns: int) -> None:
        trial = self._trial
        if trial is None and self.drain.is_full:
            trial = Trial(now_ns, self._current, self._peak(now_ns).rate)
        self._trial = trial if trial is not None and index > trial.weaker else None
        self._take(index, now_ns, Why.STRONGER if index > self._current else Why.WEAKER)

    def _peak(self, now_ns: int) -> Peak:
        """Of the current codec; what is believed of the drain was not seen."""
        peak, rate = self._peaks[self._current], self.drain.rate
        if self.drain.is_believed:
            return peak if now_ns <= peak.at_ns + PEAK_NS else Peak()
        if rate >= peak.rate or now_ns > peak.at_ns + PEAK_NS:
            peak = self._peaks[self._current] = Peak(now_ns, rate)
        return peak

    def _take(self, index: int, now_ns: int, why: Why) -> None:
        if self.pace.is_sure:
            self._seen[self._current] = Seen(now_ns, self.pace.ns_per_byte)
        self._before, self._current, self._changed_ns = self._current, index, now_ns
        self._changes, self._why = self._changes + 1, why
        self.pace = Pace()

    def _judge(self, now_ns: int, *, is_early: bool = False) -> bool:
        """A channel is also full when the other side cannot decode as fast; then it drains less of
        a stronger codec's packets, and the weaker one was better. So it was if the channel is not
        full and less RAM is moved.

        :param is_early: a still stronger one is wanted: then this one must be good so far.
        :return: the weaker one was better, and is the choice again."""
        trial = self._trial
        if trial is None or now_ns < self._changed_ns + WINDOW_NS:
            return False
        trial_ns = now_ns - trial.began_ns
        if trial_ns < (WINDOW_NS if is_early else TRIAL_NS):
            return False
        self._trial, known = None, self._known[self._current]
        seen_ns = self._seen_ns(trial.weaker, now_ns)
        if seen_ns and self.pace.is_sure:
            took_ns, as_weaker_ns = self._paced_ns(), seen_ns
        elif self.drain.is_full and trial.rate:
            took_ns = self._wire_ns(self._current)
            as_weaker_ns = self._wire_ns(trial.weaker) * self.drain.rate / trial.rate
        else:
            return False  # nothing is known
        if took_ns <= as_weaker_ns * GAIN_MIN:
            known.disproved = 0
            return False
        self._avoid(now_ns)
        self._take(trial.weaker, now_ns, Why.DISPROVED)
        self._held_until_ns = now_ns + TRIAL_NS  # until the drain was seen with the weaker one
        return True

    def probe(self, now_ns: int) -> Arm | None:
        """What to encode the pages of the batch with a second time, to learn: while the channel is
        full, the codecs above, as long as the one below leaves time for more; else that below."""
        if not self._budget.is_left(now_ns):
            return None
        if not self.drain.is_full:
            index = self._current - 1
            return self._arms[index] if index > 0 and self._is_due(index, now_ns) else None
        for index in range(self._current + 1, len(self._arms)):
            if index > 1 and not self._is_slowed_by_drain(index - 1):
                return None
            if self._is_due(index, now_ns):
                return self._arms[index]
        return None

    def _is_due(self, index: int, now_ns: int) -> bool:
        return self._known[index].is_old(now_ns) and self._probes.is_left(now_ns)

    def _is_slowed_by_drain(self, index: int) -> bool:
        return self._known[index].times > 0 and self._wire_ns(index) > self._made_ns(index)

    def _ns_per_byte(self, index: int) -> float:
        """What a byte of RAM takes; the least is best, and of equals the weakest codec."""
        if not self._known[index].times:
            return inf
        alone_ns = max(self._wire_ns(index), self._made_ns(index))
        codec_ns = self._worth * self._known[index].codec_ns
        if not self.drain.rate or codec_ns <= self._cpu_share * alone_ns:
            return alone_ns
        plain_ns = self._wire_ns(0)  # and as many batches as the budget has CPU time for
        return plain_ns / (1.0 + self._cpu_share * (plain_ns - self._wire_ns(index)) / codec_ns)

    def _wire_ns(self, index: int) -> float:
        return self._left(index) / self.drain.rate if self.drain.rate else 0.0

    def _left(self, index: int) -> float:
        """Of a byte of RAM, on the wire."""
        return 1.0 - self._worth * (1.0 - self._known[index].left)

    def _made_ns(self, index: int) -> float:
        codec_ns = self._worth * self._known[index].codec_ns
        share = min(self._share_left, self._share_seen)
        beside = self._sorted if index and self._sorted.worker_ns else self._plain
        own_ns, all_ns = beside.thread_ns + codec_ns, (beside.worker_ns + codec_ns) / share
        return max(own_ns, all_ns, MADE_NS_MIN)

    # -- experience ------------------------------------------------------------------------------

    def learn(self, done: Done) -> None:
        """What became of a batch."""
        self.drain.learn(done)
        if self.drain.is_full:
            self._peak(done.at_ns)
        self._budget.spend(done.codec_ns)
        weight = LEARNING * min(1.0, done.ram_bytes / LEARNING_BYTES)
        codec_ns = done.codec_ns + done.probed_ns
        thread_ns = (done.thread_ns - codec_ns) / done.ram_bytes
        worker_ns = (done.worker_ns - codec_ns) / done.ram_bytes
        share = done.thread_ns / max(1, done.thread_ns, done.total_ns - done.waited_ns)
        self._share_seen += weight / SLOWER * (share - self._share_seen)
        self._share_left = done.fair_share
        index = self._arms.index(done.arm)
        if index == self._current and done.is_whole:
            self.pace.learn(done.total_ns, done.wire_bytes, is_steady=self.drain.is_steady)
        beside = self._sorted if index else self._plain
        beside.learn(thread_ns, worker_ns, weight if beside.worker_ns else 1.0)
        if index:
            self._learn_worth(done.tried_bytes / done.ram_bytes, weight)
        if done.tried_bytes:
            self._known[index].learn(
                done.codec_ns / done.tried_bytes,
                done.encoded_bytes / done.tried_bytes,
                weight,
                done.at_ns,
            )

    def _learn_worth(self, worth: float, weight: float) -> None:
        self._tries += 1
        self._worth += max(weight, 1 / self._tries) * (worth - self._worth)

    def account(self) -> Account:
        """What is known now, and why the current codec was chosen."""
        return Account(
            self._current,
            self._before,
            self._changes,
            self._changed_ns,
            self._why,
            min(RATE_MAX, int(self.drain.rate * 1e9)),
            self.drain.is_full,
            int(min(self._share_left, self._share_seen) * 1000),
            int(self._cpu_share * 1000),
            int(self._worth * 1000),
            tuple(self._estimate(index) for index in range(len(self._known))),
        )

    def _estimate(self, index: int) -> Estimate:
        known = self._known[index]
        if not known.times:
            return Estimate()
        rate = int(1e9 / max(1e-9, self._ns_per_byte(index)))
        return Estimate(
            known.times,
            int(known.codec_ns * 1000),
            int(known.left * 1e6),
            min(RATE_MAX, rate) if self._plain.worker_ns else 0,
        )

    def learn_probe(self, probe: Probe) -> None:
        """The same pages by two codecs: what is known of the one in use says how unusual they
        were. Pages that went as they are also tell what sorting takes and how many are worth it."""
        cpu_ns = probe.sorting_ns + probe.codec_ns
        self._probes.spend(cpu_ns)
        self._budget.spend(cpu_ns)
        used, index = self._arms.index(probe.used), self._arms.index(probe.arm)
        known = self._known[index]
        if not used:
            self._learn_worth(probe.tried_bytes / probe.ram_bytes, PROBE_LEARNING)
        if not probe.tried_bytes:
            for one in self._known[index:]:  # what is noise is so for all
                one.vain_until_ns = probe.at_ns + VAIN_NS
            return
        left = self._known[used].left * probe.encoded_bytes / max(1, probe.used_bytes)
        known.learn(probe.codec_ns / probe.tried_bytes, left, PROBE_LEARNING, probe.at_ns)
        if not used:
            self._learn_sorting(index, probe.sorting_ns / probe.ram_bytes)

    def _learn_sorting(self, index: int, sorting_ns: float) -> None:
        """For a byte of RAM, beside what it takes as it is; ZeroMQ sends what is left of it."""
        plain = self._plain
        thread_ns = plain.thread_ns + sorting_ns
        worker_ns = thread_ns + (plain.worker_ns - plain.thread_ns) * self._left(index)
        self._sorted.learn(thread_ns, worker_ns, LEARNING if self._sorted.worker_ns else 1.0)
