"""Where a guest whose control process died waits for the next one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Protocol

from engine.guest.base import Role
from engine.guest.rundir import open_rundir, remove_file


class Adoption:
    """A listener in the run directory for one control process of this user, or root's; owns both
    the listener and its file until somebody came or `close`."""

    def __init__(self, rundir: str, on_adopted: Callable[[socket.socket], None]) -> None:
        """`on_adopted` takes the connection over; the listener is gone then.

        :raise OSError: the directory cannot be used."""
        self._on_adopted = on_adopted
        self._listener, self.path = open_rundir(rundir)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] not in (0, os.getuid()):
            connection.close()
            return
        self.close()
        self._on_adopted(connection)

    def close(self) -> None:
        """Idempotent."""
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)
            remove_file(self.path)
            self._listener.close()


class Left(Protocol):
    """What is told of a guest without its control process."""

    @property
    def is_running(self) -> bool: ...
    @property
    def is_missing_open(self) -> bool: ...


def state_of(role: Role, guest: Left, *, is_unknown: bool) -> str:
    """What a guest does without its control process."""
    if role is Role.GONE:
        return "runs at the destination, which has not all of the memory yet: it is kept here"
    state = "runs on" if guest.is_running else "stays stopped"
    if is_unknown:
        return f"{state}, for nobody has said whether it runs at the destination"
    if guest.is_missing_open:
        state += ", and waits where it touches memory that has not come from the source yet"
    return state


def listen_alone(
    rundir: str,
    on_adopted: Callable[[socket.socket], None],
    state: str,
    *,
    who: str = "it",
    kind: str = "workload",
) -> Adoption | None:
    """Wait to be adopted, if that can be; say on stderr what the guest does, and what people can.

    :param who: process that does it, if it is not this one."""
    text = f"guest[{os.getpid()}]: its control process is gone; {who} {state}; "
    ending = f"; {'end' if who == 'it' else 'leave'} it with: kill {os.getpid()}"
    try:
        adoption = Adoption(rundir, on_adopted)
    except OSError as exc:
        say(f"{text}nobody can adopt it: {exc.strerror}{ending}")
        return None
    say(f"{text}adopt it with --guest {kind}:socket={adoption.path}{ending}")
    return adoption


def say(text: str) -> None:
    """Tell people on stderr, which may have gone with control."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"ramferry {text}\n".encode())
