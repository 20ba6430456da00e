"""The same for a real QEMU: its guest touches its RAM at random, and QEMU says what that cost.

Its boot sector goes to protected mode and increments a word of a page, for ever: the page's number
is 256 + (state >> 8 & mask), and state = 1664525 * state + 1013904223.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from engine.errors import MigrationError
from engine.memory.blocks import PAGE_SIZE
from perf.image import SHARED_MEMORY, write_image
from perf.pair import QEMU, RUN_WAIT_S, Side, Way, command, prepare, side

FIRST_PAGE: Final = 256
#: Assembled from: cli; A20; lgdt; protected mode; flat segments; then imul, add, shr, and, add,
#: shl, `incl 8(%ebx)`, jmp. MASK_AT is the mask's place, behind the code.
SECTOR: Final = bytes.fromhex(
    "fa31c08ed8660f0116747ce4920c02e6920f20c06683c8010f22c066ea237c00"
    "00080066b810008ed88ec08ed0b80100000069c00d661900055ff36e3c89c3c1"
    "eb08231d587c000081c300010000c1e30cff4308ebdc66900000000000000000"
    "00000000ffff0000009acf00ffff00000092cf0017005c7c0000"
)
MASK_AT: Final = 0x58
SECTOR_BYTES: Final = 512
FLOPPY_BYTES: Final = 1_474_560
#: Next to nothing before the switch, and no limit after it.
LIMITS: Final = {"max-bandwidth": 1_000_000, "max-postcopy-bandwidth": 0}
BOOT_S: Final = 4.0  #: the firmware's, without hardware's help, on a busy machine


def write_boot_disk(path: Path, touched_bytes: int) -> None:
    """:param touched_bytes: from 1 MiB on; a power of two."""
    mask = touched_bytes // PAGE_SIZE - 1
    assert mask & (mask + 1) == 0, "whoever calls rounds"
    sector = bytearray(SECTOR.ljust(SECTOR_BYTES - 2, b"\0") + b"\x55\xaa")
    sector[MASK_AT : MASK_AT + 4] = mask.to_bytes(4, "little")
    path.write_bytes(bytes(sector).ljust(FLOPPY_BYTES, b"\0"))


async def faults_once(size: int, *, preempt: bool) -> dict[str, float]:
    """One migration to postcopy at once.

    :param size: of what is touched; the guest has 2 MiB more.
    :raise MigrationError: QEMU failed, or its guest touched nothing."""
    with (
        tempfile.TemporaryDirectory(prefix="ramferry-bench-", dir=SHARED_MEMORY) as memory,
        tempfile.TemporaryDirectory(prefix="ramferry-bench-") as directory,
    ):
        image, copy, disk = Path(memory) / "image", Path(memory) / "copy", Path(directory) / "boot"
        total = size + 2 * 1024 * 1024
        write_image(image, total, "random")
        write_boot_disk(disk, size)
        drive = ["-drive", f"if=floppy,format=raw,file={disk},readonly=on", "-boot", "a"]
        lines = [
            _running(command("qemu", ram, total, Path(directory) / name, incoming=incoming)) + drive
            for name, ram, incoming in (("s", image, False), ("d", copy, True))
        ]
        async with (
            side(lines[0], Path(directory) / "s") as source,
            side(lines[1], Path(directory) / "d") as destination,
        ):
            return await _migrate(source, destination, preempt=preempt)


def _running(line: list[str]) -> list[str]:
    """Without `-S`: a destination with it keeps the guest stopped."""
    return [word for word in line if word != "-S"]


async def _migrate(source: Side, destination: Side, *, preempt: bool) -> dict[str, float]:
    capabilities = ["events", "postcopy-ram", "postcopy-blocktime"]
    capabilities += ["postcopy-preempt"] if preempt else []
    uri = await prepare(source, destination, Way(), LIMITS, capabilities)
    await asyncio.sleep(BOOT_S)
    ends = [asyncio.ensure_future(one.end_of_migration()) for one in (source, destination)]
    await source.client.execute("migrate", {"uri": uri})
    await source.client.execute("migrate-start-postcopy")
    statuses = await asyncio.wait_for(asyncio.gather(*ends), RUN_WAIT_S)
    if statuses != ["completed", "completed"]:
        raise MigrationError(f"QEMU's migration ended as {statuses}")
    told: Any = await source.client.execute("query-migrate")
    blocked: Any = await destination.client.execute("query-migrate")
    requests = told["ram"]["postcopy-requests"]
    if not requests:
        raise MigrationError("QEMU's guest asked for no page: it did not boot")
    waited_ms = sum(blocked["postcopy-vcpu-blocktime"])
    return {
        "fault_mean_us": waited_ms * 1000 / requests,
        "faults": float(requests),
        "blocktime_ms": float(blocked["postcopy-blocktime"]),
        "downtime_ms": float(told["downtime"]),
        "total_time_ms": float(told["total-time"]),
    }


def is_there() -> bool:
    return shutil.which(QEMU) is not None
