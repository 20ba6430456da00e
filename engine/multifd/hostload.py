"""How many of the host's CPUs are left for the senders, from /proc/stat (proc(5))."""

from __future__ import annotations

import os
from collections import deque
from typing import Final, NamedTuple

SAMPLE_NS: Final = 50_000_000
#: So many samples are looked over: /proc/stat counts in ticks of 10 ms, a fifth of the time between
#: two samples, but 4 % of 250 ms.
SAMPLES: Final = 6
LINE_BYTES_MAX: Final = 256
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
    """Owns one descriptor until the worker ends."""

    def __init__(self, senders: int) -> None:
        self._senders = senders
        self._cpus = float(os.cpu_count() or 1)
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._share = min(1.0, self._cpus / senders)
        try:
            self._fd = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def close(self) -> None:
        """A host that tells nothing counts as idle. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fair_share(self, now_ns: int, senders_ns: int) -> float:
        """Of a CPU, 0 to 1: what the scheduler has for each sender beside what others keep busy.

        :param senders_ns: CPU time that all senders have used."""
        samples = self._samples
        if not samples or now_ns >= samples[-1].at_ns + SAMPLE_NS:
            samples.append(Sample(now_ns, *self._ticks(), senders_ns))
            first, last = samples[0], samples[-1]
            if last.total > first.total:
                idle = self._cpus * (last.idle - first.idle) / (last.total - first.total)
                ours = (last.senders_ns - first.senders_ns) / (last.at_ns - first.at_ns)
                others = max(0.0, self._cpus - idle - ours)
                self._share = min(1.0, self._cpus / (self._senders + others))
        return self._share

    def _ticks(self) -> tuple[int, int]:
        """Idle, and all."""
        if self._fd < 0:
            return 0, 0
        line = os.pread(self._fd, LINE_BYTES_MAX, 0).partition(b"\n")[0]
        times = [int(word) for word in line.split()[1 : 1 + TIMES]]
        return sum(times[IDLE]), sum(times)
