"""A stand-in for a guest: a process that touches pages of its RAM and checks what it finds.

`python -m tests.postcopy.toucher FD` with the RAM and the source's RAM beside the first message on
the socket pair FD; answers with its userfaultfd over the RAM and the RAM's address. Then one
command, one answer, as JSON.
"""

from __future__ import annotations

import array
import json
import mmap
import random
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

from engine import _native
from engine.memory.missing import open_missing

PAGE: Final = 4096
MESSAGE_BYTES_MAX: Final = 1 << 16
#: What a guest writes over a page's first bytes once it has checked it: never the source's.
MARK: Final = b"written by the guest, here alone"


@dataclass(frozen=True, slots=True)
class Touches:
    """A command: which pages, in which order.

    :ivar count: pages; of RAM from `first` on, all if 0.
    :ivar stride: pages between two touches; 0 is random order.
    :ivar writes: leave MARK on each page after it was checked.
    :ivar pause_us: between two touches of a thread.
    """

    first: int = 0
    count: int = 0
    stride: int = 0
    seed: int = 1
    threads: int = 1
    writes: bool = False
    pause_us: int = 0


class Guest:
    """RAM, what it should hold, and what was found."""

    def __init__(self, ram_fd: int, source_fd: int) -> None:
        size = _size(ram_fd)
        self.ram, self.expected = mmap.mmap(ram_fd, size), mmap.mmap(source_fd, size)
        self.page_count = size // PAGE
        self.uffd = open_missing([self.ram])

    def touch(self, touches: Touches) -> dict[str, Any]:
        """Touch the pages; return how many were wrong and how long each took."""
        pages = range(touches.first, touches.first + (touches.count or self.page_count))
        order = [page % self.page_count for page in pages]
        if touches.stride:
            order = [p for start in range(touches.stride) for p in order[start :: touches.stride]]
        else:
            random.Random(touches.seed).shuffle(order)
        took_ns = array.array("Q", bytes(8 * len(order)))
        wrong: list[int] = []
        threads = [
            threading.Thread(target=self._touch, args=(order, took_ns, i, touches, wrong))
            for i in range(touches.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"touched": len(order), "wrong": wrong[:10], "took_ns": _summary(took_ns)}

    def _touch(
        self,
        order: list[int],
        took_ns: array.array[int],
        first: int,
        touches: Touches,
        wrong: list[int],
    ) -> None:
        name, flag = _native.kernel_names("zero_scan")[0], bytearray(1)
        with memoryview(self.ram) as ram, memoryview(self.expected) as expected:
            for i in range(first, len(order), touches.threads):
                at = order[i] * PAGE
                with ram[at : at + 256] as start:  # waits without the interpreter's lock
                    began_ns = time.monotonic_ns()
                    _native.zero_scan(name, start, flag, 256)
                    took_ns[i] = time.monotonic_ns() - began_ns
                found = ram[at : at + PAGE]
                if found != expected[at : at + PAGE] and bytes(found[: len(MARK)]) != MARK:
                    wrong.append(order[i])
                if touches.writes:
                    found[: len(MARK)] = MARK
                found.release()
                if touches.pause_us:
                    time.sleep(touches.pause_us / 1e6)

    def count_marked(self) -> dict[str, int]:
        """Pages that still hold what was written: all that were, if none was overwritten."""
        marked = sum(
            self.ram[at : at + len(MARK)] == MARK for at in range(0, self.page_count * PAGE, PAGE)
        )
        return {"marked": marked}


def _size(fd: int) -> int:
    with open(fd, "rb", closefd=False) as file:
        return file.seek(0, 2)


def _summary(took_ns: array.array[int]) -> dict[str, Any]:
    ordered = sorted(took_ns)
    buckets = [0] * 24
    for value in ordered:
        buckets[min(23, max(0, (value // 1000).bit_length() - 1))] += 1
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[len(ordered) * 99 // 100],
        "max": ordered[-1],
        "sum": sum(ordered),
        "buckets": buckets,
    }


def main(fd: int) -> None:
    """Serve until the other end is closed."""
    with socket.socket(fileno=fd) as control:
        _, (ram_fd, source_fd), _, _ = socket.recv_fds(control, 16, 2)
        guest = Guest(ram_fd, source_fd)
        address = _native.mapping_address(guest.ram)
        socket.send_fds(control, [address.to_bytes(8, "little")], [guest.uffd])
        while command := control.recv(MESSAGE_BYTES_MAX):
            words = json.loads(command)
            answer = guest.touch(Touches(**words)) if words else guest.count_marked()
            control.send(json.dumps(answer).encode())


def command(touches: Touches | None) -> bytes:
    """A command as it is sent; None asks for `count_marked`."""
    return json.dumps(asdict(touches) if touches else {}).encode()


if __name__ == "__main__":
    main(int(sys.argv[1]))
