"""What parameters and capabilities say about compression, for the senders; and what these did, for
`query-migrate`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from engine import wire
from engine.compress.account import Account, account_of, words_count
from engine.compress.auto import LADDER
from engine.compress.codecs import CODEC_IDS
from engine.compress.delta import DeltaStatistics
from engine.compress.policy import Arm
from engine.control.host import Host
from engine.control.statistics import MigrationNumbers
from engine.guest.base import TrackerName
from engine.multifd.progress import Count, Progress
from engine.wire import CodecId

log = logging.getLogger("ramferry.source")

AUTO: Final = "auto"
#: How `query-migrate` and `multifd-compression` call them.
NAMES: Final = {CodecId.RAW: "none"} | {wire_id: name for name, wire_id in CODEC_IDS.items()}
_IDS: Final = frozenset(CodecId)


def compression_of(host: Host) -> wire.Compress:
    """As it is set now; the old `compress` is zlib."""
    settings = host.parameters
    is_old = host.capability("compress")
    return wire.Compress(
        "zlib" if is_old else settings.multifd_compression,
        settings.compress_level if is_old else settings.multifd_zlib_level,
        -settings.x_multifd_zstd_fast or settings.multifd_zstd_level,
        settings.multifd_lz4_acceleration,
        settings.x_compress_cpu_percent,
        settings.xbzrle_cache_size if host.capability("xbzrle") else 0,
        settings.x_elide_unchanged,
    )


def compression_now(host: Host, numbers: MigrationNumbers) -> wire.Compress:
    """`compression_of`, and `numbers` say so."""
    if host.capability("xbzrle"):
        numbers.xbzrle_cache_bytes = host.parameters.xbzrle_cache_size
    _note_what_is_without_effect(host, numbers)
    return compression_of(host)


def _note_what_is_without_effect(host: Host, numbers: MigrationNumbers) -> None:
    """Say in the log, and in `query-migrate`, what is switched on and does nothing: content hashes
    need a private copy of each page, which is compared with no cache and with nothing sent."""
    without: list[str] = []
    if numbers.tracker == TrackerName.HASH.value:
        without += ["xbzrle"] * host.capability("xbzrle")
        without += ["x-elide-unchanged"] * (host.parameters.x_elide_unchanged == "on")
    if without and without != numbers.without_effect:
        names = " and ".join(without)
        log.warning("without effect with the tracker %s: %s", numbers.tracker, names)
    numbers.without_effect = without


def channels_of(host: Host) -> int:
    """How many channels a migration gets; the old `compress-threads` are channels, too."""
    settings = host.parameters
    if host.capability("compress") and settings.is_set("compress-threads"):
        return int(settings.compress_threads)
    return int(settings.multifd_channels)


def codecs_of(wanted: wire.Compress) -> tuple[int, ...]:
    """What the destination must be able to decode."""
    if wanted.codec == AUTO:
        return tuple(sorted({CODEC_IDS[arm.name] for arm in LADDER if arm.name in CODEC_IDS}))
    return (CODEC_IDS[wanted.codec],) if wanted.codec in CODEC_IDS else ()


def lacking_codecs(wanted: Sequence[int], known: Collection[int]) -> str:
    """Names of what is wanted and not known, or nothing; a number is of a codec that came later."""
    lacking = sorted(set(wanted) - set(known))
    return ", ".join(CodecId(one).name.lower() if one in _IDS else str(one) for one in lacking)


def _totals(channels: Sequence[Progress]) -> Callable[[Count], int]:
    """A count, summed over all channels."""
    return lambda count: sum(progress[count] for progress in channels)


def delta_statistics(channels: Sequence[Progress]) -> DeltaStatistics:
    """XBZRLE's counts of all channels; the size is the parameter's."""
    total = _totals(channels)
    return DeltaStatistics(
        encoded_bytes=total(Count.DELTA_BYTES),
        hit_pages=total(Count.DELTA_HITS),
        miss_pages=total(Count.DELTA_MISSES),
        overflow_pages=total(Count.DELTA_OVERFLOWS),
        unchanged_pages=total(Count.DELTA_UNCHANGED),
    )


def compression_info(channels: Sequence[Progress]) -> dict[str, Any]:
    """`x-compression`: what all channels did with what they sent; sizes in bytes, times in ns."""
    total = _totals(channels)
    return {
        "tried-bytes": total(Count.TRIED_BYTES),
        "plain-bytes": total(Count.PLAIN_BYTES),
        "encoded-bytes": total(Count.ENCODED_BYTES),
        "elided-pages": total(Count.ELIDED_PAGES),
        "encode-time": total(Count.ENCODE_NS),
        "channels": [_channel(index, progress) for index, progress in enumerate(channels)],
    }


def _channel(index: int, progress: Progress) -> dict[str, Any]:
    """The newest batch's codec, and how many batches got which."""
    chosen, level = progress[Count.CODEC], progress[Count.LEVEL]
    return {
        "index": index,
        "codec": NAMES[CodecId(chosen)] if chosen else "none",
        "level": level - 2**64 if level >= 2**63 else level,
        "batches": {
            name: count for wire_id, name in NAMES.items() if (count := progress.batches(wire_id))
        },
        **_auto(progress),
    }


def _auto(progress: Progress) -> dict[str, Any]:
    """What `auto` knows on one channel, and why it chose; nothing of other policies."""
    account = account_of(progress.account_words(words_count(LADDER)), LADDER)
    return {"auto": auto_info(account, time.monotonic_ns())} if account is not None else {}


def auto_info(account: Account, now_ns: int) -> dict[str, Any]:
    """`x-compression`'s `auto`; parts are of 1."""
    change = {
        "from": arm_name(LADDER[account.before]),
        "to": arm_name(LADDER[account.current]),
        "age": max(0, now_ns - account.changed_ns),
    }
    return {
        "codec": arm_name(LADDER[account.current]),
        "reason": account.why.text,
        "changes": account.changes,
        **({"last-change": change} if account.changes else {}),
        "drain-bytes-per-second": account.drain_rate,
        "channel-is-full": account.is_full,
        "cpu-share": account.cpu_share / 1000,
        "cpu-budget": account.cpu_budget / 1000,
        "worth-trying": account.worth / 1000,
        "estimates": [
            {
                "codec": arm_name(arm),
                "ns-per-byte": estimate.codec_ps / 1000,
                "left": estimate.left_ppm / 1_000_000,
                "ram-bytes-per-second": estimate.ram_rate,
                "times": estimate.times,
            }
            for arm, estimate in zip(LADDER, account.estimates, strict=True)
            if estimate.times
        ],
    }


def arm_name(arm: Arm) -> str:
    """`zstd:1`, or `none`."""
    return f"{arm.name}:{arm.level}" if arm.kind is not None else arm.name


def auto_line(compression: Mapping[str, Any]) -> str:
    """What `auto` does on all channels and why, of `x-compression`; empty where it is not in use.

    The reason is that of the channel which changed last."""
    known = [one["auto"] for one in compression.get("channels", ()) if "auto" in one]
    if not known:
        return ""
    codecs = Counter(one["codec"] for one in known)
    chosen = ", ".join(f"{name} on {count}" for name, count in sorted(codecs.items()))
    drain = sum(one["drain-bytes-per-second"] for one in known) / 1e6
    drained = f"{drain:.0f} MB/s drained" if drain else "never full"
    newest = min(known, key=lambda one: one.get("last-change", {}).get("age", float("inf")))
    return f"{chosen} ({newest['reason']}; {drained})"
