"""Where a guest without a control process can be found, and files that go with their guest."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile

from engine.errors import UsageError, shown

SOCKET_PATH_BYTES_MAX = 107  #: the kernel's sun_path, less its final zero
SOCKET_NAME_LONGEST = "/guest-4194304.sock"  #: with the largest process number


def default_rundir() -> str:
    """`ramferry` in the user's run directory, or a directory of this user in the temporary one."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isabs(base):
        return os.path.join(base, "ramferry")
    return os.path.join(tempfile.gettempdir(), f"ramferry-{os.getuid()}")


def check_rundir(path: str) -> str:
    """:raise UsageError: no socket can be made there; nothing is created yet."""
    if not os.path.isabs(path):
        raise UsageError(f"rundir '{shown(path)}' must be absolute; begin it with /")
    length, length_max = len(os.fsencode(path)), SOCKET_PATH_BYTES_MAX - len(SOCKET_NAME_LONGEST)
    if length > length_max:
        raise UsageError(
            f"rundir '{shown(path)}' has {length} bytes; {length_max} are allowed, because a "
            "socket's path is short"
        )
    if "\0" in path:
        raise UsageError(f"rundir '{shown(path)}' holds a NUL")
    return path


def open_rundir(path: str) -> tuple[socket.socket, str]:
    """Listen in the directory, which is made if it is missing and must be this user's alone.

    :return: the listener and its path; both are the caller's.
    :raise OSError: it cannot be used."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(1, f"{path} is not a directory that only this user can enter")
    where = os.path.join(path, f"guest-{os.getpid()}.sock")
    remove_file(where)  # of a dead process that had this number
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(where)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener, where


def remove_file(path: str, fd: int | None = None) -> None:
    """Remove a file, with `fd` only if it is that very one; a missing one is fine."""
    with contextlib.suppress(OSError):
        if fd is None or os.path.samestat(os.lstat(path), os.fstat(fd)):
            os.unlink(path)
