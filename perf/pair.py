"""Two processes of one engine, driven over QMP: QEMU and ramferry differ by command line only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from qemu.qmp import ExecuteError, QMPClient, QMPError

from engine.errors import MigrationError
from perf.codec import NONE, Codec
from perf.links import Link

START_WAIT_S: Final = 30.0
RUN_WAIT_S: Final = 300.0
IDLE_S: Final = 0.3
IDLE_USED_S: Final = 0.003  #: who used less in that time has nothing to do
QEMU: Final = "qemu-system-x86_64"
LOOPBACK: Final = "127.0.0.1"
#: Has the kernel end what it runs when this process ends, however it ends.
END_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "TERM", "--")
PROBE_SIZE: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine with a codec."""

    engine: str
    codec: Codec = NONE

    def __str__(self) -> str:
        return f"{self.engine} {self.codec}"


@dataclass(frozen=True, slots=True)
class Way:
    """How two sides are connected.

    :ivar link: None is the loopback."""

    channels: int = 2
    link: Link | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One migration.

    :ivar total_time_ms: as the engine itself says.
    :ivar wall_time_ms: from `migrate` to the later of both sides' `completed` events.
    :ivar cpu_before_migrate_s: of all processes of both sides, to start.
    :ivar cpu_s: of the same, from `migrate` until both sides are idle again: the ends of
        ramferry's workers, which unmap RAM, count; QEMU unmaps it when it ends.
    :ivar cpu_to_exit_s: of the same, from `migrate` until all have ended.
    :ivar wire_bytes: sent by the source, as the engine itself says.
    :ivar link_bytes: sent by the source, as its end of the link counts; 0 on the loopback.
    """

    total_time_ms: int
    wall_time_ms: float
    cpu_before_migrate_s: float
    cpu_s: float
    cpu_to_exit_s: float
    normal_pages: int
    zero_pages: int
    different_pages: int
    wire_bytes: int
    link_bytes: int


def command(engine: str, ram: Path, size: int, qmp: Path, *, incoming: bool) -> list[str]:
    """The command line of one side."""
    if engine == "qemu":
        backend = f"memory-backend-file,id=ram,size={size},mem-path={ram},share=on"
        line = [QEMU, "-machine", "pc,accel=tcg,memory-backend=ram", "-object", backend]
        line += ["-m", f"size={size}B", "-S", "-nodefaults", "-display", "none"]
        line += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    else:
        line = [sys.executable, "-m", "engine.cli", "serve", "--qmp", f"unix:{qmp}"]
        line += ["--guest", f"ram:size={size},path={ram}"]
    return [*line, "-incoming" if engine == "qemu" else "--incoming", "defer"] if incoming else line


class Side:
    """One process and its QMP client."""

    def __init__(self, process: asyncio.subprocess.Process, client: QMPClient) -> None:
        self.process, self.client = process, client

    def cpu_s(self) -> float:
        """Processor time so far: own, of children, of children that have ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            times = own.cpu_times()
            living = [own.pid, *(child.pid for child in own.children(recursive=True))]
            ended: float = times.children_user + times.children_system
            return ended + sum(map(_process_clock_s, living))
        return 0.0

    async def end_of_migration(self) -> str:
        """The final status, by its event."""
        async for event in self.client.events:
            if event["event"] == "MIGRATION":
                data: Any = event["data"]
                status: str = data["status"]
                if status in ("completed", "failed", "cancelled"):
                    return status
        raise MigrationError("the monitor was closed during the migration")


@contextlib.asynccontextmanager
async def side(line: list[str], qmp: Path) -> AsyncIterator[Side]:
    """Start a process and connect to its monitor; both are gone afterwards."""
    if shutil.which(END_WITH_PARENT[0]) is not None:
        line = [*END_WITH_PARENT, *line]
    process = await asyncio.create_subprocess_exec(*line, stderr=asyncio.subprocess.DEVNULL)
    client = QMPClient(qmp.name)
    try:
        async with asyncio.timeout(START_WAIT_S):
            while True:
                client = QMPClient(qmp.name)
                try:
                    await client.connect(str(qmp))
                    break
                except QMPError:
                    if process.returncode is not None:
                        raise MigrationError(f"'{' '.join(line)}' does not start") from None
                    await asyncio.sleep(0.02)
        yield Side(process, client)
    finally:
        is_quitting = False
        with contextlib.suppress(QMPError, EOFError, OSError):
            await client.execute("quit")
            is_quitting = True
        with contextlib.suppress(QMPError, EOFError, OSError):
            await client.disconnect()
        if not is_quitting:  # it was not connected yet
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 20)
        if process.returncode is None:
            process.kill()
            await process.wait()


async def refusals(engine: str, codecs: Iterable[Codec]) -> dict[Codec, str]:
    """Those of the codecs that an engine cannot do, and what it says to them."""
    refused = {}
    with tempfile.TemporaryDirectory(prefix="ramferry-bench-") as directory:
        ram, qmp = Path(directory) / "ram", Path(directory) / "qmp"
        ram.touch()
        os.truncate(ram, PROBE_SIZE)
        async with side(command(engine, ram, PROBE_SIZE, qmp, incoming=False), qmp) as one:
            for codec in codecs:
                try:
                    await one.client.execute("migrate-set-parameters", {**codec.parameters()})
                except ExecuteError as exc:
                    refused[codec] = str(exc)
    return refused


async def migrate_once(contender: Contender, image: Path, size: int, way: Way) -> Run:
    """Move the image once, guests stopped, no limit; compare every page after.

    :raise MigrationError: an engine failed."""
    directory = Path(tempfile.mkdtemp(prefix="ramferry-bench-"))
    ram = image.parent / f"{directory.name}-ram"
    try:
        source_line, destination_line = (
            command(contender.engine, where, size, directory / name, incoming=incoming)
            for name, where, incoming in (("s", image, False), ("d", ram, True))
        )
        if way.link is not None:
            source_line = way.link.source.inside(source_line)
            destination_line = way.link.destination.inside(destination_line)
        ended_s = _ended_children_cpu_s()
        async with (
            side(source_line, directory / "s") as source,
            side(destination_line, directory / "d") as destination,
        ):
            run = await _migrate(source, destination, contender.codec, way)
            run = replace(run, different_pages=different_pages(image, ram))
        used_s = _ended_children_cpu_s() - ended_s
        return replace(run, cpu_to_exit_s=used_s - run.cpu_before_migrate_s)
    finally:
        ram.unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


async def prepare(
    source: Side,
    destination: Side,
    way: Way,
    parameters: Mapping[str, object],
    capabilities: Sequence[str] = ("multifd", "events"),
) -> str:
    """Set both sides, let the destination wait; return the URI for the source."""
    wanted = [{"capability": name, "state": True} for name in capabilities]
    for one in (source, destination):
        chosen = {"max-bandwidth": 0, "multifd-channels": way.channels, **parameters}
        await one.client.execute("migrate-set-parameters", chosen)
        await one.client.execute("migrate-set-capabilities", {"capabilities": wanted})
    host = LOOPBACK if way.link is None else way.link.destination.address
    await destination.client.execute("migrate-incoming", {"uri": f"tcp:{host}:0"})
    info: Any = await destination.client.execute("query-migrate")
    return f"tcp:{host}:{info['socket-address'][0]['port']}"


async def _migrate(source: Side, destination: Side, codec: Codec, way: Way) -> Run:
    """All but `cpu_to_exit_s` and `different_pages`, which are known later."""
    await source.client.execute("stop")
    uri = await prepare(source, destination, way, codec.parameters())
    before_s = await _settled_cpu_s(source, destination)
    link_before = way.link.source.sent_bytes() if way.link else 0
    ends = [asyncio.ensure_future(one.end_of_migration()) for one in (source, destination)]
    began = time.monotonic()
    await source.client.execute("migrate", {"uri": uri})
    statuses = await asyncio.wait_for(asyncio.gather(*ends), RUN_WAIT_S)
    wall_time_ms = (time.monotonic() - began) * 1000
    if statuses != ["completed", "completed"]:
        raise MigrationError(f"a benchmark's migration ended as {statuses}")
    link_bytes = way.link.source.sent_bytes() - link_before if way.link else 0
    cpu_s = await _settled_cpu_s(source, destination) - before_s
    answer: Any = await source.client.execute("query-migrate")
    return Run(
        total_time_ms=answer["total-time"],
        wall_time_ms=wall_time_ms,
        cpu_before_migrate_s=before_s,
        cpu_s=cpu_s,
        cpu_to_exit_s=0.0,
        normal_pages=answer["ram"]["normal"],
        zero_pages=answer["ram"]["duplicate"],
        different_pages=0,
        wire_bytes=answer["ram"]["transferred"],
        link_bytes=link_bytes,
    )


async def _settled_cpu_s(*sides: Side) -> float:
    """Wait until both sides have nothing to do; return what they have used so far."""
    deadline = time.monotonic() + START_WAIT_S
    used, now = -1.0, sum(side.cpu_s() for side in sides)
    while now - used > IDLE_USED_S and time.monotonic() < deadline:
        await asyncio.sleep(IDLE_S)
        used, now = now, sum(side.cpu_s() for side in sides)
    return now


def _process_clock_s(pid: int) -> float:
    """Processor time of another process, threads that ended included (clock_getcpuclockid(3));
    /proc counts in ticks of 10 ms, cut off for each process."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2) / 1e9
    except OSError:  # it has ended
        return 0.0


def _ended_children_cpu_s() -> float:
    """Processor time of all children of this process, and theirs, that were waited for."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def different_pages(one: Path, other: Path) -> int:
    """Pages of two files that are not the same (a QEMU guest's reset writes a few)."""
    a = np.memmap(one, dtype=np.uint64, mode="r").reshape(-1, 512)
    b = np.memmap(other, dtype=np.uint64, mode="r").reshape(-1, 512)
    return sum(
        int(np.count_nonzero((a[i : i + 8192] != b[i : i + 8192]).any(axis=1)))
        for i in range(0, len(a), 8192)
    )
