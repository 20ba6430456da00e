"""The demo: one JSON object, right numbers, and nothing left when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

pytestmark = pytest.mark.process

SMALL = ["demo", "--size", "32M", "--rate", "20M"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "engine.cli", *SMALL, *arguments]


def test_json_is_exactly_one_object_with_what_scripts_need() -> None:
    done = subprocess.run(
        command("--json"), capture_output=True, text=True, timeout=90, check=False
    )

    answer = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert answer["status"] == answer["query-migrate"]["status"] == "completed"
    assert (answer["verified-pages"], answer["wrong-pages"], answer["lost-writes"]) == (8192, 0, 0)
    assert answer["guest-writes-per-second-before"] == pytest.approx(5120, rel=0.2)
    assert answer["guest-writes-per-second-after"] == pytest.approx(5120, rel=0.2)
    assert answer["guest-writes-per-second-during"] > 0
    assert answer["query-migrate"]["ram"]["dirty-sync-count"] >= 3


def test_plain_output_has_the_verdict_and_no_escape_codes() -> None:
    done = subprocess.run(command(), capture_output=True, text=True, timeout=90, check=False)

    assert done.returncode == 0, done.stderr
    assert "every page is right: 8,192 checked on both sides, 0 wrong" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process(number: int) -> None:
    marker = {"RAMFERRY_TEST_MARKER": str(os.getpid()) + str(number)}
    process = subprocess.Popen(
        command("--max-bandwidth", "1M"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | marker,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("active"):
            break
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)

    assert len(started) >= 6  # two control processes, two guests, workers
    assert process.returncode == 130
    assert "Traceback" not in stderr
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
