"""`query-migrate` in QEMU's shape: which members show in which status, and our own members."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from engine.control.incoming import IncomingMigration
from engine.control.outgoing import OutgoingMigration
from engine.control.statistics import MigrationNumbers
from engine.control.status import ENDED, POSTCOPY, Status
from engine.memory.blocks import PAGE_SIZE

NS_PER_MS: Final = 1_000_000

#: As in QEMU, until the connections are given back; a pause does that, too.
_WITH_ADDRESS: Final = frozenset({Status.SETUP, Status.ACTIVE, *POSTCOPY})
_WITH_REASON: Final = (
    Status.FAILED,
    Status.CANCELLED,
    Status.POSTCOPY_PAUSED,
    Status.POSTCOPY_RECOVER_SETUP,
)

#: Statuses in which a source shows `ram` and its times.
_WITH_NUMBERS: Final = frozenset(
    {
        Status.ACTIVE,
        Status.CANCELLING,
        Status.PRE_SWITCHOVER,
        Status.DEVICE,
        Status.COMPLETED,
        *POSTCOPY,
    }
)


def migration_info(
    outgoing: OutgoingMigration | None,
    incoming: IncomingMigration | None,
    blocked_reasons: Sequence[str] = (),
) -> dict[str, Any]:
    """MigrationInfo; the source's part wins where a process has had both. Empty before anything."""
    info = incoming_info(incoming) if incoming is not None else {}
    if outgoing is not None:
        info = outgoing_info(outgoing)
    return info | ({"blocked-reasons": list(blocked_reasons)} if blocked_reasons else {})


def incoming_info(incoming: IncomingMigration) -> dict[str, Any]:
    """A destination shows its status, why it failed, and where it listens."""
    info: dict[str, Any] = {"status": incoming.status.value}
    if incoming.error is not None:
        info["error-desc"] = incoming.error
    if incoming.address is not None and incoming.status in _WITH_ADDRESS:
        info["socket-address"] = [incoming.address.socket_address()]
    if incoming.postcopy is not None:
        info |= _incoming_postcopy(incoming.postcopy.info(), incoming)
    return info


def _incoming_postcopy(found: dict[str, Any], incoming: IncomingMigration) -> dict[str, Any]:
    """What faults cost. QEMU shows its members when all is over, with `postcopy-blocktime`."""
    info: dict[str, Any] = {"x-postcopy": found}
    if incoming.status is Status.COMPLETED and incoming.host.capability("postcopy-blocktime"):
        info |= {
            f"postcopy-{name}": found[name]
            for name in ("blocktime", "vcpu-blocktime", "latency", "latency-dist", "vcpu-latency")
        }
    return info


def outgoing_info(outgoing: OutgoingMigration) -> dict[str, Any]:
    """A source shows its numbers while it has some that mean something."""
    outgoing.refresh()
    status, numbers = outgoing.status, outgoing.numbers
    info: dict[str, Any] = {"status": status.value}
    if outgoing.machine.error is not None and status in _WITH_REASON:
        info["error-desc"] = outgoing.machine.error
    if status not in ENDED:
        info["x-phase"] = outgoing.machine.phase.value
    if outgoing.is_outcome_unknown:
        info["x-handover"] = "unknown"
    if status not in _WITH_NUMBERS:
        return info
    info["total-time"] = numbers.total_ns // NS_PER_MS
    info["setup-time"] = numbers.setup_ns // NS_PER_MS
    if status in (Status.COMPLETED, *POSTCOPY):
        if numbers.downtime_ns is not None:  # else of a process that was killed
            info["downtime"] = -(-numbers.downtime_ns // NS_PER_MS)
    else:
        info["expected-downtime"] = numbers.expected_downtime_ns // NS_PER_MS
    if numbers.throttle_percent and status is not Status.COMPLETED:
        info["cpu-throttle-percentage"] = numbers.throttle_percent
    if numbers.limit_throttle_us and status is not Status.COMPLETED:
        info["dirty-limit-throttle-time-per-round"] = numbers.limit_throttle_us
    info["ram"] = _ram(numbers, status)
    if numbers.xbzrle_cache_bytes:
        info["xbzrle-cache"] = _xbzrle(numbers)
    if numbers.postcopy.began_ns:
        info["x-postcopy"] = _outgoing_postcopy(numbers)
    return info | _extensions(numbers)


def _outgoing_postcopy(numbers: MigrationNumbers) -> dict[str, Any]:
    """Pages by cause; the background's are those on the multifd channels."""
    postcopy = numbers.postcopy
    return {
        "requests": postcopy.requests,
        "demand-pages": postcopy.demand_pages,
        "prefetch-pages": postcopy.prefetch_pages,
        "rest-pages": postcopy.rest_pages,
        "background-pages": numbers.pages + numbers.zero_pages - postcopy.multifd_pages,
        "fault-channel-bytes": postcopy.fault_bytes,
        "time": ((numbers.ended_ns or time.monotonic_ns()) - postcopy.began_ns) // NS_PER_MS,
    }


def _ram(numbers: MigrationNumbers, status: Status) -> dict[str, Any]:
    """MigrationStats, every member always present."""
    is_over, postcopy = status is Status.COMPLETED, numbers.postcopy
    transferred = numbers.wire_bytes + numbers.main_bytes + postcopy.fault_bytes
    postcopy_bytes = postcopy.fault_bytes
    if postcopy.began_ns:
        postcopy_bytes += numbers.wire_bytes - postcopy.multifd_bytes
    send_ns = max(1, numbers.total_ns - numbers.setup_ns)
    rate = transferred * 1e9 / send_ns if is_over else numbers.rate_bytes_per_s
    return {
        "transferred": transferred,
        "remaining": 0 if is_over else numbers.remaining_bytes,
        "total": numbers.total_bytes,
        "duplicate": numbers.zero_pages,
        "normal": numbers.pages,
        "normal-bytes": numbers.pages * PAGE_SIZE,
        "dirty-pages-rate": 0 if is_over else numbers.dirty_pages_per_s,
        "mbps": rate * 8 / 1e6,
        "dirty-sync-count": numbers.rounds,
        "postcopy-requests": postcopy.requests,
        "page-size": PAGE_SIZE,
        "multifd-bytes": numbers.wire_bytes,
        "pages-per-second": numbers.pages_per_s,
        "precopy-bytes": 0,
        "downtime-bytes": numbers.main_bytes,
        "postcopy-bytes": postcopy_bytes,
        "dirty-sync-missed-zero-copy": 0,
    }


def _xbzrle(numbers: MigrationNumbers) -> dict[str, Any]:
    """XBZRLECacheStats."""
    xbzrle = numbers.xbzrle
    return {
        "cache-size": numbers.xbzrle_cache_bytes,
        "bytes": xbzrle.now.encoded_bytes,
        "pages": xbzrle.now.hit_pages,
        "cache-miss": xbzrle.now.miss_pages,
        "cache-miss-rate": xbzrle.cache_miss_rate,
        "encoding-rate": xbzrle.encoding_rate,
        "overflow": xbzrle.now.overflow_pages,
        "x-unchanged": xbzrle.now.unchanged_pages,
    }


def _extensions(numbers: MigrationNumbers) -> dict[str, Any]:
    phases = numbers.phases
    return {
        "x-expected-downtime-ns": numbers.expected_downtime_ns,
        "x-downtime-phases": asdict(phases),
        "x-undone-pauses": {
            "count": numbers.undone_pauses,
            "longest": numbers.longest_undone_pause_ns,
        },
        "x-channels": [
            {
                "index": index,
                "bytes": sample.wire_bytes,
                "throughput-bytes-per-second": int(sample.rate_bytes_per_s),
                "pages": sample.pages,
                "zero-pages": sample.zero_pages,
                "incarnation": sample.incarnation,
                "open": sample.is_open,
            }
            for index, sample in enumerate(numbers.channels)
        ],
        "x-compression": numbers.compression
        | ({"without-effect": numbers.without_effect} if numbers.without_effect else {}),
        "x-tracker": numbers.tracker,
        "x-tracker-reason": numbers.tracker_reason,
        "x-placement": numbers.placement,
        "x-heals": numbers.heals,
    } | ({"x-throttle": numbers.throttle_way} if numbers.throttle_way else {})
