"""Worker processes as control sees them: started, ordered, heard, and noticed when they die.

A worker is started with exec on one end of a socket pair; the other end belongs to its `Worker`
object here. End of file there is its death. Starting an interpreter takes longer than a small
migration, so a `Pool` keeps workers that wait for their first order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from engine import wire
from engine.errors import WireError, WorkerLost

log = logging.getLogger("ramferry.pool")

REPORT_WAIT_S: Final = 20.0  #: a worker that does not answer an order for so long counts as dead
END_WAIT_S: Final = 5.0
SOCKET_BUFFER_BYTES: Final = 1024 * 1024

MODULES: Final = {
    "sender": "engine.multifd.sender",
    "receiver": "engine.multifd.receiver",
    "faults": "engine.postcopy.faults",
    "pages": "engine.postcopy.pages",
}

#: glibc maps and unmaps each large message by default; reuse the memory instead (the most it
#: takes).
WORKER_ENVIRONMENT: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024 * 1024),
    "MALLOC_ARENA_MAX": "2",
    "PYTHONUNBUFFERED": "1",
}

R = TypeVar("R")


class Worker(Generic[R]):
    """One worker process; owns the process and our end of its socket pair.

    `on_report` gets each report, `on_lost` once the reason when the process is gone; neither is
    called after `end`.
    """

    def __init__(self, role: str, reports: Any) -> None:
        self.role = role
        self.index = -1
        self.on_report: Callable[[R], None] | None = None
        self.on_lost: Callable[[WorkerLost], None] | None = None
        self._decoder: wire.Decoder[R] = wire.Decoder(reports, wire.ORDER_BYTES_MAX, role)
        self._backlog: list[R] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                ours.setblocking(False)
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", MODULES[role], str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | WORKER_ENVIRONMENT,
                )
            except OSError as exc:
                ours.close()
                raise WorkerLost(role, -1, f"cannot be started: {exc.strerror}") from exc
        self._socket: socket.socket | None = ours
        asyncio.get_running_loop().add_reader(ours, self._read)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._socket is not None

    def order(self, message: wire.Message, fds: Sequence[int] = ()) -> None:
        """Send an order; orders are few and small, so a full socket means a worker that hangs.

        :raise WorkerLost: it is gone or does not read; it is ended."""
        if self._socket is None:
            raise WorkerLost(self.role, self.index, "it is not running")
        try:
            socket.send_fds(self._socket, [wire.encode(message)], list(fds))
        except OSError as exc:
            self._lose(f"it takes no orders: {exc.strerror}")
            raise WorkerLost(self.role, self.index, "it takes no orders") from exc

    def listen(self, on_report: Callable[[R], None], on_lost: Callable[[WorkerLost], None]) -> None:
        """Hear everything from now on, and what came before."""
        self.on_report, self.on_lost = on_report, on_lost
        backlog, self._backlog = self._backlog, []
        for report in backlog:
            on_report(report)

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(wire.ORDER_BYTES_MAX + 1)
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(exc.strerror or "its socket failed")
            return
        if not data:
            self._lose("the process died")
            return
        try:
            report = self._decoder.decode(data)
        except WireError as exc:
            self._lose(str(exc))
            return
        if self.on_report is None:
            self._backlog.append(report)
        else:
            self.on_report(report)

    def _lose(self, reason: str) -> None:
        on_lost = self.on_lost
        self._close()
        level = logging.DEBUG if self.index < 0 else logging.WARNING  # idle ones are replaced
        log.log(level, "%s %d (pid %d): %s", self.role, self.index, self.pid, reason)
        if on_lost is not None:
            on_lost(WorkerLost(self.role, self.index, reason))

    def give_up(self, reason: str) -> None:
        """It said that it cannot go on: from now on it is lost."""
        if self._socket is not None:
            self._lose(reason)

    def _close(self) -> None:
        """Stop listening and kill: whoever lost the control socket has no work left."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            self._process.send_signal(signal.SIGKILL)
        self.on_report = self.on_lost = None

    async def end(self) -> None:
        """Kill the process and reap it: when this returns it touches no memory. Idempotent."""
        self._close()
        await asyncio.get_running_loop().run_in_executor(None, self._process.wait)


class Pool(Generic[R]):
    """Workers of one role that wait for their first order; owns those that nobody took yet."""

    def __init__(self, role: str, reports: Any) -> None:
        self._role, self._reports = role, reports
        self._idle: list[Worker[R]] = []
        self._dead: list[Worker[R]] = []  #: died while nobody had taken them; `close` reaps them

    def warm(self, count: int) -> None:
        """Have `count` workers waiting; too many are ended by `close` only."""
        self._dead += [worker for worker in self._idle if not worker.is_alive]
        self._idle = [worker for worker in self._idle if worker.is_alive]
        while len(self._idle) < count:
            self._idle.append(Worker(self._role, self._reports))

    def take(self, index: int) -> Worker[R]:
        """Hand over a worker, which the caller now owns, as number `index`.

        :raise WorkerLost: none can be started."""
        while self._idle:
            worker = self._idle.pop(0)
            if worker.is_alive:
                break
            self._dead.append(worker)
        else:
            worker = Worker(self._role, self._reports)
        worker.index = index
        return worker

    async def close(self) -> None:
        """End those that wait. Idempotent."""
        ours, self._idle, self._dead = [*self._idle, *self._dead], [], []
        await asyncio.gather(*(worker.end() for worker in ours))


def sender_pool() -> Pool[wire.SenderReport]:
    """Workers of the source."""
    return Pool("sender", wire.SenderReport)


def receiver_pool() -> Pool[wire.ReceiverReport]:
    """Workers of the destination."""
    return Pool("receiver", wire.ReceiverReport)


def page_service_pool() -> Pool[wire.PagesReport]:
    """Of the source, in postcopy."""
    return Pool("pages", wire.PagesReport)


def fault_service_pool() -> Pool[wire.FaultsReport]:
    """Of the destination, in postcopy."""
    return Pool("faults", wire.FaultsReport)
