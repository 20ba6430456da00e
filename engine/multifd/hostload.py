"""How busy the host's CPUs are, from /proc/stat (proc(5)), looked at now and then."""

from __future__ import annotations

import os
from typing import Final

SAMPLE_NS: Final = 50_000_000
LEARNING: Final = 0.5
LINE_BYTES_MAX: Final = 256
#: user, nice, system, idle, iowait, irq, softirq, steal; guest time is in the first two.
TIMES: Final = 8
IDLE: Final = slice(3, 5)


class HostLoad:
    """Owns one descriptor until the worker ends; a host that tells nothing counts as idle."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1
        self._sampled_ns = self._idle = self._total = 0
        self._share = 0.0

    def busy_share(self, now_ns: int) -> float:
        """Part of all CPUs' time that was not idle, smoothed over about 100 ms."""
        if self._fd >= 0 and now_ns >= self._sampled_ns + SAMPLE_NS:
            self._sampled_ns = now_ns
            line = os.pread(self._fd, LINE_BYTES_MAX, 0).partition(b"\n")[0]
            times = [int(word) for word in line.split()[1 : 1 + TIMES]]
            self._learn(sum(times[IDLE]), sum(times))
        return self._share

    def _learn(self, idle: int, total: int) -> None:
        passed = total - self._total
        if self._total and passed > 0:
            busy = 1.0 - (idle - self._idle) / passed
            self._share += LEARNING * (min(1.0, max(0.0, busy)) - self._share)
        self._idle, self._total = idle, total
