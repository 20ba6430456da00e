"""Whose file is at the path of a unix socket, and which of them may be removed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import unixsocket
from engine.errors import UsageError


@pytest.fixture(autouse=True)
def _sockets_are_removed(tmp_path: Path) -> Iterator[None]:
    """What these tests leave is what killed listeners leave."""
    yield
    for path in tmp_path.iterdir():
        if path.is_socket():
            path.unlink()


def leave_dead(path: Path) -> None:
    """What a listener leaves that was killed."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


def test_a_free_path_and_a_dead_socket_can_be_claimed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    unixsocket.claim(str(path))
    leave_dead(path)

    unixsocket.claim(str(path))

    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "link", "loose-link"])
def test_what_is_no_socket_is_refused_in_one_line_and_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    leave_dead(tmp_path / "dead")
    make: dict[str, Callable[[], object]] = {
        "file": lambda: path.write_text("precious"),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path / "dead"),
        "loose-link": lambda: path.symlink_to(tmp_path / "none"),
    }
    make[kind]()
    before = path.lstat()

    with pytest.raises(UsageError) as refused:
        unixsocket.claim(str(path))
    unixsocket.remove_dead(str(path))

    assert str(refused.value) == f"'{path}' exists and is not a socket; choose another path"
    assert path.lstat() == before


@pytest.mark.parametrize("type_", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_the_socket_of_somebody_who_lives_stays(tmp_path: Path, type_: int) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, type_) as alive:
        alive.bind(str(path))
        if type_ != socket.SOCK_DGRAM:
            alive.listen()
        with pytest.raises(UsageError, match=f"another process listens at '{path}'"):
            unixsocket.claim(str(path))
        unixsocket.remove_dead(str(path))
        assert path.is_socket()


def test_a_listener_whose_backlog_is_full_lives(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        socket.socket(socket.AF_UNIX) as alive,
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        alive.bind(str(path))
        alive.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(str(path))
        with pytest.raises(UsageError, match="another process listens"):
            unixsocket.claim(str(path))


def test_a_bound_socket_is_private(tmp_path: Path) -> None:
    path = tmp_path / "s"

    with unixsocket.bind(str(path)):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_path_in_no_directory_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="cannot be used: Not a directory"):
        unixsocket.claim(str(tmp_path / "file" / "s"))
