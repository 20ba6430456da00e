"""How fast a codec alone is: the pages of an image through it, a process a core, nothing sent.

    python -m perf.codecspeed IMAGE CODEC INDEX COUNT

measures the stripes of one worker and prints JSON. A batch is 128 pages that are not zero; LZ4 is
as fast with 64 to 512.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from engine.errors import MigrationError, UsageError
from perf.codec import Codec, parse_codec

PAGE: Final = 4096
STRIPE_PAGES: Final = 512
BATCH_PAGES: Final = 128
RUN_WAIT_S: Final = 600.0
Coders = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


@dataclass(frozen=True, slots=True)
class Speed:
    """What one process did.

    :ivar encode_s: in the codec's own calls only; `decode_s` too."""

    plain_bytes: int
    encoded_bytes: int
    encode_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Alone:
    """What a codec allows, with all processes together."""

    speeds: tuple[Speed, ...]

    @property
    def encode_bytes_per_s(self) -> float:
        """If these cores had nothing to do but to encode."""
        return sum(one.plain_bytes / one.encode_s for one in self.speeds)

    @property
    def both_bytes_per_s(self) -> float:
        """If these cores encoded and decoded, as two sides on one machine must."""
        return sum(one.plain_bytes / (one.encode_s + one.decode_s) for one in self.speeds)

    @property
    def encoded_share(self) -> float:
        """Of the bytes of pages that are not zero."""
        plain = sum(one.plain_bytes for one in self.speeds)
        return sum(one.encoded_bytes for one in self.speeds) / plain

    def figures(self, total_times_ms: Sequence[float]) -> dict[str, list[float]]:
        """For a report; above 1 a run was faster than the codec alone."""
        plain = sum(one.plain_bytes for one in self.speeds)
        alone = {"encoding": self.encode_bytes_per_s, "codec": self.both_bytes_per_s}
        found = {f"{name}_alone_mb_per_s": [speed / 1e6] for name, speed in alone.items()}
        for name, speed in alone.items():
            found[f"speed_ratio_ramferry_to_{name}_alone"] = [
                plain / speed * 1000 / total for total in total_times_ms
            ]
        return found | {"codec_alone_share": [self.encoded_share]}


def coders(codec: Codec) -> Coders:
    """Encode and decode one batch.

    :raise UsageError: the codec is none that could be fast or slow, or its library is missing."""
    level = codec.level or 1
    try:
        if codec.name == "lz4":
            from lz4 import block

            return (
                lambda data: block.compress(
                    data, mode="fast", acceleration=level, store_size=False
                ),
                lambda data: block.decompress(data, uncompressed_size=BATCH_PAGES * PAGE),
            )
        if codec.name == "zstd":
            import zstandard

            return (
                zstandard.ZstdCompressor(level=level).compress,
                zstandard.ZstdDecompressor().decompress,
            )
    except ModuleNotFoundError as exc:
        raise UsageError(f"measuring {codec} alone needs the Python package {exc.name}") from exc
    if codec.name == "zlib":
        return lambda data: zlib.compress(data, level), zlib.decompress
    raise UsageError(f"{codec} is nothing that can be measured alone")


def batches(image: Path, index: int, count: int) -> Iterator[bytes]:
    """Those of the stripes i with i mod count = index; zero pages are left out."""
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        waiting = np.empty((0, PAGE), dtype=np.uint8)
        for start in range(index * STRIPE_PAGES * PAGE, len(mapped), count * STRIPE_PAGES * PAGE):
            stripe = np.frombuffer(mapped[start : start + STRIPE_PAGES * PAGE], dtype=np.uint8)
            pages = stripe.reshape(-1, PAGE)
            waiting = np.concatenate((waiting, pages[pages.view(np.uint64).any(axis=1)]))
            while len(waiting) >= BATCH_PAGES:
                yield waiting[:BATCH_PAGES].tobytes()
                waiting = waiting[BATCH_PAGES:]
        if len(waiting):
            yield waiting.tobytes()


def measure_here(image: Path, codec: Codec, index: int, count: int) -> Speed:
    """One process's part."""
    encode, decode = coders(codec)
    plain = encoded = 0
    encode_s = decode_s = 0.0
    for batch in batches(image, index, count):
        began = time.perf_counter()
        small = encode(batch)
        middle = time.perf_counter()
        back = decode(small)
        decode_s += time.perf_counter() - middle
        encode_s += middle - began
        if back != batch:
            raise MigrationError(f"{codec} did not give back what it was given")
        plain += len(batch)
        encoded += len(small)
    if not plain:
        raise UsageError("an image of zero pages says nothing of a codec")
    return Speed(plain, encoded, encode_s, decode_s)


async def measure(image: Path, codec: Codec, count: int) -> Alone:
    """All parts at once, a process each.

    :raise MigrationError: one failed."""
    line = [sys.executable, "-m", "perf.codecspeed", str(image), str(codec)]
    processes = []
    try:
        for index in range(count):
            processes.append(
                await asyncio.create_subprocess_exec(
                    *line, str(index), str(count), stdout=asyncio.subprocess.PIPE
                )
            )
        outputs = await asyncio.wait_for(
            asyncio.gather(*(process.communicate() for process in processes)), RUN_WAIT_S
        )
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if any(process.returncode for process in processes):
        raise MigrationError(f"measuring {codec} alone failed")
    return Alone(tuple(Speed(*json.loads(output)) for output, _ in outputs))


if __name__ == "__main__":
    part = measure_here(
        Path(sys.argv[1]), parse_codec(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    )
    print(json.dumps(astuple(part)))
