"""`bench adapt`: what a trace of samples says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import MigrationError, UsageError
from perf import links
from perf.adapt import Sample, Trace, batches_by_codec, figures, measure, plot, sample_of, settle_s
from perf.codec import NONE
from tests.perf.plotting import draw


def trace(*choices: tuple[int, str], changed_s: float) -> Trace:
    """Samples every 50 ms; for so many of them ten batches of a codec, and one of another."""
    samples, counts = [Sample(0.0, 0, 0, {})], {"none": 0, "zstd": 0, "lz4": 0}
    for number, codec in choices:
        for _ in range(number):
            counts[codec] += 10
            counts["lz4"] += 1
            last = samples[-1]
            samples.append(
                Sample(
                    last.at_s + 0.05, last.moved_bytes + 10**6, last.wire_bytes + 10**5, {**counts}
                )
            )
    return Trace(tuple(samples), changed_s, samples[-1].at_s)


@pytest.mark.parametrize(
    ("info", "counts"),
    [
        ({}, {}),
        ({"x-compression": None}, {}),
        ({"x-compression": {"policy": "auto", "reason": "measured"}}, {}),
        (
            {
                "x-compression": {
                    "channels": [
                        {"index": 0, "batches": {"none": 3, "zstd": 1}},
                        {"index": 1, "batches": {"none": 4}},
                    ]
                }
            },
            {"none": 7, "zstd": 1},
        ),
        ({"x-compression": [{"batches": {"lz4": 2, "why": "?"}}, "text"]}, {"lz4": 2}),
    ],
)
def test_batches_are_summed_over_channels_where_they_are_told(
    info: dict[str, Any], counts: dict[str, int]
) -> None:
    assert batches_by_codec(info) == counts


def test_a_sample_counts_what_is_done_with() -> None:
    ram = {"total": 100, "remaining": 30, "transferred": 12}

    assert sample_of({"ram": ram}, 1.5, 17) == Sample(1.5, 70, 17, {})
    assert sample_of({"status": "setup"}, 1.5, 17) is None


def test_a_choice_has_settled_when_the_one_that_stays_sends_most_batches() -> None:
    late = settle_s(trace((20, "none"), (16, "none"), (60, "zstd"), changed_s=1.0))

    assert late == pytest.approx(0.8, abs=0.16)


def test_a_choice_that_did_not_change_has_settled_at_once() -> None:
    assert settle_s(trace((20, "zstd"), (60, "zstd"), changed_s=1.0)) == 0.0


def test_a_choice_that_swings_is_not_settled_before_it_stays() -> None:
    swinging = trace((20, "none"), (8, "zstd"), (8, "none"), (50, "zstd"), changed_s=1.0)

    settled = settle_s(swinging)

    assert settled is not None
    assert settled > 0.7


def test_an_engine_that_does_not_tell_has_no_settling_time(tmp_path: Path) -> None:
    samples = tuple(Sample(i / 20, i * 10**7, i * 10**6, {}) for i in range(60))
    silent = Trace(samples, 1.0, 3.0)

    assert settle_s(silent) is None
    found = figures(silent)
    assert found["settled_after_change_s"] == []
    assert found["before_ram_mb_per_s"] == [pytest.approx(200)]
    assert found["after_wire_mbit_per_s"] == [pytest.approx(160)]
    draw(plot, tmp_path / "adapt.png", silent, "silent")
    assert (tmp_path / "adapt.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.process
def test_throughput_follows_a_link_that_becomes_slower() -> None:
    try:
        links.check_possible()
    except UsageError as exc:
        pytest.skip(str(exc))

    found = figures(measure(64 * 2**20, "random", NONE, (2 * 10**8, 10**8), 0.4, 2))

    assert found["changed_s"][0] >= 0.4
    assert 0 < found["after_wire_mbit_per_s"][0] <= 100 * 1.2
    assert found["total_time_s"][0] > 64 * 2**20 * 8 / (2 * 10**8)


@pytest.mark.process
def test_a_migration_that_ends_before_the_change_is_no_figure() -> None:
    try:
        links.check_possible()
    except UsageError as exc:
        pytest.skip(str(exc))

    with pytest.raises(MigrationError, match="ended before the link changed"):
        measure(2**20, "random", NONE, (10**9, 10**8), 60.0, 2)
