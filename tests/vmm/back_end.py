"""A vhost-user back end for tests: a disk that answers no request, and writes into the guest's RAM.

It maps what QEMU sends it as real ones do: each region by itself, and the largest a second time.
While its ring runs it counts: each count goes to `STEPS_AT` and into a page beyond it, through the
one mapping and the other in turn. That memory is above 4 GiB, which the sweeper leaves alone; in
the file it begins behind what is below.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support import WAIT_S, eventually

MIB: Final = 1024 * 1024
BELOW_MIB: Final = 32  #: of the memory is so much below 4 GiB
MEMORY_MIB: Final = 64
STEPS_AT: Final = 4 * 1024 * MIB  #: in the guest's memory
STEPS_OFFSET: Final = BELOW_MIB * MIB  #: in the file
PAGES: Final = 1024  #: after that one
HEADER: Final = struct.Struct("<III")  #: request, flags, size of what follows
REGION: Final = struct.Struct("<QQQQ")  #: guest address, size, QEMU's address, offset in the file
VERSION: Final = 1
REPLY: Final = 4
NEED_REPLY: Final = 8
#: VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VHOST_F_LOG_ALL.
FEATURES: Final = 1 << 32 | 1 << 30 | 1 << 26
#: MQ, LOG_SHMFD, REPLY_ACK, CONFIG.
PROTOCOL_FEATURES: Final = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 9
GET_FEATURES, SET_MEM_TABLE, SET_LOG_BASE = 1, 5, 6
GET_VRING_BASE, SET_VRING_KICK, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG = (
    11,
    12,
    15,
    17,
    24,
)
CONFIG: Final = struct.pack("<QIIHBBI", 2048, 0, 0, 0, 0, 0, 512).ljust(256, b"\0")


@dataclass
class Region:
    """A part of the guest's memory, as it is mapped here."""

    guest_address: int
    size: int
    fd: int
    offset: int
    mapping: mmap.mmap = field(init=False)

    def __post_init__(self) -> None:
        self.map()

    def map(self) -> None:
        self.mapping = mmap.mmap(self.fd, self.size, offset=self.offset)

    def map_anew(self) -> None:
        self.mapping.close()
        self.map()


class Disk:
    """One that QEMU has connected to."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._regions: list[Region] = []
        self._is_running = False
        self._step = 0

    def serve(self) -> None:
        """Until QEMU hangs up."""
        with contextlib.suppress(ConnectionError, EOFError):
            while True:
                if select.select([self._connection], [], [], 0 if self._is_running else None)[0]:
                    self._answer()
                elif self._regions:
                    self._write()

    def map_anew(self, *_: object) -> None:
        """Everything, perhaps at the same place."""
        for region in self._regions:
            region.map_anew()

    def map_more(self, *_: object) -> None:
        """One region once more."""
        first = self._regions[0]
        self._regions.append(Region(first.guest_address, first.size, first.fd, first.offset))

    def fork(self, *_: object) -> None:
        """A child that has ended when this returns."""
        if not (child := os.fork()):
            os._exit(0)
        os.waitpid(child, 0)

    def replace_program(self, *_: object) -> None:
        """By one that maps nothing, with the pid of this one."""
        os.execv("/bin/sleep", ["sleep", "1000"])

    def _write(self) -> None:
        holders = [
            each
            for each in self._regions
            if each.guest_address <= STEPS_AT < each.guest_address + each.size
        ]
        holder = holders[self._step % len(holders)]
        place = STEPS_AT - holder.guest_address
        self._step = struct.unpack_from("<Q", holder.mapping, place)[0] + 1
        page = self._step * 7 % PAGES + 1
        struct.pack_into(
            "<Q", holder.mapping, place + page * 4096 + self._step % 500 * 8, self._step
        )
        struct.pack_into("<Q", holder.mapping, place, self._step)

    def _answer(self) -> None:
        header, fds, _, _ = socket.recv_fds(self._connection, HEADER.size, 8)
        if not header:
            raise EOFError
        request, flags, size = HEADER.unpack(header)
        payload = b""
        while len(payload) < size:
            payload += self._connection.recv(size - len(payload))
        reply = self._reply_to(request, payload, fds)
        if reply is None and flags & NEED_REPLY:
            reply = struct.pack("<Q", 0)
        if reply is not None:
            header = HEADER.pack(request, VERSION | REPLY, len(reply))
            self._connection.sendall(header + reply)

    def _reply_to(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        if request == SET_MEM_TABLE:
            self._map(payload, fds)
            return None
        for fd in fds:
            os.close(fd)
        if request == SET_VRING_KICK:
            self._is_running = True
        if request == GET_VRING_BASE:
            self._is_running = False
            return payload
        if request == GET_CONFIG:
            return payload[:12] + CONFIG[: len(payload) - 12]
        values = {
            GET_FEATURES: FEATURES,
            GET_PROTOCOL_FEATURES: PROTOCOL_FEATURES,
            GET_QUEUE_NUM: 1,
            SET_LOG_BASE: 0,
        }
        return struct.pack("<Q", values[request]) if request in values else None

    def _map(self, payload: bytes, fds: list[int]) -> None:
        for region in self._regions:
            region.mapping.close()
        for fd in {region.fd for region in self._regions}:
            os.close(fd)
        table = list(REGION.iter_unpack(payload[8:]))[: len(fds)]
        self._regions = [
            Region(guest_address, size, fd, offset)
            for (guest_address, size, _, offset), fd in zip(table, fds, strict=True)
        ]
        largest = max(self._regions, key=lambda each: each.size)
        place = (largest.guest_address, largest.size, largest.fd, largest.offset)
        self._regions.append(Region(*place))


def main(path: str) -> None:
    """SIGUSR1: have a child. SIGUSR2: map everything anew. SIGHUP: map one region once more.
    SIGALRM: become another program."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        connection, _ = listener.accept()
    disk = Disk(connection)
    signal.signal(signal.SIGUSR1, disk.fork)
    signal.signal(signal.SIGUSR2, disk.map_anew)
    signal.signal(signal.SIGHUP, disk.map_more)
    signal.signal(signal.SIGALRM, disk.replace_program)
    disk.serve()


class BackEnd:
    """One that runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        command = [sys.executable, "-m", "tests.vmm.back_end", str(path)]
        self.process = subprocess.Popen(command)
        assert eventually(path.exists, WAIT_S)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def options(self) -> list[str]:
        """For the QEMU whose disk it is."""
        disk = ["-chardev", f"socket,id=back,path={self.path}"]
        device = ["-device", "vhost-user-blk-pci,chardev=back,num-queues=1", "-boot", "a"]
        return [*disk, *device, "-machine", f"pc,max-ram-below-4g={BELOW_MIB}M"]


@contextlib.contextmanager
def back_end(path: Path) -> Iterator[BackEnd]:
    """One that waits for its QEMU at the path; always ended."""
    found = BackEnd(path)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()
        path.unlink()


def steps(ram: Path) -> int:
    """What a back end has counted in the memory of this file."""
    with ram.open("rb") as file:
        return int(struct.unpack("<Q", os.pread(file.fileno(), 8, STEPS_OFFSET))[0])


def writes(ram: Path) -> bool:
    """Whether a back end counts on."""
    before = steps(ram)
    return eventually(lambda: steps(ram) > before + 100, WAIT_S)


if __name__ == "__main__":
    main(sys.argv[1])
