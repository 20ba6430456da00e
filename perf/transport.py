"""A request of 56 bytes and an answer of one page, between two processes: ZeroMQ or plain TCP.

`python -m perf.transport KIND ENDPOINT` answers until the other end is gone; both ends are Python,
so the difference is the transport's.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import Final

import zmq

REQUEST: Final = bytes(56)
ANSWER: Final = bytes(56 + 4096)
KINDS: Final = ("tcp", "zeromq")
WAIT_S: Final = 20


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return b""
        data += part
    return data


def round_trips(kind: str, count: int) -> list[int]:
    """How long each took, in ns."""
    return _tcp(count) if kind == "tcp" else _zeromq(count)


def _answerer(kind: str, where: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "perf.transport", kind, where])


def _tcp(count: int) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)
        with _answerer("tcp", str(listener.getsockname()[1])) as child:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                took = []
                for _ in range(count):
                    began_ns = time.monotonic_ns()
                    connection.sendall(REQUEST)
                    _read(connection, len(ANSWER))
                    took.append(time.monotonic_ns() - began_ns)
            child.wait(WAIT_S)
    return took


def _zeromq(count: int) -> list[int]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = WAIT_S * 1000
        port = dealer.bind_to_random_port("tcp://127.0.0.1")
        with _answerer("zeromq", f"tcp://127.0.0.1:{port}") as child:
            took = []
            for _ in range(count):
                began_ns = time.monotonic_ns()
                dealer.send(REQUEST)
                dealer.recv()
                took.append(time.monotonic_ns() - began_ns)
            dealer.send(b"")
            child.wait(WAIT_S)
    return took


def main(kind: str, where: str) -> None:
    """Answer."""
    if kind == "tcp":
        with socket.create_connection(("127.0.0.1", int(where))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while _read(connection, len(REQUEST)):
                connection.sendall(ANSWER)
        return
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = WAIT_S * 1000
        dealer.connect(where)
        while dealer.recv():
            dealer.send(ANSWER)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
