"""What all workers share: the inbox, complaints, the process entry point.

A worker is one process with one loop. Its socket pair to control carries orders, reports and
descriptors; its end of file is control's death, and the worker then ends at once.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from engine import _native, wire
from engine.errors import MigrationError
from engine.memory.blocks import RamBlock

log = logging.getLogger("ramferry.worker")

#: Private memory of a worker. libzmq bounds neither the parts of one message nor its connections,
#: so a hostile peer is bounded here: the worker dies and is replaced, the host is not harmed.
PRIVATE_MEMORY_MAX_BYTES: Final = 512 * 1024 * 1024

#: Postcopy's services, for users who may. Of 5000 faults beside a background, 0 to 15 took the
#: service 512 us or more (two cores, others' load 5); 24 to 314 without.
PROMPT_NICE: Final = -20
#: For those who may not: 4 to 44. Both together were no better than the nice value alone.
PROMPT_SLICE_NS: Final = 100_000

#: Multifd's workers, once the guest runs at the destination. vCPUs otherwise wait for a processor
#: when their page is there: p99 of a fault fell from 0.8-1.7 to 0.1-0.6 ms (three pairs, two cores,
#: others' load 4.6).
BACKGROUND_NICE: Final = 5

COMPLAINT_INTERVAL_NS: Final = 5_000_000_000

T = TypeVar("T")


class ParentGone(Exception):
    """Control has closed its end: nobody is left to report to."""


class Inbox(Generic[T]):
    """The worker's end of the socket pair; owns the socket."""

    def __init__(self, fd: int, orders: object, where: str) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._decoder: wire.Decoder[T] = wire.Decoder(orders, wire.ORDER_BYTES_MAX, where)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Give the socket back; a worker need not, it ends with it. Idempotent."""
        self._socket.close()

    def take(self) -> tuple[T, list[int]] | None:
        """The next order and the descriptors beside it (now ours), or None.

        :raise ParentGone: control is gone."""
        fds = array.array("i")
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                wire.ORDER_BYTES_MAX + 1,
                socket.CMSG_SPACE(wire.DESCRIPTORS_MAX * fds.itemsize),
                socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return None
        except OSError as exc:
            raise ParentGone from exc
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not data:
            raise ParentGone
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise MigrationError("an order from control was cut: too long or too many descriptors")
        return self._decoder.decode(data), list(fds)

    def check(self) -> None:
        """For long work between two orders.

        :raise ParentGone: control is gone."""
        poll = select.poll()
        poll.register(self._socket, 0)  # a hang-up is always told
        if poll.poll(0):
            raise ParentGone

    def report(self, message: wire.Message) -> None:
        """Tell control; reports are few, so a full socket is waited for."""
        self._socket.setblocking(True)
        try:
            self._socket.send(wire.encode(message))
        except OSError as exc:
            raise ParentGone from exc
        finally:
            self._socket.setblocking(False)


class Complaints:
    """Log lines that a stranger could cause without end: the first one, then one in a while that
    says how many there were."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._said_ns: int | None = None
        self._unsaid = 0

    def say(self, text: str) -> None:
        """Log `text`, or count it."""
        now_ns = self._clock_ns()
        if self._said_ns is not None and now_ns - self._said_ns < COMPLAINT_INTERVAL_NS:
            self._unsaid += 1
            return
        log.warning("%s%s", text, f" ({self._unsaid} more before)" if self._unsaid else "")
        self._said_ns, self._unsaid = now_ns, 0


def blocks_of(shapes: Sequence[wire.BlockShape], fds: Sequence[int]) -> list[RamBlock]:
    """RAM blocks as this worker sees them, on its own descriptors."""
    return [
        RamBlock(shape.name, shape.size, fd, shape.backing_page_size)
        for shape, fd in zip(shapes, fds, strict=True)
    ]


def _schedule(is_prompt: bool) -> None:
    """Wishes: where they are refused, the worker competes as others do."""
    with contextlib.suppress(OSError):
        if not is_prompt:  # pre-empt each other and vCPUs less: 6 % less CPU time
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            return
        answer_promptly()


def answer_promptly() -> None:
    """This process goes before others when it is woken, but not what it starts. Where somebody has
    scheduled it otherwise, that stays."""
    if os.sched_getscheduler(0) != os.SCHED_OTHER or os.getpriority(os.PRIO_PROCESS, 0):
        return
    with contextlib.suppress(OSError):
        try:
            policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, policy, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, 0, PROMPT_NICE)
        except PermissionError:
            _native.schedule_slice(PROMPT_SLICE_NS)


def give_way() -> None:
    """From now on vCPUs, page service and fault service go before all threads of this worker."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # one that has ended
            os.setpriority(os.PRIO_PROCESS, int(thread), BACKGROUND_NICE)


def allow_private_memory(more_bytes: int) -> None:
    """Bound this worker's memory, with room for what control has ordered it to keep."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = PRIVATE_MEMORY_MAX_BYTES + more_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def run_worker(role: str, loop: Callable[[int], None], *, is_prompt: bool = False) -> int:
    """Process entry: run `loop` on the inherited socket until control is gone or the loop ends.

    Expected failures were reported by the loop; what arrives here ends the process with one
    line. `is_prompt`: somebody waits for each thing that the worker does."""
    _schedule(is_prompt)
    logging.basicConfig(format=f"ramferry {role}[{os.getpid()}]: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for control, which then stops us
    allow_private_memory(0)
    try:
        loop(int(sys.argv[1]))
    except ParentGone:
        return 0
    except MigrationError as exc:
        log.error("%s", exc)
        return 1
    return 0
