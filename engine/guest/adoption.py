"""Where a guest whose control process died waits for the next one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable

from engine.guest.base import Role
from engine.guest.rundir import open_rundir, remove_file
from engine.guest.vcpus import Machine


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


def state_of(role: Role, machine: Machine, *, is_unknown: bool) -> str:
    """What a guest does without its control process."""
    if role is Role.GONE:
        return "runs at the destination, which has not all of the memory yet: it is kept here"
    state = "runs on" if machine.is_running else "stays stopped"
    if is_unknown:
        return f"{state}, for nobody has said whether it runs at the destination"
    if machine.is_missing_open:
        state += ", and waits where it touches memory that has not come from the source yet"
    return state


def say_where(state: str, path: str | None, reason: str = "") -> None:
    """Tell people on stderr what the guest does without its control process, and what they can."""
    text = f"ramferry guest[{os.getpid()}]: its control process is gone; it {state}"
    if path is not None:
        text += f"; adopt it with --guest workload:socket={path}"
    else:
        text += f"; nobody can adopt it: {reason}"
    text += f"; end it with: kill {os.getpid()}\n"
    with contextlib.suppress(OSError):  # stderr may have gone with control
        os.write(sys.stderr.fileno(), text.encode())
