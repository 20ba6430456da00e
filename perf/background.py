"""A stand-in for multifd in postcopy: bulk pages over plain TCP, one process at each end.

`python -m perf.background send|receive FD`, with descriptors beside the first message on FD, which
is JSON. The sender takes what is dirty in its slice, the receiver inserts it behind the guest; the
end of the connection is the end of the round.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from engine import _native
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.insertion import Inserter

BATCH_PAGES: Final = 512
#: Of one send or receive: a kernel without preemption lets nobody else run inside of one. Beside a
#: background of 0.8-1.5 GB/s 4.9 % of the touches took 512 us or more with calls of up to 2 MiB,
#: 0.8 % with these.
CALL_BYTES_MAX: Final = 32 * 1024
HEADER: Final = struct.Struct("<I")  #: runs, which follow; then their pages
RUN_BYTES: Final = 8
#: Below the vCPUs, which otherwise wait for a processor once their page is there: p99 of a fault
#: fell from 0.8-1.7 to 0.1-0.6 ms (three pairs, two cores, others' load 4.6).
BACKGROUND_NICE: Final = 5


def send(connection: socket.socket, block: RamBlock, dirty: PageBitmaps, part: list[int]) -> None:
    """Send the slice's dirty pages, whatever becomes dirty meanwhile stays."""
    scratch = bytearray(len(dirty[0]))
    data_runs, zero_runs = memoryview(bytearray(512 * RUN_BYTES)), bytearray(512 * RUN_BYTES)
    cursor, slice_ = 0, block.slice_of(part[0], part[1])
    with block.map() as ram:
        while cursor < block.page_count:
            cursor, runs, _, pages, _ = _native.take_batch(
                ram, dirty[0], scratch, slice_, cursor, BATCH_PAGES, False, data_runs, zero_runs
            )
            if pages:
                connection.sendall(HEADER.pack(runs) + data_runs[: runs * RUN_BYTES])
                _send_pages(connection, ram, data_runs[: runs * RUN_BYTES])


def _send_pages(connection: socket.socket, ram: mmap.mmap, runs: memoryview) -> None:
    with memoryview(ram) as view:
        for first, count in struct.iter_unpack("<II", runs):
            with view[first * PAGE_SIZE : (first + count) * PAGE_SIZE] as part:
                for at in range(0, len(part), CALL_BYTES_MAX):
                    connection.sendall(part[at : at + CALL_BYTES_MAX])


def receive(connection: socket.socket, inserter: Inserter) -> None:
    """Insert what comes until the sender closes."""
    payload = memoryview(bytearray(BATCH_PAGES * PAGE_SIZE))
    head = memoryview(bytearray(HEADER.size + BATCH_PAGES * RUN_BYTES))
    while _fill(connection, head[: HEADER.size]):
        (count,) = HEADER.unpack_from(head)
        runs = head[HEADER.size : HEADER.size + count * RUN_BYTES]
        _fill(connection, runs)
        pages = sum(run[1] for run in struct.iter_unpack("<II", runs))
        _fill(connection, payload[: pages * PAGE_SIZE])
        inserter.place(0, payload[: pages * PAGE_SIZE], runs, count)


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    """All of the buffer; False at the end of the connection."""
    at = 0
    while at < len(buffer):
        got = connection.recv_into(buffer[at : at + CALL_BYTES_MAX])
        if not got:
            return False
        at += got
    return True


def main(role: str, fd: int) -> None:
    """One worker, scheduled as multifd's are."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.nice(BACKGROUND_NICE)
    with socket.socket(fileno=fd) as control:
        said, fds, _, _ = socket.recv_fds(control, 4096, 4)
    words = json.loads(said)
    ram_fd, bitmap_fd, connection_fd, *uffd = fds
    block = RamBlock("ram", words["size"], ram_fd, words["backing"])
    bitmaps = PageBitmaps([block], bitmap_fd)
    with socket.socket(fileno=connection_fd) as connection:
        if role == "send":
            send(connection, block, bitmaps, words["slice"])
        else:
            receive(connection, Inserter([block], uffd, [words["address"]], bitmaps))


@contextlib.contextmanager
def pushing(
    rig: Any, channels: int, dirty: PageBitmaps | None = None
) -> Iterator[Sequence[subprocess.Popen[bytes]]]:
    """Push what is dirty (the rig's, or `dirty`) over `channels` connections.

    :return: the processes, senders first."""
    dirty_fd = (dirty or rig.dirty).fd
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(channels):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                near = socket.create_connection(listener.getsockname())
                far, _ = listener.accept()
            with near, far:
                block = rig.block
                words = {"size": block.size, "backing": block.backing_page_size,
                         "slice": [index, channels], "address": rig.toucher.address}  # fmt: skip
                source = [rig.source.fd, dirty_fd, near.fileno()]
                processes.insert(0, _start("send", words, source))
                target = [block.fd, rig.received.fd, far.fileno(), rig.toucher.uffd]
                processes.append(_start("receive", words, target))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(role: str, words: dict[str, Any], fds: list[int]) -> subprocess.Popen[bytes]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [json.dumps(words).encode()], fds)
        return subprocess.Popen(
            [sys.executable, "-m", "perf.background", role, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
