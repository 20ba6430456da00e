"""What a packet carries: the pages that were taken, encoded, copied together or lent as they are.

Lent pages may be written while ZeroMQ still reads them; they are then dirty again.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from engine import _native, wire
from engine.compress.codecs import Codec
from engine.memory.blocks import PAGE_SIZE

#: Runs of at least so many pages are lent to ZeroMQ, shorter ones are copied together.
DIRECT_RUN_PAGES_MIN: Final = 64

Frame = bytes | memoryview
Run = tuple[int, int]  #: first page, page count


@dataclass(frozen=True, slots=True)
class Payload:
    """The pages of one packet; members as in `wire.Packet`.

    :ivar data_runs: the run table, in the order of `frames`.
    :ivar copied_pages: copied before they are sent; the others are lent.
    :ivar tried: given to the codec, whether it helped or not; `codec_ns` is its CPU time.
    """

    frames: Sequence[Frame]
    data_runs: bytes
    codec: wire.CodecId = wire.CodecId.RAW
    encoded_runs: int = 0
    gathered_runs: int = 0
    plain_bytes: int = 0
    copied_pages: int = 0
    tried: bytes = b""
    codec_ns: int = 0

    @property
    def encoded_bytes(self) -> int:
        """What became of `tried`; as much when that was in vain."""
        return len(self.frames[0]) if self.encoded_runs else len(self.tried)

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
        gathered_runs=len(short),
        copied_pages=sum(pages for _, pages in short),
    )


def copied_payload(
    copy: bytes, taken: memoryview, count: int, codec: Codec | None = None
) -> Payload:
    """Pages that were copied together already, encoded if that helps."""
    table, pages = bytes(taken[: count * wire.RUN.size]), len(copy) // PAGE_SIZE
    began_ns = time.thread_time_ns()
    encoded = codec.encode(copy) if codec is not None and copy else None
    codec_ns, tried = time.thread_time_ns() - began_ns, copy if codec is not None else b""
    if codec is None or encoded is None:
        return Payload(
            [copy] if copy else [], table,
            gathered_runs=count, copied_pages=pages, tried=tried, codec_ns=codec_ns,
        )  # fmt: skip
    return Payload(
        [encoded], table, codec.wire_id, encoded_runs=count, plain_bytes=len(copy),
        copied_pages=pages, tried=tried, codec_ns=codec_ns,
    )  # fmt: skip


def encoded_payload(ram: memoryview, taken: memoryview, count: int, codec: Codec) -> Payload:
    """What looks as if it would shrink is encoded in one frame, the rest goes as it is."""
    parted = memoryview(bytearray(wire.RUNS_MAX * wire.RUN.size))
    good_runs, good_pages, raw_runs = _native.split_compressible(ram, taken, count, parted)
    raw = lent_payload(ram, parted[good_runs * wire.RUN.size :], raw_runs)
    if not good_runs:
        return raw
    copy = _native.gather(ram, parted, good_runs)
    good = copied_payload(copy, parted, good_runs, codec)
    if not good.encoded_runs:  # in vain, which is rare: one copy of all is as good
        raw = lent_payload(ram, taken, count)
        return replace(raw, tried=good.tried, codec_ns=good.codec_ns)
    return Payload(
        [*good.frames, *raw.frames], good.data_runs + raw.data_runs, codec.wire_id,
        encoded_runs=good_runs, gathered_runs=raw.gathered_runs, plain_bytes=good.plain_bytes,
        copied_pages=good_pages + raw.copied_pages, tried=good.tried, codec_ns=good.codec_ns,
    )  # fmt: skip


def _lend(ram: memoryview, runs: Sequence[Run]) -> list[memoryview]:
    return [ram[first * PAGE_SIZE : (first + pages) * PAGE_SIZE] for first, pages in runs]
