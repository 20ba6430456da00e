"""How busy the host's CPUs are, from /proc/stat (proc(5)), looked at now and then."""

from __future__ import annotations

from pathlib import Path
from typing import Final

STAT: Final = Path("/proc/stat")
SAMPLE_NS: Final = 50_000_000
LEARNING: Final = 0.5
#: user, nice, system, idle, iowait, irq, softirq, steal; guest time is in the first two.
TIMES: Final = 8
IDLE: Final = slice(3, 5)


class HostLoad:
    """A host that tells nothing counts as idle."""

    def __init__(self) -> None:
        self._sampled_ns = self._idle = self._total = 0
        self._share = 0.0

    def busy_share(self, now_ns: int) -> float:
        """Part of all CPUs' time that was not idle, smoothed over about 100 ms."""
        if now_ns >= self._sampled_ns + SAMPLE_NS:
            self._sampled_ns = now_ns
            try:
                with STAT.open("rb") as file:
                    times = [int(word) for word in file.readline().split()[1 : 1 + TIMES]]
            except (OSError, ValueError):
                return self._share
            self._learn(sum(times[IDLE]), sum(times))
        return self._share

    def _learn(self, idle: int, total: int) -> None:
        passed = total - self._total
        if self._total and passed > 0:
            busy = 1.0 - (idle - self._idle) / passed
            self._share += LEARNING * (min(1.0, max(0.0, busy)) - self._share)
        self._idle, self._total = idle, total
