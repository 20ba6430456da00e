"""What the native services refuse before they touch anything."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from typing import Any

import pytest

from engine import _native
from tests.native.support import PAGE

SESSION = b"s" * 16


def faults(**changed: Any) -> _native.FaultService:
    """A fault service of 1024 pages, or as changed."""
    words: dict[str, Any] = {
        "uffd": -1,
        "address": PAGE,
        "pages": 1024,
        "unit": 1,
        "received": bytearray(128),
        "session": SESSION,
        "statistics": mmap.mmap(-1, PAGE),
        "vcpus": 0,
    } | changed
    block = (words["uffd"], words["address"], words["pages"], words["unit"], words["received"])
    return _native.faults_open(
        [block], words["session"], words["statistics"], words["vcpus"], False
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"unit": 2}, "one by one or by 512, not by 2"),
        ({"unit": 0}, "not by 0"),
        ({"unit": 512, "pages": 513}, "513 pages are not whole units of 512"),
        ({"received": bytearray(120)}, "received of 120 bytes"),
        ({"address": 1}, "not a multiple of 4096"),
        ({"address": 2**63 - PAGE}, "reaches beyond"),
        ({"session": b"short"}, "16 bytes, not 5"),
        ({"statistics": bytearray(4088)}, "statistics of 4088 bytes"),
        ({"pages": 2**32 + 1}, r"more than the 2\*\*32"),
        ({"vcpus": -1}, "not in the range"),
    ],
)
def test_a_fault_service_that_cannot_be_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        faults(**changed)


def test_prefetches_outside_ram_and_negative_waits_are_refused() -> None:
    service = faults()
    for block, first, count in ((1, 0, 1), (0, 1024, 1), (0, 0, 1025), (0, 2**62, 2**62)):
        with pytest.raises(ValueError, match="are not in a RAM block"):
            _native.faults_prefetch(service, block, first, count)
    assert _native.faults_prefetch(service, 0, 0, 1024) == 0  # there is no connection
    with pytest.raises(ValueError, match="waiting for -1 ms"):
        _native.faults_run(service, -1, -1, -1)
    assert _native.faults_news(service) == []


def test_no_more_than_128_pages_are_asked_for_in_advance() -> None:
    service = faults()
    _native.faults_reconnect(service)
    asked = [_native.faults_prefetch(service, 0, first, 100) for first in (0, 50, 500, 900)]
    assert asked == [100, 28, 0, 0]  # 0 to 99, 100 to 127


def test_a_userfaultfd_that_is_none_is_an_error_of_the_system() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            _native.faults_wake_all(faults(uffd=read_end))
        with pytest.raises(OSError, match="Bad file descriptor"):
            _native.insert(-1, PAGE, 1, bytearray(8), bytes(PAGE), bytes(4) + b"\1\0\0\0", 1, 64)
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ((-1, 64, 3, bytearray(8)), "not by 3"),
        ((-1, 65, 1, bytearray(8)), "with a bit for each of 65 pages"),
    ],
)
def test_a_page_service_that_cannot_be_is_refused(block: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _native.pages_open([block], SESSION, bytearray(128))


def test_a_capsule_of_another_kind_is_refused() -> None:
    pages = _native.pages_open([(-1, 64, 1, bytearray(8))], SESSION, mmap.mmap(-1, PAGE))
    with pytest.raises(ValueError, match="incorrect name"):
        _native.faults_news(pages)  # type: ignore[arg-type]


def test_a_short_slice_can_be_had_by_anybody() -> None:
    """In a process of its own: it is the thread's for good."""
    code = "from engine import _native; _native.schedule_slice(100_000)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
