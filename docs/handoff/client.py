"""A toy VMM that hands its memory to ramferry: the protocol of docs/handoff.md in Python.

    python client.py SOCKET MEBIBYTES run|wait

The same as client.c, see there. Its "vCPU" is a thread, and Python lets one thread run at a time:
where it waits for a missing page, orders wait as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import platform
import signal
import socket
import struct
import sys
import threading
import time

PAGE = 4096
USERFAULTFD = {"x86_64": 323, "aarch64": 282}
USER_MODE_ONLY = 1


def open_userfaultfd() -> int:
    """Without UFFDIO_API: that is ramferry's."""
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (0, USER_MODE_ONLY):
        number = USERFAULTFD[platform.machine()]
        fd = int(libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | flags))
        if fd >= 0:
            return fd
    raise OSError(ctypes.get_errno(), "userfaultfd")


class Vm:
    """Memory and one vCPU, which begins as a thread that stands."""

    def __init__(self, size: int) -> None:
        self.size, self.steps = size, 0
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, size)
        self.memory = mmap.mmap(self.memfd, size)
        self.memory.madvise(mmap.MADV_DONTFORK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.wants_to_run, self.stands = False, True
        self.changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        pages = self.size // PAGE - 1
        while True:
            with self.changed:
                while not self.wants_to_run:
                    self.stands = True
                    self.changed.notify_all()
                    self.changed.wait()
                self.stands = False
            for _ in range(100):
                if struct.unpack_from("=Q", self.memory)[0] != self.steps:
                    os.abort()  # memory and state are of different times
                self.steps += 1
                place = (self.steps * 7 % pages + 1) * PAGE + self.steps % 500 * 8
                struct.pack_into("=Q", self.memory, place, self.steps)
                struct.pack_into("=Q", self.memory, 0, self.steps)

    def set_running(self, runs: bool) -> None:
        """Return when it is so."""
        with self.changed:
            self.wants_to_run = runs
            self.changed.notify_all()
            self.changed.wait_for(lambda: runs or self.stands)


class Client:
    """The other end of ramferry's orders."""

    def __init__(self, vm: Vm, waits: bool) -> None:
        self.vm, self.is_void = vm, waits  #: it waits for a guest, and has none yet
        self.is_held = False  #: ramferry has paused it: it goes on when that one is gone
        self.must_keep_uffd = False  #: pages are missing: between `hold` and `release`

    def obey(self, order: dict[str, object], fd: int) -> None:
        """Do what is ordered.

        :raise ValueError: it is not known."""
        match order["execute"]:
            case "status":
                pass
            case "pause":
                self.is_held = order["until"] == "hangup"
                self.vm.set_running(False)
            case "resume":
                self.is_held = self.is_void = False
                self.vm.set_running(True)
            case "arrived":
                self.is_void = False  # and it stands until `resume`
            case "hold" | "release":
                self.must_keep_uffd = order["execute"] == "hold"
            case "save":
                os.pwrite(fd, struct.pack("=Q", self.vm.steps), 0)
            case "load":
                self.vm.steps = struct.unpack("=Q", os.pread(fd, 8, 0))[0]
            case _:
                raise ValueError("unknown order")

    def serve(self, connection: socket.socket) -> None:
        """Until ramferry hangs up."""
        reader = Reader(connection)
        while line := reader.line():
            order = json.loads(line)
            if "welcome" in order:
                continue
            if "id" not in order:
                sys.exit(f"client: refused: {order}")
            answer = {"id": order["id"], "size": 8}
            fd = reader.fds.pop(0) if order["execute"] in ("save", "load") else -1
            try:
                self.obey(order, fd)
            except (OSError, ValueError) as exc:
                answer["error"] = str(exc)
            if fd >= 0:
                os.close(fd)
            answer["running"] = self.vm.wants_to_run
            with contextlib.suppress(ConnectionError):  # the next line is the end
                connection.sendall(json.dumps(answer).encode() + b"\n")


class Reader:
    """Lines of a connection, and the descriptors that came beside them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer = connection, b""
        self.fds: list[int] = []

    def line(self) -> bytes:
        """The next one; empty at the end."""
        while b"\n" not in self._buffer:
            try:
                piece, fds, _, _ = socket.recv_fds(self._connection, 4096, 1)
            except ConnectionError:
                return b""
            if not piece:
                return b""
            self._buffer += piece
            self.fds += fds
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def main(path: str, mebibytes: str, how: str) -> None:
    vm = Vm(int(mebibytes) << 20)
    uffd = open_userfaultfd()
    client = Client(vm, waits=how == "wait")
    vm.set_running(how == "run")
    connection = socket.socket(socket.AF_UNIX)
    while connection.connect_ex(path):
        time.sleep(0.05)  # ramferry may come later than we do
    region = {
        "id": "ram",
        "base_host_virt_addr": vm.address,
        "size": vm.size,
        "offset": 0,
        "page_size_kib": PAGE // 1024,
    }
    hello = {"handoff": 1, "running": vm.wants_to_run, "state": True, "regions": [region]}
    with contextlib.suppress(BrokenPipeError):  # refused already: the answer says why
        socket.send_fds(connection, [json.dumps(hello).encode() + b"\n"], [vm.memfd, uffd])
    client.serve(connection)
    if client.is_void:
        sys.exit(3)  # half a guest came
    if client.is_held:
        vm.set_running(True)  # it had not been given away
    if not client.must_keep_uffd:
        os.close(uffd)
    while True:
        signal.pause()  # a real one would connect again, with a new userfaultfd


if __name__ == "__main__":
    main(*sys.argv[1:])
