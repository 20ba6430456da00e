"""What the demo knows of a guest that runs and lacks pages: numbers of both sides, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.memory.blocks import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Faults:
    """At one moment.

    :ivar background_pages: what nobody had asked for, and the rest that was fetched at the end.
    :ivar latency_distribution: waits; bucket i is [2**i, 2**(i+1)) us.
    """

    at_ns: int = 0
    time_ms: int = 0
    missing_bytes: int = 0
    faults: int = 0
    requests: int = 0
    demand_pages: int = 0
    prefetch_pages: int = 0
    background_pages: int = 0
    latency_mean_ns: int = 0
    latency_distribution: tuple[int, ...] = ()
    faults_per_s: float = 0.0
    requests_per_s: float = 0.0

    @classmethod
    def of(
        cls, source: Mapping[str, Any], destination: Mapping[str, Any], at_ns: int, before: Faults
    ) -> Faults:
        """From the `x-postcopy` of both sides, each of which may be empty still.

        :param before: what was known a moment ago; rates are taken since then."""
        faults = destination.get("faults", 0)
        requests = max(source.get("requests", 0), before.requests)
        seconds = (at_ns - before.at_ns) / 1e9 if before.at_ns else 0.0
        return cls(
            at_ns=at_ns,
            time_ms=source.get("time", 0),
            missing_bytes=destination.get("missing-pages", 0) * PAGE_SIZE,
            faults=faults,
            requests=requests,
            demand_pages=destination.get("demand-pages", 0),
            prefetch_pages=destination.get("prefetch-pages", 0),
            background_pages=source.get("background-pages", 0) + destination.get("rest-pages", 0),
            latency_mean_ns=destination.get("latency", 0),
            latency_distribution=tuple(destination.get("latency-dist", ())),
            faults_per_s=(faults - before.faults) / seconds if seconds else 0.0,
            requests_per_s=(requests - before.requests) / seconds if seconds else 0.0,
        )

    @property
    def latency_p50_us(self) -> float:
        return quantile_us(self.latency_distribution, 0.5)

    @property
    def latency_p99_us(self) -> float:
        return quantile_us(self.latency_distribution, 0.99)

    def as_json(self) -> dict[str, Any]:
        return {
            "faults": self.faults,
            "requests": self.requests,
            "time-ms": self.time_ms,
            "missing-bytes": self.missing_bytes,
            "demand-pages": self.demand_pages,
            "prefetch-pages": self.prefetch_pages,
            "background-pages": self.background_pages,
            "latency-mean-ns": self.latency_mean_ns,
            "latency-p50-us": round(self.latency_p50_us),
            "latency-p99-us": round(self.latency_p99_us),
            "latency-distribution": list(self.latency_distribution),
        }


def quantile_us(distribution: Sequence[int], share: float) -> float:
    """Interpolated within its bucket, so at most twice or half of what it was; 0 of nothing."""
    wanted = sum(distribution) * share
    for power, count in enumerate(distribution):
        if count and wanted <= count:
            return float(2**power * (1 + wanted / count))
        wanted -= count
    return 0.0
