"""A QEMU's RAM, found from outside: its backends by QMP, their files and mappings by /proc."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping as Dictionary
from typing import Any, Final

from engine.errors import GuestError, MemoryRefused, shown
from engine.guest.foreign import ForeignBlock, check_whole, open_block
from engine.guest.mappings import Mapping, read_mappings
from engine.guest.qmpclient import QmpClient, QmpRefused
from engine.guest.sharers import check_still_alone
from engine.wire import BLOCKS_MAX

FILE_TYPES: Final = ("memory-backend-file", "memory-backend-memfd", "memory-backend-shm")
NAMED_ONLY_VERSION: Final = (8, 1)  #: from here on `x-ignore-shared` is for files with a name only
SHARED: Final = (
    "-object memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/NAME,share=on "
    "-machine TYPE,memory-backend=ram"
)
#: A line of `info ramblock` with an address (since QEMU 8.1): name, 4 columns of sizes, address.
RAMBLOCK: Final = re.compile(r"^\s*(\S+)\s+\d+ [KMGT]iB(?:\s+0x[0-9a-f]+){3}\s+0x([0-9a-f]+)")


def find_blocks(
    qmp: QmpClient, pid: int, back_ends: frozenset[int] = frozenset()
) -> list[ForeignBlock]:
    """All of the QEMU's RAM backends, sorted by name; the caller closes their descriptors.

    :param back_ends: processes that may map them, too.
    :raise GuestError: QEMU does not answer.
    :raise MemoryRefused: one line that says what is missing."""
    backends = qmp.execute("query-memdev")
    if not backends:
        raise MemoryRefused(f"this QEMU's RAM has no memory backend; start it with {SHARED}")
    if len(backends) > BLOCKS_MAX:
        raise MemoryRefused(f"{len(backends)} memory backends; {BLOCKS_MAX} can be migrated")
    try:
        mappings = read_mappings(pid)
    except OSError as exc:
        raise _not_ours(pid, exc) from exc
    types, addresses = _types(qmp), _addresses(qmp)
    with contextlib.ExitStack() as undo:
        blocks = []
        for backend in sorted(backends, key=lambda each: str(each["id"])):
            name, size = str(backend["id"]), int(backend["size"])
            _check_shared(name, types.get(name, ""), bool(backend.get("share")))
            _check_named(name, types[name], qmp.version)
            found = _find(name, size, addresses, _path_of(qmp, name, types[name]), mappings)
            fd = _open(pid, found)
            undo.callback(os.close, fd)
            blocks.append(ForeignBlock(open_block(name, fd, size), found.start))
        check_still_alone(blocks, pid, back_ends)
        undo.pop_all()
    return blocks


def _not_ours(pid: int, exc: OSError) -> MemoryRefused:
    return MemoryRefused(
        f"the memory of QEMU (pid {pid}) cannot be looked at: {exc.strerror}; run ramferry as its "
        "user or root"
    )


def _types(qmp: QmpClient) -> dict[str, str]:
    """Type of each object by its id."""
    children = qmp.execute("qom-list", {"path": "/objects"})
    return {
        each["name"]: each["type"].removeprefix("child<").removesuffix(">") for each in children
    }


def _check_shared(name: str, kind: str, is_shared: bool) -> None:
    if kind not in FILE_TYPES or not is_shared:
        raise MemoryRefused(
            f"memory backend '{shown(name)}' ({kind or 'unknown'}) is not shared; start QEMU with "
            f"{SHARED}"
        )


def _check_named(name: str, kind: str, version: tuple[int, int]) -> None:
    """QEMU would put the RAM itself into its device state."""
    if kind != "memory-backend-file" and version >= NAMED_ONLY_VERSION:
        raise MemoryRefused(
            f"this QEMU leaves shared RAM to others only if it has a file; memory backend "
            f"'{shown(name)}' is a {kind}: start QEMU with {SHARED}"
        )


def _addresses(qmp: QmpClient) -> dict[str, int]:
    """Where QEMU maps each block, or nothing where it does not tell (before 8.1)."""
    try:
        table = qmp.execute("human-monitor-command", {"command-line": "info ramblock"})
    except QmpRefused:
        return {}
    found = (RAMBLOCK.match(line) for line in str(table).splitlines())
    return {each[1].removeprefix("/objects/"): int(each[2], 16) for each in found if each}


def _path_of(qmp: QmpClient, name: str, kind: str) -> str:
    """Path of a backend's file; empty for those that have none."""
    if kind != "memory-backend-file":
        return ""
    return str(qmp.execute("qom-get", {"path": f"/objects/{name}", "property": "mem-path"}))


def _find(
    name: str, size: int, addresses: Dictionary[str, int], path: str, mappings: list[Mapping]
) -> Mapping:
    """Where the backend is mapped: as QEMU says, else by its file, else if only one has its size.

    :raise MemoryRefused: nothing tells, or it is mapped otherwise than from its beginning."""
    candidates = [each for each in mappings if each.rights.startswith("rw-s")]
    if name in addresses:
        candidates = [each for each in candidates if each.start == addresses[name]]
    elif path and os.path.isfile(path):
        found = os.stat(path)
        candidates = [each for each in candidates if each.file == (found.st_dev, found.st_ino)]
    else:
        candidates = [each for each in candidates if each.end - each.start == size]
    if len(candidates) != 1:
        raise MemoryRefused(
            f"nothing tells where QEMU maps memory backend '{shown(name)}' ({len(candidates)} "
            "places would fit); QEMU 8.1 and newer say it"
        )
    only = candidates[0]
    check_whole(f"memory backend '{shown(name)}'", only, size, mappings)
    return only


def _open(pid: int, mapping: Mapping) -> int:
    """Open the file behind a mapping: QEMU has it open, too.

    :raise MemoryRefused: it is not to be had."""
    directory = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(f"{directory}/{name}")
                if (found.st_dev, found.st_ino) == mapping.file:
                    return os.open(f"{directory}/{name}", os.O_RDWR | os.O_CLOEXEC)
        place = f"{mapping.start:x}-{mapping.end:x}"
        return os.open(f"/proc/{pid}/map_files/{place}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise _not_ours(pid, exc) from exc


def check_drives(qmp: QmpClient) -> None:
    """What a disk's controller writes into memory by itself is not seen by any page table.

    :raise MemoryRefused: a drive bypasses the page cache."""
    nodes: list[dict[str, Any]] = qmp.execute("query-named-block-nodes", {"flat": True})
    for node in nodes:
        if node.get("cache", {}).get("direct"):
            name = shown(node.get("node-name"))
            raise MemoryRefused(
                f"block node '{name}' bypasses the page cache (cache.direct=on), so what it reads "
                "into RAM cannot be tracked from outside; start QEMU with cache.direct=off"
            )


def check_no_back_ends(qmp: QmpClient) -> None:
    """A vhost-user back end would not wait for missing pages: what it touches would be zero.

    :raise MemoryRefused: this QEMU has a device of one."""
    if what := _back_end_of(qmp):
        raise MemoryRefused(
            f"this QEMU has a vhost-user back end ('{shown(what)}'), which does not wait for "
            "missing pages: there is no postcopy; switch postcopy-ram off"
        )


def check_named(qmp: QmpClient, back_ends: frozenset[int]) -> None:
    """A back end of another user may map the memory where this one may not look.

    :raise MemoryRefused: this QEMU has a device of one, and none is named."""
    if not back_ends and (what := _back_end_of(qmp)):
        raise MemoryRefused(
            f"this QEMU has a vhost-user back end ('{shown(what)}') that writes into its RAM; name "
            "each one's process, so that it is tracked: vhost-user=PID"
        )


def _back_end_of(qmp: QmpClient) -> str:
    """What this QEMU has one for; empty if it has none."""
    for path in ("/machine/peripheral", "/machine/peripheral-anon", "/objects"):
        for each in qmp.execute("qom-list", {"path": path}):
            if "vhost-user" in each["type"]:
                return str(each["type"]).removeprefix("child<").removesuffix(">")
    network = qmp.execute("human-monitor-command", {"command-line": "info network"})
    return "-netdev vhost-user" if "type=vhost-user" in str(network) else ""


def check_idle(qmp: QmpClient) -> None:
    """:raise GuestError: QEMU migrates already."""
    status = qmp.execute("query-migrate").get("status", "none")
    if status not in ("none", "completed", "failed", "cancelled"):
        raise GuestError(f"QEMU's own migration is {status}; end or cancel it first")
