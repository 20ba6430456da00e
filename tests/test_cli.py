"""The command line: what a newcomer types wrongly gets one line, and never a traceback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cli
from tests.support import eventually

pytestmark = pytest.mark.process


def ramferry(*arguments: str | bytes, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine.cli", *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--codec", "lz5"], "'none', 'lz4'"),
        (["demo", "--size", "1"], "multiple of 4096"),
        (["demo", "--size", "much"], "size=much is not allowed"),
        (["demo", "--channels", "0"], "1<=x<=255"),
        (["demo", "--max-bandwidth", "fast"], "Invalid size 'fast'"),
        (["serve", "--guest", "ram:size=1M"], "--qmp unix:PATH"),
        (["serve", "--guest", "tape:", "--qmp", "unix:/x"], "allowed: ram:size=..."),
        (["serve", "--guest", "ram:size=1M", "--qmp", "nowhere"], "unix:PATH or tcp:HOST:PORT"),
        (["serve", "--guest", "ram:size=1M", "--qmp", "unix:/no/such/x"], "cannot listen"),
        (["serve", "--guest", "ram:size=1M", "--incoming", "smoke:x"], "unknown migration"),
        (["serve", "--guest", "ram:size=1M", "--incoming", "tcp:127.0.0.1"], "error parsing"),
        (["serve", "--guest", "ram:size=1M", "--incoming", "tcp:h:1", "--set", "x"], "name=value"),
        (
            ["serve", "--guest", "ram:size=1M", "--incoming", "defer", "--qmp", "unix:/tmp/x",
             "--set", "multifd-channels=0"],
            "between 1 and 255",
        ),
        (
            ["serve", "--guest", "ram:size=1M", "--incoming", "tcp:127.0.0.1:0", "--set",
             "speed=1"],
            "no parameter or capability 'speed'",
        ),
        (["serve", "--guest", "ram:size=1M", "--qmp", "tcp:a..b:4444"], "error parsing host"),
        (["serve", "--guest", "ram:size=1M", "--hmp", "nowhere"], "unix:PATH or tcp:HOST:PORT"),
        (["serve", "--guest", "ram:size=1M", "--hmp", "unix:/no/such/x"], "cannot listen"),
        (["monitor"], "PATH"),
        (["monitor", "/no/such/x"], "there is no socket at"),
        (["monitor", "/no/such/x", "-c", "info status"], "there is no socket at"),
        (["monitor", b"/tmp/\xff"], "is not UTF-8"),
        (
            ["serve", "--guest", "ram:size=1M", "--incoming", "tcp:127.0.0.1:" + "9" * 5000],
            "0 to 65535 are allowed",
        ),
        (["serve", "--guest", "ram:size=1M", "--incoming", b"unix:/tmp/\xff\xfe"], "is not UTF-8"),
        (["serve", "--guest", "ram:size=1M", "--incoming", "unix:*"], "is no file"),
        (["serve", "--guest", "ram:size=1M", "--qmp", "unix:@x"], "is no file"),
        (["serve", "--guest", "ram:size=" + "9" * 5000, "--qmp", "unix:/tmp/x"], "is not allowed"),
        (
            ["serve", "--guest", "ram:size=1M", "--incoming", "defer", "--qmp", "unix:/tmp/x",
             "--set", "x" * 5000],
            "x" * 100,
        ),
        (["serve", "--guest", "workload:size=16T", "--qmp", "unix:/tmp/x"], "wants 16384.0 GiB"),
        (["demo", "--size", "16T"], "a guest with its copy wants 32768.0 GiB of memory, and"),
        (["demo", "--size", "1.0001G"], "multiple of 4096"),
        (["demo", "--channels", "9" * 5000], "--channels"),
        (["serve"], "--guest"),
        (["fly"], "No such command 'fly'"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_ends_in_one_line_that_says_what_is_allowed(
    arguments: list[str | bytes], says: str
) -> None:
    done = ramferry(*arguments)

    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert max(len(word) for word in done.stderr.split()) < 140
    assert max(len(line) for line in done.stderr.splitlines()) < 1300
    assert done.stdout == ""


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = ramferry("serve", "--guest", "ram:size=1M", "--incoming", f"tcp:127.0.0.1:{port}")

    assert done.returncode == 2
    assert "Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_serve_and_removes_its_socket(tmp_path: Path, number: int) -> None:
    path = tmp_path / "qmp"
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.cli", "serve", "--guest", "workload:size=16M", "--qmp",
         f"unix:{path}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            assert eventually(
                lambda: client.connect_ex(str(path)) == 0 or process.poll() is not None
            )
            assert b'"QMP"' in client.recv(4096)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert not path.exists()


def test_the_version_and_help_are_printed() -> None:
    assert ramferry("--version").stdout.startswith("ramferry, version 0.")
    assert "serve" in ramferry("--help").stdout


def test_a_deadline_without_a_text_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise TimeoutError

    assert cli._run(command) == cli.EXIT_FAILED
    assert capsys.readouterr().err == "ramferry: no answer in time\n"
