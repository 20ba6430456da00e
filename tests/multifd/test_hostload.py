"""What is left of the host's CPUs for a sender."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.multifd import hostload
from engine.multifd.hostload import SAMPLE_NS, HostLoad


class Ticks(HostLoad):
    """A host with two CPUs whose /proc/stat the test writes."""

    idle = total = 0

    def __init__(self) -> None:
        super().__init__(senders=2)
        self._cpus = 2.0

    def _ticks(self) -> tuple[int, int]:
        return self.idle, self.total


@pytest.mark.parametrize(
    ("idle", "senders_ns", "share"),
    [
        pytest.param(10, 0, 1.0, id="idle"),
        pytest.param(0, 2 * SAMPLE_NS, 1.0, id="all-is-the-senders"),
        pytest.param(5, 0, 2 / 3, id="another-takes-one-cpu"),
        pytest.param(0, 0, 0.5, id="others-take-both"),
    ],
)
def test_a_sender_gets_its_part_beside_others(idle: int, senders_ns: int, share: float) -> None:
    load = Ticks()
    assert load.fair_share(1, lambda: 0) == 1.0

    load.idle, load.total = idle, 10

    assert load.fair_share(1 + SAMPLE_NS, lambda: senders_ns) == pytest.approx(share)


def test_between_two_samples_nothing_is_read() -> None:
    load = Ticks()
    load.fair_share(1, lambda: 0)
    load.total = 10
    assert load.fair_share(SAMPLE_NS, lambda: 0) == 1.0


def test_a_host_that_tells_nothing_counts_as_idle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hostload, "STAT", tmp_path / "stat")
    load = HostLoad(senders=1)
    load.fair_share(1, lambda: 0)
    assert load.fair_share(1 + SAMPLE_NS, lambda: 0) == 1.0


def test_the_real_file_is_understood() -> None:
    idle, total = HostLoad(senders=1)._ticks()
    assert 0 < idle <= total or not hostload.STAT.exists()
