"""Who else maps a file, by /proc/PID/maps."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from engine.errors import GuestError, MemoryRefused
from engine.guest import mappings, sharers
from engine.guest.back_ends import BackEnd, check_bypasses
from engine.guest.foreign import check_nobody_waits, is_in_children
from engine.guest.foreign_missing import open_foreign_missing
from engine.guest.foreign_tracking import EVENT_FORK, FORK_MESSAGE, ForeignTracker
from engine.guest.handoff_plain import check_waits
from engine.guest.mappings import read_mappings, read_places
from engine.guest.sharers import files_of, others_mapping

NOBODY: Final = 2**22  #: no process has this pid

MAPS = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""
MAPS_IN_A_THREAD = """
import ctypes, mmap, os, sys, threading, time
def work():
    with open(sys.argv[1], "r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    while " Z " not in open(f"/proc/{os.getpid()}/task/{os.getpid()}/stat").read():
        time.sleep(0.01)
    print("mapped", flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=work).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def wanted(tmp_path: Path) -> Path:
    path = tmp_path / "wanted"
    path.write_bytes(bytes(4096))
    return path


@contextlib.contextmanager
def mapped(path: Path, program: str = MAPS) -> Iterator[int]:
    """Pid of a process that maps the file."""
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"mapped\n"
            yield child.pid
        finally:
            child.kill()


def file_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def test_only_who_maps_the_file_is_found_and_not_who_maps_one_with_such_a_name(
    tmp_path: Path, wanted: Path
) -> None:
    device, inode = file_of(wanted)
    where = f"{os.major(device):02x}:{os.minor(device):02x} {inode}"
    liar = tmp_path / f"00000000 {where} liar"
    liar.write_bytes(bytes(4096))
    with mapped(wanted) as pid, mapped(liar):
        assert others_mapping({(device, inode)}, 0) == [pid]


def test_a_line_end_in_a_files_name_neither_hides_a_mapping_nor_makes_one(
    tmp_path: Path, wanted: Path
) -> None:
    device, inode = file_of(wanted)
    where = f"{os.major(device):02x}:{os.minor(device):02x} {inode}"
    hidden = tmp_path / "hidden\rnothing to be parsed"
    hidden.write_bytes(bytes(4096))
    faked = tmp_path / f"faked\r1000-2000 rw-s 00000000 {where} faked"
    faked.write_bytes(bytes(4096))
    with mapped(hidden) as hides, mapped(faked) as fakes:
        assert others_mapping({file_of(hidden)}, 0) == [hides]
        assert others_mapping({(device, inode)}, 0) == []
        assert len(read_places(fakes)) == len(read_mappings(fakes))


def test_what_cannot_be_understood_is_refused_and_hides_nobody(
    wanted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, inode = file_of(wanted)
    line = f"1000 rw-s 0 {os.major(device):02x}:{os.minor(device):02x} {inode} x\n"
    monkeypatch.setattr(mappings, "_read", lambda _path: line.encode())
    monkeypatch.setattr(sharers, "read_maps", lambda _pid: line.encode())
    with pytest.raises(MemoryRefused, match="cannot be understood"):
        others_mapping({(device, inode)}, 0)


def test_who_maps_the_file_is_found_when_its_first_thread_has_ended(wanted: Path) -> None:
    with mapped(wanted, MAPS_IN_A_THREAD) as pid:
        assert others_mapping({file_of(wanted)}, 0) == [pid]
        with (
            contextlib.closing(BackEnd.open(pid)) as back_end,
            pytest.raises(MemoryRefused, match="its first thread has ended"),
        ):
            check_bypasses(back_end)  # its descriptors cannot be seen


def test_forks_are_noted_one_at_a_time() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    tracker = ForeignTracker(1, reader, -1, 0, [])
    children = [os.dup(writer) for _ in range(3)]
    for child in children:
        os.write(writer, FORK_MESSAGE.pack(EVENT_FORK, child))
    try:
        tracker.note_forks()
        assert tracker.has_forked
        assert len(os.read(reader, 4096)) == 2 * FORK_MESSAGE.size
        tracker.note_forks()  # woken for nothing
    finally:
        for fd in (reader, writer, *children[1:]):
            os.close(fd)


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda: check_nobody_waits([], NOBODY), id="nobody-waits"),
        pytest.param(lambda: is_in_children(NOBODY, []), id="is-in-children"),
        pytest.param(lambda: open_foreign_missing(NOBODY, []), id="missing-pages"),
        pytest.param(lambda: check_waits(NOBODY, []), id="plain-handoff"),
        pytest.param(lambda: files_of([], NOBODY), id="files"),
    ],
)
def test_of_a_process_that_is_gone_it_is_told_in_one_line(look: Callable[[], object]) -> None:
    with pytest.raises(GuestError, match=f"^process {NOBODY} cannot be looked at") as caught:
        look()

    assert isinstance(caught.value.__cause__, OSError)
