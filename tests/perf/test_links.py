"""Shaped links: their rate is what was asked for, and nothing of them stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import MigrationError, UsageError
from perf import links
from perf.links import (
    PAYLOAD_SHARE,
    UNSHAPED,
    Link,
    make_link,
    parse_rate,
    rate_text,
    sent_bytes_around,
)

process = pytest.mark.process

RECEIVER = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.settimeout(60)
while connection.recv(1 << 20):
    pass
print(time.monotonic())
"""
SENDER = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 60) as connection:
    print(time.monotonic())
    connection.sendall(bytes(int(sys.argv[3])))
"""


def transfer(link: Link, size: int) -> float:
    """Seconds from a TCP transfer's begin to its end: a busy machine takes more, none takes less
    than the rate allows."""
    python = [sys.executable, "-c"]
    receiver = subprocess.Popen(
        link.destination.inside([*python, RECEIVER, link.destination.address]),
        stdout=subprocess.PIPE,
        text=True,
    )
    with receiver:
        try:
            assert receiver.stdout is not None
            port = receiver.stdout.readline().strip()
            line = [*python, SENDER, link.destination.address, port, str(size)]
            sent = subprocess.run(
                link.source.inside(line), stdout=subprocess.PIPE, check=True, timeout=90
            )
            return float(receiver.stdout.readline()) - float(sent.stdout)
        finally:
            receiver.kill()


def payload_s(size: int, rate: int) -> float:
    """What a transfer takes at the rate."""
    return size * 8 / (rate * PAYLOAD_SHARE)


def shaped_rates(link: Link) -> list[int]:
    """Bits per second of both ends, as the kernel has them."""
    show = ["tc", "-json", "qdisc", "show", "dev", links.INTERFACE, "root"]
    found = [
        json.loads(subprocess.check_output(end.inside(show), timeout=60))
        for end in (link.source, link.destination)
    ]
    return [int(qdiscs[0]["options"]["rate"]) * 8 for qdiscs in found]


def check_possible() -> None:
    try:
        links.check_possible()
    except UsageError as exc:
        pytest.skip(str(exc))


@pytest.mark.parametrize(
    ("text", "rate", "shown"),
    [
        ("100M", 10**8, "100 Mbit/s"),
        ("2.5G", 2_500_000_000, "2.5 Gbit/s"),
        ("10g", 10**10, "10 Gbit/s"),
        ("1000000", 10**6, "1 Mbit/s"),
        ("unshaped", UNSHAPED, "unshaped"),
    ],
)
def test_a_rate_is_bits_a_second(text: str, rate: int, shown: str) -> None:
    assert parse_rate(text) == rate
    assert rate_text(rate) == shown


@pytest.mark.parametrize("text", ["", "G", "fast", "0", "-1G", "nanG", "infG", "999", "1e9999G"])
def test_what_is_no_rate_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="1M to 1000G bits a second"):
        parse_rate(text)


def test_a_link_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "tc" else f"/bin/{tool}")

    with pytest.raises(UsageError, match="needs tc; on Debian"), make_link(10**8):
        pass


def test_a_link_says_that_it_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr("os.geteuid", lambda: 1000)

    with pytest.raises(UsageError, match="needs root"), make_link(10**8):
        pass


@process
def test_a_link_of_100_mbit_is_one_and_its_rate_can_change() -> None:
    check_possible()
    with make_link(10**8) as link:
        assert shaped_rates(link) == [10**8] * 2
        before = link.source.sent_bytes()
        slow_s = transfer(link, 12_000_000)
        sent = link.source.sent_bytes() - before
        link.set_rate(10**9)
        assert shaped_rates(link) == [10**9] * 2
        fast_s = transfer(link, 60_000_000)

    with pytest.raises(MigrationError, match="is in no link"):
        sent_bytes_around(os.getpid())
    assert slow_s >= 0.95 * payload_s(12_000_000, 10**8)  # the first bytes come in a burst
    assert 0.95 * payload_s(60_000_000, 10**9) <= fast_s < payload_s(60_000_000, 10**8)
    assert 12_000_000 < sent < 12_000_000 * 1.1


@process
def test_a_process_inside_keeps_its_pid_and_sees_the_link_only() -> None:
    check_possible()
    with make_link(UNSHAPED) as link:
        inside = subprocess.Popen(
            link.source.inside(["sh", "-c", "echo $$; exec cat /proc/self/net/dev"]),
            stdout=subprocess.PIPE,
            text=True,
        )
        output, _ = inside.communicate(timeout=60)

    pid, *rows = output.splitlines()
    assert int(pid) == inside.pid
    assert {row.split(":")[0].strip() for row in rows[2:]} == {"lo", "wire"}


OWNER = """
import os, sys, time
from perf.links import make_link
with make_link(10**8) as link:
    print(*(os.fstat(end.descriptor).st_ino for end in (link.source, link.destination)), flush=True)
    sys.stdin.read()
"""


def namespaces_in_use() -> set[int]:
    """Network namespaces that some process holds, by inode."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found.add((entry / "ns" / "net").stat().st_ino)
            found |= {
                held.stat().st_ino
                for held in (entry / "fd").iterdir()
                if str(held.readlink()).startswith("net:")
            }
        except OSError:  # it has ended
            continue
    return found


@process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_holds_a_link_whose_owner_ended(number: signal.Signals) -> None:
    check_possible()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        made = {int(inode) for inode in owner.stdout.readline().split()}
        held = namespaces_in_use()
        owner.send_signal(number)
        owner.wait(60)

    assert len(made) == 2
    assert made <= held
    assert not made & namespaces_in_use()


@process
def test_a_link_is_given_back_when_making_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    check_possible()
    descriptors = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(links, "INTERFACE", "a-name-that-is-too-long")

    with pytest.raises(MigrationError, match="failed"), make_link(10**8):
        pass

    assert set(os.listdir("/proc/self/fd")) == descriptors
