"""What a packet carries: the pages that were taken, encoded, copied together or lent as they are.

Lent pages may be written while ZeroMQ still reads them; they are then dirty again.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from engine import _native, wire
from engine.compress.codecs import Codec
from engine.memory.blocks import PAGE_SIZE

#: Runs of at least so many pages are lent to ZeroMQ, shorter ones are copied together.
DIRECT_RUN_PAGES_MIN: Final = 64
#: A sample is about so many spans of so many pages, which is as far as LZ4 looks back.
SAMPLE_SPANS: Final = 4
SPAN_PAGES: Final = 16

Frame = bytes | memoryview
Run = tuple[int, int]  #: first page, page count


@dataclass(frozen=True, slots=True)
class Payload:
    """The pages of one packet; members as in `wire.Packet`.

    :ivar pages: that it carries.
    :ivar data_runs: the run table, in the order of `frames`.
    :ivar copied_pages: copied before they are sent; the others are lent.
    :ivar tried: given to the codec, whether it helped or not; `codec_ns` is its CPU time.
    """

    frames: Sequence[Frame]
    data_runs: bytes
    pages: int
    kind: wire.PacketKind = wire.PacketKind.PAGES
    codec: wire.CodecId = wire.CodecId.RAW
    plane_runs: int = 0
    encoded_runs: int = 0
    gathered_runs: int = 0
    plain_bytes: int = 0
    copied_pages: int = 0
    tried: bytes = b""
    codec_ns: int = 0

    @property
    def encoded_bytes(self) -> int:
        """What became of `tried`; as much when that was in vain."""
        return len(self.tried) if self.codec is wire.CodecId.RAW else len(self.frames[0])

    @property
    def payload_bytes(self) -> int:
        """On the wire."""
        return sum(len(frame) for frame in self.frames)


def read_runs(table: bytes | memoryview, count: int) -> list[Run]:
    """The first `count` runs of a table."""
    words = memoryview(table)[: count * wire.RUN.size].cast("I").tolist()
    return list(zip(words[0::2], words[1::2], strict=True))


def table_of(runs: Sequence[Run]) -> bytes:
    """A run table; native order is the wire's on every machine that we run on."""
    return array("I", [word for run in runs for word in run]).tobytes()


def lent_payload(ram: memoryview, taken: memoryview, count: int) -> Payload:
    """Pages as they are: short runs copied together, long ones lent."""
    counts = taken.cast("I")[1 : 2 * count : 2].tolist()
    if counts and max(counts) < DIRECT_RUN_PAGES_MIN:
        return copied_payload(_native.gather(ram, taken, count), taken, count)
    runs = read_runs(taken, count)
    short = [run for run in runs if run[1] < DIRECT_RUN_PAGES_MIN]
    direct = [run for run in runs if run[1] >= DIRECT_RUN_PAGES_MIN]
    table = table_of(short + direct)
    frames = [_native.gather(ram, table, len(short))] if short else []
    return Payload(
        [*frames, *_lend(ram, direct)],
        table,
        sum(counts),
        gathered_runs=len(short),
        copied_pages=sum(pages for _, pages in short),
    )


def copied_payload(
    copy: bytes, taken: memoryview, count: int, codec: Codec | None = None
) -> Payload:
    """Pages that were copied together already; with a codec, what looks worth it is encoded."""
    runs, pages = bytes(taken[: count * wire.RUN.size]), len(copy) // PAGE_SIZE
    if codec is None or not copy:
        return Payload([copy] if copy else [], runs, pages, gathered_runs=count, copied_pages=pages)
    parted, planes, others, raw = _part(copy)
    good_runs = planes + others
    if not good_runs:
        return copied_payload(copy, taken, count)
    rest = parted[good_runs * wire.RUN.size :]
    tables = [
        _pages_at(read_runs(places, places_count), read_runs(runs, count))
        for places, places_count in (
            (parted, planes),
            (parted[planes * wire.RUN.size :], others),
            (rest, raw),
        )
    ]
    tried = copy if not planes + raw else _native.gather(copy, parted, good_runs, planes)
    good = _encoded_copy(tried, table_of(tables[0] + tables[1]), codec, len(tables[0]))
    if not good.encoded_runs:  # in vain
        plain = copied_payload(copy, taken, count)
        return replace(plain, tried=good.tried, codec_ns=good.codec_ns)
    if not raw:
        return good
    return replace(
        good,
        frames=[*good.frames, _native.gather(copy, rest, raw)],
        data_runs=good.data_runs + table_of(tables[2]),
        pages=pages,
        gathered_runs=len(tables[2]),
        copied_pages=pages,
    )


def _part(copy: bytes) -> tuple[memoryview, int, int, int]:
    """Runs of the pages of a copy that look worth trying as bit planes, of others that do, and of
    the rest: one table, and how many there are of each."""
    pages = len(copy) // PAGE_SIZE
    parted = memoryview(bytearray(pages * wire.RUN.size))
    whole = wire.RUN.pack(0, pages)
    planes, others, _, raw = _native.split_compressible(copy, whole, 1, parted)
    return parted, planes, others, raw


class Sample(NamedTuple):
    """What a codec would be given of a part of a payload that goes as it is."""

    tried: bytes
    part: float  #: of the payload, above 0


def sample_of(payload: Payload) -> Sample:
    """Of pages some, from all over it, all if they are few; of deltas all."""
    if payload.kind is wire.PacketKind.DELTAS:
        return Sample(bytes(payload.frames[0]), 1.0)
    pages = _some_pages(payload)
    return Sample(_worth_trying(pages), len(pages) / (payload.pages * PAGE_SIZE))


def _some_pages(payload: Payload) -> bytes:
    step = max(SPAN_PAGES, payload.pages // SAMPLE_SPANS)
    spans: list[Frame] = []
    begin = 0
    for frame in payload.frames:
        pages = len(frame) // PAGE_SIZE
        for at in range(-begin % step, pages, step):
            spans.append(frame[at * PAGE_SIZE : (at + SPAN_PAGES) * PAGE_SIZE])
        begin += pages
    return b"".join(spans)


def _worth_trying(copy: bytes) -> bytes:
    parted, planes, others, raw = _part(copy)
    if not planes + others:
        return b""
    return copy if not planes + raw else _native.gather(copy, parted, planes + others, planes)


def whole_payload(ram: memoryview, taken: memoryview, count: int, codec: Codec | None) -> Payload:
    """Pages of runs that must not be cut: all encoded in one frame, or all as they are."""
    if codec is None or not count:
        return lent_payload(ram, taken, count)
    copy = _native.gather(ram, taken, count)
    good = _encoded_copy(copy, bytes(taken[: count * wire.RUN.size]), codec, 0)
    if good.encoded_runs:
        return good
    plain = copied_payload(copy, taken, count)
    return replace(plain, tried=good.tried, codec_ns=good.codec_ns)


def _encoded_copy(tried: bytes, runs: bytes, codec: Codec, plane_runs: int) -> Payload:
    """All of `tried` in one frame if that helps; if not, what it says of that only.

    :param plane_runs: so many of the first runs are bit planes in it."""
    pages, began_ns = len(tried) // PAGE_SIZE, time.thread_time_ns()
    encoded = codec.encode(tried)
    codec_ns = time.thread_time_ns() - began_ns
    if encoded is None:
        return Payload([], b"", 0, tried=tried, codec_ns=codec_ns)
    return Payload(
        [encoded], runs, pages, codec=codec.wire_id, plane_runs=plane_runs,
        encoded_runs=len(runs) // wire.RUN.size, plain_bytes=len(tried), copied_pages=pages,
        tried=tried, codec_ns=codec_ns,
    )  # fmt: skip


def _pages_at(places: Sequence[Run], runs: Sequence[Run]) -> list[Run]:
    """The pages that lie at `places` in the copy that was made of `runs`; both ascend."""
    found: list[Run] = []
    rest = iter(runs)
    first, count = next(rest)
    begin = 0  #: where the run lies in the copy
    for place, pages in places:
        at, left = place, pages
        while left:
            while at >= begin + count:
                begin += count
                first, count = next(rest)
            taken = min(left, begin + count - at)
            found.append((first + at - begin, taken))
            at, left = at + taken, left - taken
    return found


def encoded_payload(ram: memoryview, taken: memoryview, count: int, codec: Codec) -> Payload:
    """What looks as if it would shrink is encoded in one frame, the rest goes as it is."""
    parted = memoryview(bytearray(wire.RUNS_MAX * wire.RUN.size))
    planes, others, good_pages, raw_runs = _native.split_compressible(ram, taken, count, parted)
    good_runs = planes + others
    raw = lent_payload(ram, parted[good_runs * wire.RUN.size :], raw_runs)
    if not good_runs:
        return raw
    tried = _native.gather(ram, parted, good_runs, planes)
    good = _encoded_copy(tried, bytes(parted[: good_runs * wire.RUN.size]), codec, planes)
    if not good.encoded_runs:  # in vain, which is rare: one copy of all is as good
        raw = lent_payload(ram, taken, count)
        return replace(raw, tried=good.tried, codec_ns=good.codec_ns)
    return replace(
        good,
        frames=[*good.frames, *raw.frames],
        data_runs=good.data_runs + raw.data_runs,
        pages=good.pages + raw.pages,
        gathered_runs=raw.gathered_runs,
        copied_pages=good_pages + raw.copied_pages,
    )


def deltas_payload(deltas: bytes, table: bytes, pages: int, codec: Codec | None) -> Payload:
    """Deltas of the pages of `table`, each behind its length, encoded if that helps."""
    began_ns = time.thread_time_ns()
    encoded = codec.encode(deltas) if codec is not None else None
    return Payload(
        [deltas if encoded is None else encoded], table, pages, wire.PacketKind.DELTAS,
        wire.CodecId.RAW if codec is None or encoded is None else codec.wire_id,
        encoded_runs=len(table) // wire.RUN.size, plain_bytes=len(deltas), copied_pages=pages,
        tried=deltas if codec is not None else b"", codec_ns=time.thread_time_ns() - began_ns,
    )  # fmt: skip


def _lend(ram: memoryview, runs: Sequence[Run]) -> list[memoryview]:
    return [ram[first * PAGE_SIZE : (first + pages) * PAGE_SIZE] for first, pages in runs]
