"""The demo: one JSON object, right numbers, and nothing left when it is interrupted."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys

import psutil
import pytest
from rich.console import Console

from engine import Statistics, Status
from engine.demo.display import Display, picture
from engine.demo.run import Outcome
from tests.kernel import has_soft_dirty

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
    for when in ("before", "during", "after"):  # a busy machine's guest writes less, and never more
        assert 0 < answer[f"guest-writes-per-second-{when}"] <= 5120 * 1.2
    assert answer["query-migrate"]["ram"]["dirty-sync-count"] >= 3


def test_plain_output_has_the_verdict_and_no_escape_codes() -> None:
    done = subprocess.run(command(), capture_output=True, text=True, timeout=90, check=False)

    assert done.returncode == 0, done.stderr
    assert "every page is right: 8,192 checked on both sides, 0 wrong" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_ended_in_the_middle_leaves_no_process(number: int) -> None:
    process = subprocess.Popen(
        command("--max-bandwidth", "1M"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("active"):
            break
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait(timeout=60)

    _, alive = psutil.wait_procs(started, timeout=60)
    _, stderr = process.communicate(timeout=60)
    assert alive == []
    assert len(started) >= 6  # two control processes, two guests, workers
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in stderr


def test_nobody_reads_the_output_and_nothing_is_left() -> None:
    process = subprocess.Popen(command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "Traceback" not in stderr


def test_json_tells_of_a_migration_that_failed_and_the_exit_code_too() -> None:
    done = subprocess.run(
        command("--json", "--tracker", "soft-dirty"),
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip

    answer = json.loads(done.stdout)
    if has_soft_dirty():
        assert (done.returncode, answer["status"]) == (0, "completed")
        return
    assert done.returncode == 1
    assert answer["status"] == "failed"
    assert "soft-dirty" in answer["error-desc"]
    assert answer["verified-pages"] == 0


@pytest.mark.parametrize(
    ("more", "says", "says_not"),
    [
        ({}, "the guest runs at the source as before", "unknown"),
        ({"x-handover": "unknown"}, "outcome unknown: the guest may run at the", "as before"),
    ],
)
def test_a_demo_that_failed_tells_where_the_guest_is(
    capsys: pytest.CaptureFixture[str], more: dict[str, str], says: str, says_not: str
) -> None:
    statistics = Statistics.of({"status": "failed", "error-desc": "no answer"} | more)

    Display(quiet=False).ended(Outcome(statistics, None, 0, 0.0, 0.0, 0.0))

    said = " ".join(capsys.readouterr().out.split())
    assert says in said
    assert says_not not in said


def statistics_of_channels(count: int) -> Statistics:
    channel = {"throughput-bytes-per-second": 10**9, "incarnation": 1}
    return Statistics(
        status=Status.ACTIVE,
        total_bytes=2**34,
        remaining_bytes=2**33,
        rounds=3,
        throttle_percent=20,
        tracker="uffd-wp",
        placement="UFFDIO_COPY",
        channels=tuple(channel | {"index": index} for index in range(count)),
        compression={
            "tried-bytes": 1,
            "channels": [{"index": index, "codec": "zstd", "level": 3} for index in range(count)],
        },
    )


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
@pytest.mark.parametrize("channels", [0, 2, 255])
def test_the_picture_fits_every_terminal(width: int, channels: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    console.print(picture(statistics_of_channels(channels), console.width))

    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= 23  # and the cursor's own
    text = " ".join(" ".join(lines).split())
    for fact in ("active", "8.0 GiB", "uffd-wp", "20 %"):
        assert fact in text
    assert ("channel 0" in text) == (channels > 0)
    assert ("zstd 3" in text) == (channels > 0 and width >= 60)
    assert (" more" in text) == (channels == 255)
