"""Codecs as benchmarks name them."""

from __future__ import annotations

import pytest

from engine.errors import UsageError
from perf.codec import NONE, Codec, parse_codec


@pytest.mark.parametrize(
    ("text", "codec", "parameters"),
    [
        ("none", NONE, {"multifd-compression": "none"}),
        ("auto", Codec("auto", None), {"multifd-compression": "auto"}),
        ("zstd", Codec("zstd", 1), {"multifd-compression": "zstd", "multifd-zstd-level": 1}),
        ("zstd:-5", Codec("zstd", -5), {"multifd-compression": "zstd", "multifd-zstd-level": -5}),
        (" zlib:9", Codec("zlib", 9), {"multifd-compression": "zlib", "multifd-zlib-level": 9}),
        ("lz4:2", Codec("lz4", 2), {"multifd-compression": "lz4", "multifd-lz4-acceleration": 2}),
    ],
)
def test_a_codec_is_its_parameters(
    text: str, codec: Codec, parameters: dict[str, str | int]
) -> None:
    assert parse_codec(text) == codec
    assert parse_codec(str(codec)) == codec
    assert codec.parameters() == parameters


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gzip", "one of none, lz4, zstd, zlib, auto"),
        ("", "one of none"),
        ("none:1", "none has no level"),
        ("auto:", "auto has no level"),
        ("zstd:fast", "a level is a whole number"),
        ("zstd:", "a level is a whole number"),
    ],
)
def test_what_is_no_codec_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_codec(text)
