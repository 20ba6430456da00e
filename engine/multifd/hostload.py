"""How many of the host's CPUs are left for the senders, from /proc/stat (proc(5))."""

from __future__ import annotations

import os
import time
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
    :ivar worker_ns: CPU time of this process."""

    at_ns: int
    idle: int
    total: int
    worker_ns: int


class HostLoad:
    """Owns one descriptor until the worker ends."""

    def __init__(self, workers: int) -> None:
        """:param workers: that do as this process does."""
        self._workers = workers
        self._cpus = float(os.cpu_count() or 1)
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._share = min(1.0, self._cpus / workers)
        try:
            self._fd = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def close(self) -> None:
        """A host that tells nothing counts as idle. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fair_share(self, now_ns: int) -> float:
        """Of a CPU, 0 to 1: what the scheduler has for each worker beside what others keep busy."""
        samples = self._samples
        if not samples or now_ns >= samples[-1].at_ns + SAMPLE_NS:
            samples.append(self._sample(now_ns))
            first, last = samples[0], samples[-1]
            if last.total > first.total:
                idle = self._cpus * (last.idle - first.idle) / (last.total - first.total)
                ours = self._workers * (last.worker_ns - first.worker_ns)
                others = self._cpus - idle - ours / (last.at_ns - first.at_ns)
                self._share = min(1.0, self._cpus / (self._workers + max(0.0, others)))
        return self._share

    def _sample(self, now_ns: int) -> Sample:
        worker_ns = time.process_time_ns()
        if self._fd < 0:
            return Sample(now_ns, 0, 0, worker_ns)
        line = os.pread(self._fd, LINE_BYTES_MAX, 0).partition(b"\n")[0]
        times = [int(word) for word in line.split()[1 : 1 + TIMES]]
        return Sample(now_ns, sum(times[IDLE]), sum(times), worker_ns)
