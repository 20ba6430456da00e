"""What parameters and capabilities say about compression, for the senders; and what these did, for
`query-migrate`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from engine import wire
from engine.compress.auto import LADDER
from engine.compress.codecs import CODEC_IDS
from engine.compress.delta import DeltaStatistics
from engine.control.host import Host
from engine.multifd.progress import Count, Progress
from engine.wire import CodecId

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
    }
