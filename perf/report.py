"""Figures with names, units and spread, as JSON and as a table."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, standard deviation, extremes and count of a figure's values."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def machine() -> dict[str, str]:
    """Where the figures come from."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {"cpu": cpu, "kernel": platform.release(), "commit": commit or "unknown"}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def publish(
    title: str, figures: Mapping[str, Sequence[float]], *, as_json: bool, **context: Any
) -> None:
    """Print what was measured; the unit is in each name."""
    named = {name: spread(values) for name, values in figures.items() if values}
    if as_json:
        sys.stdout.write(json.dumps({"bench": title, **machine(), **context, **named}) + "\n")
        return
    table = Table(title=f"{title} {context if context else ''}".strip())
    for column in ("figure", "median", "min", "max", "std", "n"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, one in named.items():
        cells = [f"{one[key]:.3g}" for key in ("median", "min", "max", "std")]
        table.add_row(name, *cells, str(one["n"]))
    Console().print(table)
