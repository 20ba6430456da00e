"""A link of a chosen rate between two network namespaces: a veth pair behind `tc tbf`.

The namespaces have no names: a descriptor of this process and the processes inside are all that
hold them, so the kernel takes them and the link back however their owner ends, kill -9 included.
The rate is the link's, Ethernet headers included: at an MTU of 1500 TCP gets 95.6 % of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import MigrationError, UsageError

TOOLS: Final = ("ip", "tc", "nsenter")
RUN_WAIT_S: Final = 20.0
CLONE_NEWNET: Final = 0x40000000
INTERFACE: Final = "wire"
ADDRESSES: Final = ("10.83.0.1", "10.83.0.2")
UNSHAPED: Final = 0
MTU: Final = 1500
#: What TCP over IPv4 with time stamps gets of each full frame, as `tbf` counts it.
PAYLOAD_SHARE: Final = (MTU - 52) / (MTU + 14)
#: The bucket holds what passes in a tick of a kernel with HZ=250, and never less than two segments
#: of generic offload. At 10 Gbit/s on 2 busy cores a bucket of 1 ms gave 68 to 98 % of the rate,
#: for tbf's timer comes late there; 4 ms gave 97 to 99 %, and at lower rates 99.6 to 100 %.
BURST_MS: Final = 4
BURST_BYTES_MIN: Final = 2 * 64 * 1024
QUEUE_MS: Final = 20

_UNITS: Final = {"K": 10**3, "M": 10**6, "G": 10**9}


def parse_rate(text: str) -> int:
    """Bits per second of `100M`, `2.5G`, a plain number; 0 of `unshaped`.

    :raise UsageError: it is none of these."""
    if text == "unshaped":
        return UNSHAPED
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        rate = round(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        rate = 0
    if not 10**6 <= rate <= 10**12:
        raise UsageError(f"rate '{text[:100]}': 1M to 1000G bits a second, or unshaped")
    return rate


def rate_text(rate: int) -> str:
    """A rate for people."""
    if rate == UNSHAPED:
        return "unshaped"
    return f"{rate / 1e9:g} Gbit/s" if rate >= 10**9 else f"{rate / 1e6:g} Mbit/s"


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link: a network namespace that its link owns.

    :ivar descriptor: of the namespace, in the process that made the link."""

    address: str
    descriptor: int

    @property
    def path(self) -> str:
        """The namespace, for other processes."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def inside(self, line: Sequence[str]) -> list[str]:
        """The command line that runs `line` in this namespace, as the process that is started:
        nsenter replaces itself, so pid and signals are those of `line`."""
        return ["nsenter", f"--net={self.path}", "--", *line]

    def sent_bytes(self) -> int:
        """What this end has sent so far, headers included; those of segments that the kernel
        would still have to split count once."""
        links: Any = json.loads(
            _run(*self.inside(["ip", "-json", "-stats", "link", "show", INTERFACE]))
        )
        return int(links[0]["stats64"]["tx"]["bytes"])


def sent_bytes_around(pid: int) -> int:
    """What the end that a process is inside of has sent so far: cheaper than to ask a tool.

    :raise MigrationError: the process is in no link, or gone."""
    try:
        for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == INTERFACE:
                return int(counts.split()[8])
    except OSError as exc:
        raise MigrationError(f"process {pid} is gone") from exc
    raise MigrationError(f"process {pid} is in no link")


class Link:
    """Two namespaces and a wire between them; `make_link` owns them."""

    def __init__(self, source: End, destination: End) -> None:
        self.source, self.destination = source, destination

    def set_rate(self, rate: int) -> None:
        """Change the rate of both directions, also while the link is in use.

        :param rate: bits per second, or UNSHAPED."""
        for end in (self.source, self.destination):
            if rate == UNSHAPED:
                _run(*end.inside(["tc", "qdisc", "replace", "dev", INTERFACE, "root", "noqueue"]))
                continue
            burst = max(BURST_BYTES_MIN, rate // 8 * BURST_MS // 1000)
            shape = ["tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", f"{QUEUE_MS}ms"]
            line = ["tc", "qdisc", "replace", "dev", INTERFACE, "root", "handle", "1:", *shape]
            _run(*end.inside(line))


@contextmanager
def make_link(rate: int) -> Iterator[Link]:
    """A link of `rate` bits per second for as long as the block lasts.

    End what runs inside before: a process keeps its namespace.

    :raise UsageError: not root, or a tool is missing.
    :raise MigrationError: the kernel refused."""
    check_possible()
    with ExitStack() as stack:
        ends = []
        for address in ADDRESSES:
            descriptor = _new_namespace()
            stack.callback(os.close, descriptor)
            ends.append(End(address, descriptor))
        source, destination = ends
        pair = ["link", "add", INTERFACE, "type", "veth"]
        peer = ["peer", "name", INTERFACE, "netns", destination.path]
        _run(*source.inside(["ip", *pair, *peer]))
        for end in ends:
            _run(*end.inside(["ip", "address", "add", f"{end.address}/30", "dev", INTERFACE]))
            for name in ("lo", INTERFACE):
                _run(*end.inside(["ip", "link", "set", name, "up"]))
        link = Link(source, destination)
        link.set_rate(rate)
        yield link


def check_possible() -> None:
    """:raise UsageError: a link cannot be made here, and why."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise UsageError(
            f"a shaped link needs {', '.join(missing)}; on Debian: apt install iproute2 util-linux"
        )
    if os.geteuid() != 0:
        raise UsageError("a shaped link needs root: it is made of network namespaces")


def _new_namespace() -> int:
    """A descriptor of a new, empty one. Only a thread of ours enters it, and ends."""

    def unshare() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(unshare).result()
        except OSError as exc:
            raise MigrationError("no network namespace can be made here") from exc


def _run(*command: str) -> str:
    """Run a tool; return what it printed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=RUN_WAIT_S
        )
    except subprocess.TimeoutExpired as exc:
        raise MigrationError(f"'{' '.join(command)}' hangs") from exc
    if done.returncode:
        raise MigrationError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
    return done.stdout
