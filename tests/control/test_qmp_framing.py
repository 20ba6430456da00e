"""QMP's byte stream: any split gives the same values, and garbage costs only itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.control.qmp import utf8
from engine.control.qmp.framing import DEPTH_MAX, TOKENS_MAX, VALUE_BYTES_MAX, JsonStream
from engine.control.qmp.lexer import JsonError, LimitExceeded, Mistake

numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=20).filter(
    lambda text: all(utf8.is_character(ord(character)) for character in text)
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner),
    max_leaves=10,
)
streams = st.lists(st.dictionaries(texts, values, max_size=4) | st.lists(values), max_size=8)
gaps = st.sampled_from(["", " ", "\n", "\r\n", "\t "])
cuts = st.lists(st.integers(0, 9), max_size=60)
junk = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b":", b",", b"\\u00", b"-", b"1."])
    | st.sampled_from([b"null", b"x", b"\xff", b"\0", b"\n", b" ", b"\xc3", b"0", b"e", b'"a":1'])
    | st.binary(max_size=3),
    max_size=60,
).map(b"".join)


def read(*pieces: bytes) -> list[Any]:
    stream = JsonStream()
    return [value for piece in pieces for value in stream.feed(piece)]


def told(*pieces: bytes) -> list[Any]:
    """What is wrong as text, values as they are."""
    return [str(one) if isinstance(one, JsonError) else one for one in read(*pieces)]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, position = [], 0
    for size in sizes:
        pieces.append(data[position : position + size])
        position += size
    return [*pieces, data[position:]]


@given(streams, gaps, cuts, st.booleans())
def test_any_split_of_any_stream_gives_the_same_values(
    sent: list[Any], gap: str, sizes: list[int], ascii_only: bool
) -> None:
    stream = gap.join(json.dumps(one, ensure_ascii=ascii_only) for one in sent) + gap

    assert read(*cut(stream.encode(), sizes)) == sent


@given(junk, cuts)
@example(b'{"a":1}}[{]}"\\', [3, 1, 4])
def test_any_split_of_garbage_says_the_same(garbage: bytes, sizes: list[int]) -> None:
    assert told(*cut(garbage, sizes)) == told(garbage)


@given(junk)
def test_after_any_garbage_a_byte_that_no_token_has_and_a_line_end_make_a_new_beginning(
    garbage: bytes,
) -> None:
    got = read(garbage, b"\xff\n", b'{"a": 1}')

    assert isinstance(got[-2], Mistake)
    assert got[-1] == {"a": 1}


@given(st.binary(max_size=8))
def test_modified_utf8_is_pythons_but_for_nul_and_what_is_no_character(data: bytes) -> None:
    def decoded(decode: Any) -> Any:
        try:
            return decode(data)
        except ValueError:
            return None

    usual = decoded(bytes.decode)
    if usual is not None and all(utf8.is_character(ord(one)) for one in usual):
        assert utf8.decode(data) == usual == utf8.decode_for_display(data)
    elif b"\xc0\x80" not in data:
        assert decoded(utf8.decode) is None
        assert "\ufffd" in utf8.decode_for_display(data)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"\xc0\x80", "\0"),
        (b"a\x80\xc3\xc3\xed\xa0\x80\xc1\x80\xfc\x80\xff", "a" + "\ufffd" * 7),
        (b"\xf8\x88\x80\x80\x80b", "\ufffdb"),
        (b"\xef\xbf\xbf\xef\xb7\x90\xf0\x9f\xbf\xbe", "\ufffd\ufffd\ufffd"),
    ],
)
def test_what_is_no_character_is_shown_once_a_sequence(text: bytes, shown: str) -> None:
    assert utf8.decode_for_display(text) == shown


STRAY = "JSON parse error, stray '{}'"
EXPECTING = "JSON parse error, expecting value"


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"nonsense {}", ["JSON parse error, invalid keyword 'nonsense'", {}]),
        (b"} {}", [EXPECTING, {}]),
        (b"12 'x' null {}", [12, "x", None, {}]),
        (b"@{@[@]@:@,@\t{}", [STRAY.format("@")] * 3 + [EXPECTING, STRAY.format("@")] * 3 + [{}]),
        (b'{"a":1,"a":2} {}', ["JSON parse error, duplicate key", {}]),
        (b'"ab\n{}', [STRAY.format('"ab\n'), {}]),
        (b"1e400 {}", ["JSON parse error, number out of range", {}]),
        (rb'"\q" {}', ["JSON parse error, invalid escape sequence in string", {}]),
        (rb'"\ud83dx" {}', [r"JSON parse error, \ud83d is not a valid Unicode character", {}]),
        (b"[1, 1.0, 1e0, -0, 18446744073709551616]", [[1, 1.0, 1.0, 0, 2.0**64]]),
    ],
)
def test_mistakes_are_told_with_qemus_texts_and_what_follows_is_read(
    stream: bytes, says: list[Any]
) -> None:
    got = told(stream)

    assert got == says
    assert [type(one) for one in got] == [type(one) for one in says]


def test_a_value_that_is_too_long_is_refused_and_memory_stays_bounded() -> None:
    stream = JsonStream()
    got: list[Any] = list(stream.feed(b'{"x": "'))
    for _ in range(40):
        got += stream.feed(b"y" * 65536)
        assert stream._lexer.held_bytes <= VALUE_BYTES_MAX
    got += stream.feed(b'\xff\n {"next": 1}')

    assert isinstance(got[0], LimitExceeded)
    assert str(got[0]) == "JSON token size limit exceeded"
    assert got[-1] == {"next": 1}


@pytest.mark.parametrize("too_many", [0, 1])
def test_a_value_has_so_many_bytes_and_no_more(too_many: int) -> None:
    text = b"x" * (VALUE_BYTES_MAX - len(b'[""]') - 1 + too_many)

    got = read(b'["' + text + b'"]')

    if too_many:
        assert isinstance(got[0], LimitExceeded)
    else:
        assert got == [[text.decode()]]


@pytest.mark.parametrize("too_many", [0, 1])
def test_a_value_has_so_many_tokens_and_no_more(too_many: int) -> None:
    count = (TOKENS_MAX - 1) // 2 + too_many  # elements, as many commas but one, two brackets

    got = told(b"[" + b",".join([b"1"] * count) + b"] {}")

    assert got == ["JSON token count limit exceeded" if too_many else [1] * count, {}]


@pytest.mark.parametrize("too_many", [0, 1])
def test_a_value_is_so_deep_and_no_deeper(too_many: int) -> None:
    depth = DEPTH_MAX + too_many

    got = told(b"[" * depth + b"]" * depth + b"{}")

    assert got[-1] == {}
    assert (got[0] == "JSON nesting depth limit exceeded") is bool(too_many)
    assert len(got) == (2 if not too_many else 1 + depth + 1)


def test_a_read_that_was_seen_before_is_the_same_value_again_and_nobody_elses() -> None:
    stream, data = JsonStream(), b'{"execute": "query-migrate", "id": 7}\n'
    for _ in range(3):
        (value,) = stream.feed(data)
        assert value == {"execute": "query-migrate", "id": 7}
        value["execute"] = "changed by whoever got it"


def test_a_read_that_was_seen_before_means_something_else_within_a_value() -> None:
    stream, data = JsonStream(), b'{"a": 1}'
    assert list(stream.feed(data)) == [{"a": 1}]
    assert list(stream.feed(b"[")) == []
    assert list(stream.feed(data)) == []
    assert list(stream.feed(b"]")) == [[{"a": 1}]]
    assert list(stream.feed(b'"')) == []
    assert list(stream.feed(data)) != [{"a": 1}]
