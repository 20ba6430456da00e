"""The files of unix sockets: what may be removed, and what belongs to somebody.

Binding needs a path at which nothing is. A listener that was killed leaves its socket behind; that
one, and nothing else, is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from engine.errors import UsageError


def claim(path: str) -> None:
    """Make room for a listener at `path`: remove the socket of one that died.

    :raise UsageError: something else is there, or somebody listens; nothing was changed."""
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise UsageError(f"'{path}' cannot be used: {exc.strerror}") from exc
    if not is_socket:
        raise UsageError(f"'{path}' exists and is not a socket; choose another path")
    answer = _knock(path)
    if answer == errno.ENOENT:
        return
    if answer in (errno.EACCES, errno.EPERM):
        raise UsageError(f"'{path}' cannot be used: {os.strerror(answer)}")
    if answer != errno.ECONNREFUSED:
        raise UsageError(f"another process listens at '{path}'; quit it or choose another path")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as exc:
        raise UsageError(f"'{path}' cannot be removed: {exc.strerror}") from exc


def remove_dead(path: str) -> None:
    """Remove a socket at which nobody listens any more; whatever else is at `path` stays."""
    with contextlib.suppress(UsageError):
        claim(path)


def bind(path: str) -> socket.socket:
    """A stream socket that is bound to `path`, not listening yet; only this user may connect.

    :raise UsageError: as `claim`.
    :raise OSError: the path cannot be bound."""
    claim(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(bound.fileno(), 0o600)
        bound.bind(path)
    except OSError:
        bound.close()
        raise
    return bound


def _knock(path: str) -> int:
    """The error of a connection to `path`: ECONNREFUSED means that nobody listens there.

    Anything else (a full backlog, another type of socket) comes from somebody who lives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path)
