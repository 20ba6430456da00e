"""What `info` prints: answers of QMP as the lines of QEMU 10.0.2. Plain functions of plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from engine.control.compression import auto_line

Json = Mapping[str, Any]

KIB: Final = 1024

#: Scripts look for the lines behind them. `--only-migratable` sets one, the others are QEMU's
#: defaults, which nothing here can change.
GLOBALS: Final = (
    "globals:",
    "store-global-state: on",
    "only-migratable: {}",
    "send-configuration: on",
    "send-section-footer: on",
    "send-switchover-start: on",
    "clear-bitmap-shift: 18",
)


def on_or_off(value: object) -> str:
    return "on" if value else "off"


def migration(info: Json, *, only_migratable: bool) -> Iterator[str]:
    """`info migrate` of a query-migrate."""
    yield from (line.format(on_or_off(only_migratable)) for line in GLOBALS)
    if info.get("blocked-reasons"):
        yield "Outgoing migration blocked:"
        yield from (f"  {reason}" for reason in info["blocked-reasons"])
    if "status" in info:
        yield from _status(info)
    if "ram" in info:
        yield from _ram(info["ram"])
    if "xbzrle-cache" in info:
        yield from _xbzrle(info["xbzrle-cache"])
    if line := auto_line(info.get("x-compression", {})):
        yield f"auto compression: {line}"
    for member, text in (
        ("cpu-throttle-percentage", "cpu throttle percentage: {}"),
        ("dirty-limit-throttle-time-per-round", "dirty-limit throttle time: {} us"),
        ("dirty-limit-ring-full-time", "dirty-limit ring full time: {} us"),
        ("postcopy-blocktime", "postcopy blocktime: {}"),
    ):
        if member in info:
            yield text.format(info[member])
    if "postcopy-vcpu-blocktime" in info:
        yield f"postcopy vcpu blocktime: {number_list(info['postcopy-vcpu-blocktime'])}"
    if "socket-address" in info:
        yield "socket address: ["
        yield from (f"\t{socket_uri(address)}" for address in info["socket-address"])
        yield "]"


def _status(info: Json) -> Iterator[str]:
    status = info["status"]
    is_told = status == "failed" and "error-desc" in info
    yield (
        f"Migration status: {status} ({info['error-desc']})"
        if is_told
        else (f"Migration status: {status}")
    )
    yield f"total time: {info.get('total-time', 0)} ms"
    for member, name in (
        ("expected-downtime", "expected downtime"),
        ("downtime", "downtime"),
        ("setup-time", "setup"),
    ):
        if member in info:
            yield f"{name}: {info[member]} ms"


def _ram(ram: Json) -> Iterator[str]:
    yield f"transferred ram: {ram['transferred'] // KIB} kbytes"
    yield f"throughput: {ram['mbps']:.2f} mbps"
    yield f"remaining ram: {ram['remaining'] // KIB} kbytes"
    yield f"total ram: {ram['total'] // KIB} kbytes"
    yield f"duplicate: {ram['duplicate']} pages"
    yield f"normal: {ram['normal']} pages"
    yield f"normal bytes: {ram['normal-bytes'] // KIB} kbytes"
    yield f"dirty sync count: {ram['dirty-sync-count']}"
    yield f"page size: {ram['page-size'] // KIB} kbytes"
    yield f"multifd bytes: {ram['multifd-bytes'] // KIB} kbytes"
    yield f"pages-per-second: {ram['pages-per-second']}"
    if ram["dirty-pages-rate"]:
        yield f"dirty pages rate: {ram['dirty-pages-rate']} pages"
    if ram["postcopy-requests"]:
        yield f"postcopy request count: {ram['postcopy-requests']}"
    for phase in ("precopy", "downtime", "postcopy"):
        if ram[f"{phase}-bytes"]:
            yield f"{phase} ram: {ram[f'{phase}-bytes'] // KIB} kbytes"
    if ram["dirty-sync-missed-zero-copy"]:
        yield f"Zero-copy-send fallbacks happened: {ram['dirty-sync-missed-zero-copy']} times"


def _xbzrle(cache: Json) -> Iterator[str]:
    yield f"cache size: {cache['cache-size']} bytes"
    yield f"xbzrle transferred: {cache['bytes'] // KIB} kbytes"
    yield f"xbzrle pages: {cache['pages']} pages"
    yield f"xbzrle cache miss: {cache['cache-miss']} pages"
    yield f"xbzrle cache miss rate: {cache['cache-miss-rate']:.2f}"
    yield f"xbzrle encoding rate: {cache['encoding-rate']:.2f}"
    yield f"xbzrle overflow: {cache['overflow']}"


def extensions(info: Json) -> Iterator[str]:
    """What `info migrate -a` adds: our members of query-migrate, under their names there."""
    for name, value in info.items():
        if name.startswith("x-"):
            yield from _extension(name, value)


def _extension(name: str, value: Any) -> Iterator[str]:
    """One line, and one for each entry of a list in it."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _extension(f"{name}[{index}]", entry)
        return
    lists = {}
    if isinstance(value, dict):
        lists = {member: one for member, one in value.items() if isinstance(one, list)}
        value = {member: one for member, one in value.items() if member not in lists}
    yield f"{name}: {_members(value)}"
    for member, one in lists.items():
        yield from _extension(f"{name}.{member}", one)


def _members(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(
            f"{name}=({_members(member)})"
            if isinstance(member, dict)
            else f"{name}={_members(member)}"
            for name, member in value.items()
        )
    if isinstance(value, bool):
        return on_or_off(value)
    return str(value)


def number_list(numbers: Iterable[int]) -> str:
    """As QEMU's string visitor writes a list: sorted, each once, neighbours as a range."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def socket_uri(address: Json) -> str:
    """A SocketAddress in one word."""
    match address["type"]:
        case "inet":
            return f"tcp:{address['host']}:{address['port']}"
        case "unix":
            return f"unix:{address['path']}"
        case "vsock":
            return f"vsock:{address['cid']}:{address['port']}"
    return f"fd:{address.get('str', '')}"


def capabilities(answer: Sequence[Json]) -> Iterator[str]:
    """`info migrate_capabilities` of a query-migrate-capabilities."""
    for entry in answer:
        yield f"{entry['capability']}: {on_or_off(entry['state'])}"


def dirty_rate(info: Json) -> Iterator[str]:
    """`info dirty_rate` of a query-dirty-rate."""
    yield f"Status: {info['status']}"
    yield f"Start Time: {info['start-time']} (ms)"
    if info["mode"] == "page-sampling":
        yield f"Sample Pages: {info['sample-pages']} (per GB)"
    yield f"Period: {info['calc-time']} (sec)"
    yield f"Mode: {info['mode']}"
    if "dirty-rate" not in info:
        yield "Dirty rate: (not ready)"
        return
    yield f"Dirty rate: {info['dirty-rate']} (MB/s)"
    for vcpu in info.get("vcpu-dirty-rate", ()):
        yield f"vcpu[{vcpu['id']}], Dirty rate: {vcpu['dirty-rate']} (MB/s)"


def vcpu_dirty_limits(answer: Sequence[Json]) -> Iterator[str]:
    """`info vcpu_dirty_limit` of a query-vcpu-dirty-limit."""
    if not answer:
        yield "Dirty page limit not enabled!"
    for vcpu in answer:
        yield (
            f"vcpu[{vcpu['cpu-index']}], limit rate {vcpu['limit-rate']} (MB/s), "
            f"current rate {vcpu['current-rate']} (MB/s)"
        )


def run_state(answer: Json) -> str:
    """`info status` of a query-status."""
    if answer["running"]:
        return "VM status: running"
    status = answer["status"]
    return "VM status: paused" if status == "paused" else f"VM status: paused ({status})"


def version(answer: Json) -> str:
    """`info version` of a query-version; QEMU puts nothing between number and package either."""
    number = answer["qemu"]
    return f"{number['major']}.{number['minor']}.{number['micro']}{answer['package']}"
