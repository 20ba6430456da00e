"""Many monitors at once: what they cost a migration, and how long each answer takes."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from engine.api import Control, verify
from engine.errors import MigrationError

QUERY: Final = b'{"execute":"query-migrate"}\n'
NEGOTIATE: Final = b'{"execute":"qmp_capabilities"}\n'
END_WAIT_S: Final = 10.0


@dataclass
class Poller:
    """One client: asks at a fixed rate, never before the last answer is there."""

    socket: socket.socket
    due_s: float
    asked_s: float = 0.0


@dataclass
class Polled:
    """What all clients saw."""

    latencies_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0  #: that this process took for it


def poll(path: str, clients: int, rate_hz: float) -> Polled:
    """Poll until standard input ends.

    As cheap as can be, for it competes with what it measures: one process, the request ready made,
    and of an answer only its last byte is looked at."""
    crowd = _Crowd(path, clients, 1 / rate_hz)
    print("polling", flush=True)
    return crowd.run(sys.stdin.fileno())


class _Crowd:
    """All clients; those that have their answer stand in a queue in the order of their turns."""

    def __init__(self, path: str, clients: int, period_s: float) -> None:
        self._period_s = period_s
        self._epoll = select.epoll()
        self._waiting: deque[Poller] = deque()
        self._by_fd: dict[int, Poller] = {}
        self._polled = Polled()
        for index in range(clients):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            for request in (b"", NEGOTIATE):  # the greeting comes unasked
                connection.sendall(request)
                while not connection.recv(65536).endswith(b"\n"):
                    continue
            poller = Poller(connection, time.monotonic() + period_s * index / clients)
            self._waiting.append(poller)
            self._by_fd[connection.fileno()] = poller
            self._epoll.register(connection, select.EPOLLIN)

    def run(self, stop_fd: int) -> Polled:
        self._epoll.register(stop_fd, select.EPOLLIN)
        began_s = time.process_time()
        while True:
            wait_s = self._waiting[0].due_s - time.monotonic() if self._waiting else 1.0
            ready = self._epoll.poll(max(0.0, wait_s))
            now_s = time.monotonic()
            for fd, _ in ready:
                if fd == stop_fd or not self._take(self._by_fd[fd], now_s):
                    self._polled.cpu_s = time.process_time() - began_s
                    return self._polled
            while self._waiting and self._waiting[0].due_s <= now_s:
                poller = self._waiting.popleft()
                poller.asked_s = now_s
                poller.socket.send(QUERY)

    def _take(self, poller: Poller, now_s: float) -> bool:
        """Read what came; False when the monitor is gone."""
        data = poller.socket.recv(65536)
        if data.endswith(b"\n") and poller.asked_s:
            self._polled.latencies_s.append(now_s - poller.asked_s)
            poller.asked_s = 0.0
            poller.due_s += self._period_s
            if poller.due_s < now_s:  # it came late: the turn is lost
                poller.due_s = now_s
                self._waiting.appendleft(poller)
            else:
                self._waiting.append(poller)
        return bool(data)


async def clients_once(size: str, bandwidth: str, clients: int, rate_hz: float) -> dict[str, float]:
    """A migration without and one with clients that poll the source.

    :raise MigrationError: one failed, or a page was wrong."""
    alone_ms, alone_cpu_s, _ = await _migrate(size, bandwidth, 0, rate_hz)
    crowded_ms, crowded_cpu_s, polled = await _migrate(size, bandwidth, clients, rate_hz)
    latencies_s = sorted(polled.latencies_s)
    more_cpu_s = crowded_cpu_s - alone_cpu_s
    return {
        "total_time_alone_ms": alone_ms,
        "total_time_with_clients_ms": crowded_ms,
        "total_time_ratio_with_clients_to_alone": crowded_ms / alone_ms,
        "answers": float(len(latencies_s)),
        "control_cpu_per_answer_us": more_cpu_s / len(latencies_s) * 1e6,
        "client_cpu_per_answer_us": polled.cpu_s / len(latencies_s) * 1e6,
        "answer_median_ms": _quantile(latencies_s, 0.5) * 1000,
        "answer_p99_ms": _quantile(latencies_s, 0.99) * 1000,
        "answer_max_ms": latencies_s[-1] * 1000,
    }


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


async def _migrate(
    size: str, bandwidth: str, clients: int, rate_hz: float
) -> tuple[float, float, Polled]:
    """The total time in ms, the CPU time of the source's control process, what clients saw."""
    settings = [f"max-bandwidth={bandwidth}"]
    source = Control.start(f"workload:size={size},rate=20M", settings=settings)
    destination = Control.start(f"workload:size={size}", "tcp:127.0.0.1:0")
    async with source, destination:
        crowd = None
        if clients:
            line = [sys.executable, "-m", "perf.clients", source.qmp_path]
            crowd = await asyncio.create_subprocess_exec(
                *line, str(clients), str(rate_hz),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert crowd.stdout is not None
            await crowd.stdout.readline()
        began_cpu_s = _cpu_s(source.pid)
        result = await (await source.migrate(destination)).result()
        cpu_s = _cpu_s(source.pid) - began_cpu_s
        polled = Polled()
        if crowd is not None:
            output, _ = await asyncio.wait_for(crowd.communicate(b""), END_WAIT_S)
            polled = Polled(**json.loads(output))
        if not (await verify(source, destination)).is_right:
            raise MigrationError("a page is wrong at the destination")
        return float(result.total_time_ms), cpu_s, polled


def _cpu_s(pid: int) -> float:
    """All that its threads took so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(json.dumps(asdict(poll(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))))
