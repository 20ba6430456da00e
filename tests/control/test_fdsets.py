"""Descriptors that were handed over for good: one owner, and what is closed when."""

from __future__ import annotations

import os

import pytest

from engine.control.fdsets import FDS_MAX, FdSets
from engine.errors import UsageError
from tests.support import open_descriptors


def null(flags: int = os.O_RDONLY) -> int:
    return os.open(os.devnull, flags)


def is_open(fd: int) -> bool:
    return str(fd) in open_descriptors() or os.path.exists(f"/proc/self/fd/{fd}")


def test_sets_take_the_lowest_free_id_and_show_the_highest_first() -> None:
    sets = FdSets()
    fds = [null() for _ in range(5)]
    assert sets.add(fds[0], None, "one") == 0
    assert sets.add(fds[1], None, None) == 1
    assert sets.add(fds[2], 7, None) == 7
    assert sets.add(fds[3], 0, "two") == 0
    assert sets.add(fds[4], None, None) == 2
    assert sets.query() == [
        {"fdset-id": 7, "fds": [{"fd": fds[2]}]},
        {"fdset-id": 2, "fds": [{"fd": fds[4]}]},
        {"fdset-id": 1, "fds": [{"fd": fds[1]}]},
        {"fdset-id": 0, "fds": [{"fd": fds[0], "opaque": "one"}, {"fd": fds[3], "opaque": "two"}]},
    ]
    sets.remove(0, fds[0])
    sets.remove(1, None)
    assert not is_open(fds[0])
    assert not is_open(fds[1])
    assert is_open(fds[3])
    with pytest.raises(UsageError, match=rf"named 'fdset-id:0, fd:{fds[0]}' not found"):
        sets.remove(0, fds[0])
    with pytest.raises(UsageError, match="named 'fdset-id:1' not found"):
        sets.remove(1, None)
    sets.close()
    sets.close()
    assert sets.query() == []
    assert not any(map(is_open, fds))


def test_a_descriptor_that_is_refused_is_closed() -> None:
    sets = FdSets()
    fd = null()
    with pytest.raises(UsageError, match=r"^Parameter 'fdset-id' expects a non-negative value$"):
        sets.add(fd, -1, None)
    assert not is_open(fd)
    for _ in range(FDS_MAX):
        sets.add(null(), 3, None)
    fd = null()
    with pytest.raises(UsageError, match="already"):
        sets.add(fd, None, None)
    assert not is_open(fd)
    sets.close()


def test_a_set_gives_a_duplicate_with_the_access_that_is_needed() -> None:
    sets = FdSets()
    reading, writing = null(), null(os.O_WRONLY)
    sets.add(reading, 4, None)
    sets.add(writing, 4, None)
    copy = sets.duplicate(4, os.O_WRONLY | os.O_CREAT)
    try:
        assert copy not in (reading, writing)
        assert os.write(copy, b"x") == 1
    finally:
        os.close(copy)
    with pytest.raises(UsageError, match="/dev/fdset/4 has no descriptor"):
        sets.duplicate(4, os.O_RDWR)
    with pytest.raises(UsageError, match="Failed to find fdset /dev/fdset/5"):
        sets.duplicate(5, os.O_RDONLY)
    sets.close()
