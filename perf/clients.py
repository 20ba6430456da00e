"""Many monitors at once: what they cost a migration, and how long each answer takes."""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    latencies_s: list[float] = field(default_factory=list)

    def ask(self, now_s: float, period_s: float) -> None:
        """Ask, if it is time and nothing is asked."""
        if self.asked_s == 0.0 and now_s >= self.due_s:
            self.asked_s = now_s
            self.due_s = max(self.due_s + period_s, now_s)
            self.socket.sendall(QUERY)

    def take(self, now_s: float) -> bool:
        """Read what came; False when the monitor is gone."""
        data = self.socket.recv(65536)
        if data.endswith(b"\n") and self.asked_s:
            self.latencies_s.append(now_s - self.asked_s)
            self.asked_s = 0.0
        return bool(data)


def poll(path: str, clients: int, rate_hz: float) -> list[float]:
    """Poll until standard input ends; all latencies in seconds."""
    period_s = 1 / rate_hz
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    pollers = []
    for index in range(clients):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        for request in (b"", NEGOTIATE):  # the greeting comes unasked
            connection.sendall(request)
            while not connection.recv(65536).endswith(b"\n"):
                continue
        poller = Poller(connection, time.monotonic() + period_s * index / clients)
        pollers.append(poller)
        selector.register(connection, selectors.EVENT_READ, poller)
    print("polling", flush=True)
    while True:
        wait_s = min(poller.due_s for poller in pollers) - time.monotonic()
        for key, _ in selector.select(max(0.0005, min(wait_s, period_s))):
            if key.fileobj is sys.stdin or not key.data.take(time.monotonic()):
                return [latency for poller in pollers for latency in poller.latencies_s]
        for poller in pollers:
            poller.ask(time.monotonic(), period_s)


async def clients_once(size: str, bandwidth: str, clients: int, rate_hz: float) -> dict[str, float]:
    """A migration without and one with clients that poll the source.

    :raise MigrationError: one failed, or a page was wrong."""
    alone_ms, _ = await _migrate(size, bandwidth, 0, rate_hz)
    crowded_ms, latencies_s = await _migrate(size, bandwidth, clients, rate_hz)
    latencies_s = sorted(latencies_s)
    return {
        "total_time_alone_ms": alone_ms,
        "total_time_with_clients_ms": crowded_ms,
        "total_time_ratio_with_clients_to_alone": crowded_ms / alone_ms,
        "answers": float(len(latencies_s)),
        "answer_median_ms": _quantile(latencies_s, 0.5) * 1000,
        "answer_p99_ms": _quantile(latencies_s, 0.99) * 1000,
        "answer_max_ms": latencies_s[-1] * 1000,
    }


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


async def _migrate(
    size: str, bandwidth: str, clients: int, rate_hz: float
) -> tuple[float, list[float]]:
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
        result = await (await source.migrate(destination)).result()
        latencies_s: list[float] = []
        if crowd is not None:
            output, _ = await asyncio.wait_for(crowd.communicate(b""), END_WAIT_S)
            latencies_s = json.loads(output)
        if not (await verify(source, destination)).is_right:
            raise MigrationError("a page is wrong at the destination")
        return float(result.total_time_ms), latencies_s


if __name__ == "__main__":
    print(json.dumps(poll(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
