"""`query-migrate` in QEMU's shape: which members show in which status, and our own members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from engine.control.incoming import IncomingMigration
from engine.control.outgoing import OutgoingMigration
from engine.control.statistics import MigrationNumbers
from engine.control.status import ENDED, Status
from engine.memory.blocks import PAGE_SIZE

NS_PER_MS: Final = 1_000_000
#: Totals may be so old: counting the dirty pages of 16 GiB takes 50 us, and clients poll.
TOTALS_AGE_NS: Final = 5 * NS_PER_MS

#: Statuses in which a source shows `ram` and its times.
_WITH_NUMBERS: Final = frozenset(
    {
        Status.ACTIVE,
        Status.CANCELLING,
        Status.PRE_SWITCHOVER,
        Status.DEVICE,
        Status.COMPLETED,
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
    if incoming.address is not None and incoming.status in (Status.SETUP, Status.ACTIVE):
        info["socket-address"] = [incoming.address.socket_address()]
    return info


def outgoing_info(outgoing: OutgoingMigration) -> dict[str, Any]:
    """A source shows its numbers while it has some that mean something."""
    outgoing.refresh(age_ns=TOTALS_AGE_NS)
    status, numbers = outgoing.status, outgoing.numbers
    info: dict[str, Any] = {"status": status.value}
    if outgoing.machine.error is not None and status in (Status.FAILED, Status.CANCELLED):
        info["error-desc"] = outgoing.machine.error
    if status not in ENDED:
        info["x-phase"] = outgoing.machine.phase.value
    if outgoing.is_outcome_unknown:
        info["x-handover"] = "unknown"
    if status not in _WITH_NUMBERS:
        return info
    info["total-time"] = numbers.total_ns // NS_PER_MS
    info["setup-time"] = numbers.setup_ns // NS_PER_MS
    if status is Status.COMPLETED and numbers.downtime_ns is not None:
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
    return info | _extensions(numbers)


def _ram(numbers: MigrationNumbers, status: Status) -> dict[str, Any]:
    """MigrationStats, every member always present."""
    is_over = status is Status.COMPLETED
    transferred = numbers.wire_bytes + numbers.main_bytes
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
        "postcopy-requests": 0,
        "page-size": PAGE_SIZE,
        "multifd-bytes": numbers.wire_bytes,
        "pages-per-second": numbers.pages_per_s,
        "precopy-bytes": 0,
        "downtime-bytes": numbers.main_bytes,
        "postcopy-bytes": 0,
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
        "x-downtime-phases": {
            "pause": phases.pause,
            "harvest": phases.harvest,
            "wait": phases.wait,
            "send": phases.send,
            "acknowledge": phases.acknowledge,
            "resume": phases.resume,
        },
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
            }
            for index, sample in enumerate(numbers.channels)
        ],
        "x-compression": numbers.compression
        | ({"without-effect": numbers.without_effect} if numbers.without_effect else {}),
        "x-tracker": numbers.tracker,
        "x-tracker-reason": numbers.tracker_reason,
        "x-placement": numbers.placement,
        "x-heals": numbers.heals,
    }
