"""QMP's byte stream: any split gives the same values, and garbage costs only itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.qmp.framing import DEPTH_MAX, VALUE_BYTES_MAX, JsonSplitter
from engine.errors import WireError

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=10,
)
requests = st.lists(st.dictionaries(st.text(max_size=8), values, max_size=4), max_size=8)
gaps = st.sampled_from(["", " ", "\n", "\r\n", "\t "])


def read(pieces: list[bytes]) -> list[Any]:
    splitter = JsonSplitter()
    return [value for piece in pieces for value in splitter.feed(piece)]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, position = [], 0
    for size in sizes:
        pieces.append(data[position : position + size])
        position += size
    return [*pieces, data[position:]]


@given(requests, gaps, st.lists(st.integers(0, 9), max_size=60), st.booleans())
def test_any_split_of_any_stream_gives_the_same_values(
    sent: list[Any], gap: str, sizes: list[int], ascii_only: bool
) -> None:
    stream = gap.join(json.dumps(one, ensure_ascii=ascii_only) for one in sent) + gap

    got = read(cut(stream.encode(), sizes))

    assert [json.loads(value) for value in got] == sent


@given(st.binary(max_size=200), st.lists(st.integers(0, 9), max_size=30))
def test_garbage_never_raises_and_never_holds_back_what_follows(
    garbage: bytes, sizes: list[int]
) -> None:
    splitter = JsonSplitter()
    for piece in cut(garbage, sizes):
        list(splitter.feed(piece))
    # Whatever string or nesting the garbage has opened is closed by this:
    list(splitter.feed(b'"' + b"]" * 300 + b'"' + b"]" * 300 + b"\n"))
    for value in splitter.feed(b' {"a": 1} '):
        assert isinstance(value, bytes | WireError)


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b"nonsense {}", "invalid keyword 'nonsense'"),
        (b"} {}", "stray '}'"),
        (b"] {}", "stray ']'"),
        (b"12 {}", "invalid keyword '12'"),
    ],
)
def test_a_mistake_between_values_is_one_error(stream: bytes, error: str) -> None:
    got = read([stream])

    assert [str(one) for one in got if isinstance(one, WireError)] == [error]
    assert got[-1] == b"{}"


def test_a_value_that_is_too_long_is_refused_once_and_memory_stays_bounded() -> None:
    splitter = JsonSplitter()
    got: list[Any] = list(splitter.feed(b'{"x": "'))
    for _ in range(40):
        got += splitter.feed(b"y" * 65536)
        assert len(splitter._buffer) <= VALUE_BYTES_MAX + 65536
    got += splitter.feed(b'"} {"next": 1}')

    assert [type(one) for one in got] == [WireError, bytes]
    assert json.loads(got[-1]) == {"next": 1}


def test_a_value_that_is_too_deep_is_refused_once() -> None:
    got = read([b"[" * (DEPTH_MAX + 5) + b"]" * (DEPTH_MAX + 5) + b"{}"])

    assert [type(one) for one in got] == [WireError, bytes]
