"""How many of the host's CPUs are left for the senders, from /proc/stat (proc(5))."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

STAT: Final = Path("/proc/stat")
SAMPLE_NS: Final = 50_000_000
#: So many samples are looked over: /proc/stat counts in ticks of 10 ms, a fifth of the time between
#: two samples, but 4 % of 250 ms.
SAMPLES: Final = 6
#: user, nice, system, idle, iowait, irq, softirq, steal; guest time is in the first two.
TIMES: Final = 8
IDLE: Final = slice(3, 5)


class Sample(NamedTuple):
    """Of this moment.

    :ivar idle: of all CPUs, in ticks, and `total` idle or not.
    :ivar senders_ns: CPU time of all senders."""

    at_ns: int
    idle: int
    total: int
    senders_ns: int


class HostLoad:
    """A host that tells nothing counts as idle."""

    def __init__(self, senders: int) -> None:
        self._senders = senders
        self._cpus = float(os.cpu_count() or 1)
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._share = min(1.0, self._cpus / senders)

    def fair_share(self, now_ns: int, senders_ns: Callable[[], int]) -> float:
        """Of a CPU, 0 to 1: what the scheduler has for each sender beside what others keep busy.

        :param senders_ns: CPU time that all senders have used, asked for now and then."""
        samples = self._samples
        if not samples or now_ns >= samples[-1].at_ns + SAMPLE_NS:
            samples.append(Sample(now_ns, *self._ticks(), senders_ns()))
            first, last = samples[0], samples[-1]
            if last.total > first.total:
                idle = self._cpus * (last.idle - first.idle) / (last.total - first.total)
                ours = (last.senders_ns - first.senders_ns) / (last.at_ns - first.at_ns)
                others = max(0.0, self._cpus - idle - ours)
                self._share = min(1.0, self._cpus / (self._senders + others))
        return self._share

    def _ticks(self) -> tuple[int, int]:
        """Idle, and all."""
        try:
            with STAT.open("rb") as file:
                times = [int(word) for word in file.readline().split()[1 : 1 + TIMES]]
        except (OSError, ValueError):
            return 0, 0
        return sum(times[IDLE]), sum(times)
