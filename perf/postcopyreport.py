"""`ramferry bench postcopy`: which runs, in which order, and what is shown of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil

from engine.sizes import parse_size
from perf import postcopyqemu
from perf.postcopy import (
    HELD,
    SWITCH_BANDWIDTH,
    SWITCH_RATE,
    Case,
    Waits,
    faults_once,
    recovery_once,
    switch_once,
)
from perf.report import publish
from perf.warm import huge_pages, warm_memory

PATTERNS: Final = ("sweep", "hotspot", "random")
#: What is left for the rest of the machine when memory is warmed.
SPARE_BYTES: Final = 1 << 30

Once = Callable[[], Awaitable[Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command was told.

    :ivar prefetches: pages; those of the guest's speed after the switch."""

    runs: int
    channels: int
    is_huge: bool
    as_json: bool
    faults: int
    prefetches: tuple[int, ...] = (0, 64)

    def case(self, size: str, **more: Any) -> Case:
        return Case(size, channels=self.channels, is_huge=self.is_huge, **more)

    def memory(self, size: str) -> Any:
        """What the runs inside find: huge pages, or memory that the host has given already."""
        wanted = 2 * parse_size(size)
        if self.is_huge:
            return huge_pages(wanted)
        if wanted + SPARE_BYTES > psutil.virtual_memory().available:
            return nullcontext()
        return warm_memory(wanted)

    def in_turn(self, kinds: Mapping[str, Once]) -> dict[str, dict[str, list[float]]]:
        """Each kind once, then each again: what else the machine does strikes all alike."""
        figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in kinds}
        for _ in range(self.runs):
            for name, once in kinds.items():
                for figure, value in asyncio.run(_awaited(once)).items():
                    figures[name][figure].append(value)
        return figures

    def show(self, kinds: Mapping[str, Mapping[str, list[float]]], **context: Any) -> None:
        for name, figures in kinds.items():
            told = {"kind": name, "channels": self.channels, "hugetlb": self.is_huge, **context}
            publish("postcopy", figures, as_json=self.as_json, **told)


async def _awaited(once: Once) -> Mapping[str, float]:
    return await once()


# -- what is measured ----------------------------------------------------------------------------


def measure_faults(plan: Plan, size: str, plot: Path | None) -> None:
    """What a missing page costs, nothing pushed and all pushed; QEMU's beside."""
    case = plan.case(size, is_timed=True)
    held = replace(case, postcopy_bandwidth=HELD)
    waits = {"nothing pushed": Waits(), "pushed at full speed": Waits()}

    def ours(name: str, one: Case) -> Once:
        async def once() -> Mapping[str, float]:
            figures, seen = await faults_once(one, plan.faults)
            waits[name].add(seen.counts.items(), seen.longest_ns)
            return figures

        return once

    kinds = {
        "nothing pushed": ours("nothing pushed", held),
        "pushed at full speed": ours("pushed at full speed", case),
    }
    if postcopyqemu.is_there() and not plan.is_huge:
        for preempt in (False, True):
            name = f"QEMU {'with' if preempt else 'without'} postcopy-preempt"
            kinds[name] = _qemu(parse_size(size), preempt=preempt)
    with plan.memory(size):
        figures = plan.in_turn(kinds)
    plan.show(figures, size=size)
    if plot is not None:
        means = {name: one["fault_mean_us"] for name, one in figures.items() if "QEMU" in name}
        histogram(plot, waits, means)


def _qemu(size: int, *, preempt: bool) -> Once:
    async def once() -> Mapping[str, float]:
        return await postcopyqemu.faults_once(size, preempt=preempt)

    return once


def measure_switch(plan: Plan, size: str, dirty: str) -> None:
    """How long the guest stands."""
    case = plan.case(size, pattern="sweep", rate=SWITCH_RATE, bandwidth=SWITCH_BANDWIDTH)

    async def once() -> Mapping[str, float]:
        return await switch_once(case, parse_size(dirty))

    with plan.memory(size):
        plan.show(plan.in_turn({"switch": once}), size=size, dirty=dirty)


def measure_recovery(plan: Plan, size: str, patterns: tuple[str, ...] = PATTERNS) -> None:
    """How soon the guest is as fast as before."""

    def once(pattern: str, prefetch: int) -> Once:
        async def run() -> Mapping[str, float]:
            return await recovery_once(plan.case(size, pattern=pattern, prefetch=prefetch))

        return run

    kinds = {
        f"{pattern}, prefetch {prefetch}": once(pattern, prefetch)
        for pattern in patterns
        for prefetch in plan.prefetches
    }
    with plan.memory(size):
        plan.show(plan.in_turn(kinds), size=size)


# -- the picture ---------------------------------------------------------------------------------


def histogram(path: Path, waits: Mapping[str, Waits], means: Mapping[str, list[float]]) -> None:
    """What the guest's writes waited, and where QEMU's mean is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, seen in waits.items():
        counts, total = sorted(seen.counts.items()), max(1, seen.counts.total())
        places = [ns / 1000 for ns, _ in counts]
        label = f"{name}: p50 {seen.quantile_us(0.5):.0f}, p99 {seen.quantile_us(0.99):.0f} us"
        axis.step(places, [count / total for _, count in counts], where="post", label=label)
    for (name, values), style in zip(means.items(), (":", "--"), strict=False):
        mean = sum(values) / len(values)
        axis.axvline(mean, color="black", linestyle=style, label=f"{name}: mean {mean:.0f} us")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("a write waited, us")
    axis.set_ylabel("share of the faults")
    axis.set_title("Random writes of a guest that misses its RAM", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
