"""A codec alone: every page that is not zero, once, and back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UsageError
from perf.codec import NONE, parse_codec
from perf.codecspeed import BATCH_PAGES, PAGE, Alone, Speed, batches, coders, measure
from perf.image import write_image


def test_parts_together_are_all_pages_that_are_not_zero(tmp_path: Path) -> None:
    image = tmp_path / "image"
    write_image(image, 20 * 2**20 + 3 * PAGE, "mixed")
    pages = np.fromfile(image, dtype=np.uint8).reshape(-1, PAGE)

    found = [[*batches(image, index, 3)] for index in range(3)]

    data = sorted(
        batch[at : at + PAGE]
        for part in found
        for batch in part
        for at in range(0, len(batch), PAGE)
    )
    assert data == sorted(page.tobytes() for page in pages if page.any())
    for part in found:
        assert {len(batch) for batch in part[:-1]} == {BATCH_PAGES * PAGE}


@pytest.mark.parametrize("name", ["lz4", "zstd:3", "zlib:1"])
def test_a_batch_comes_back(name: str) -> None:
    encode, decode = coders(parse_codec(name))
    batch = bytes(range(256)) * (BATCH_PAGES * PAGE // 256)

    assert len(encode(batch)) < len(batch) // 4
    assert decode(encode(batch)) == batch


def test_no_codec_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="none is nothing that can be measured"):
        coders(NONE)


def test_speeds_add_up_over_processes() -> None:
    alone = Alone((Speed(600, 300, 1.0, 0.5), Speed(600, 360, 2.0, 0.5)))

    assert alone.encode_bytes_per_s == 900
    assert alone.both_bytes_per_s == 400 + 240
    assert alone.encoded_share == 0.55
    ratios = alone.figures([2000.0])
    assert ratios["speed_ratio_ramferry_to_encoding_alone"] == [pytest.approx(1200 / 900 / 2)]


@pytest.mark.process
def test_two_processes_measure_an_image(tmp_path: Path) -> None:
    image = tmp_path / "image"
    write_image(image, 8 * 2**20, "text")

    alone = asyncio.run(measure(image, parse_codec("zlib:1"), 2))

    assert sum(one.plain_bytes for one in alone.speeds) == 8 * 2**20
    assert 0.1 < alone.encoded_share < 0.6
    assert alone.encode_bytes_per_s > alone.both_bytes_per_s > 0
