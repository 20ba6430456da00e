"""What is worth compressing: judged by what codecs do with it."""

from __future__ import annotations

import itertools
import mmap
import random
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from tests.native.support import PAGE, pages_in, runs_of, table_of

Fill = Callable[[random.Random], bytes]


def compressible_pages(ram: bytes, runs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The pages that are worth it, in their order, and the others."""
    words, others, raw = split_pages(ram, runs)
    return sorted(words + others), raw


def split_pages(ram: bytes, runs: list[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
    """The pages of words, of bytes, and raw ones; each part's runs ascend and are merged."""
    output = bytearray(8 * sum(count for _, count in runs))
    words, others, pages, raw = _native.split_compressible(ram, table_of(runs), len(runs), output)
    table = runs_of(output, words + others + raw)
    parts = (table[:words], table[words : words + others], table[words + others :])
    for part in parts:
        assert all(sum(left) < right[0] for left, right in itertools.pairwise(part))
    assert sum(count for _, count in parts[0] + parts[1]) == pages
    return pages_in(parts[0]), pages_in(parts[1]), pages_in(parts[2])


def filled(contents: str, pages: int) -> bytes:
    with mmap.mmap(-1, pages * PAGE) as ram:
        _native.workload_fill(ram, 0, pages, contents, 3)
        return ram[:]


def words(pack: str, numbers: list[int] | list[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}{pack}", *numbers)


KINDS: dict[str, Fill] = {
    "counters": lambda r: words("Q", [r.randrange(1000) for _ in range(512)]),
    "small-ints": lambda r: words("I", [r.randrange(2**16) for _ in range(1024)]),
    "pointers": lambda r: words(
        "Q", [0x7F5A00000000 + r.randrange(2**28) * 16 for _ in range(512)]
    ),
    "tagged": lambda r: words("Q", [r.randrange(2**47) for _ in range(512)]),
    "hex": lambda r: r.randbytes(2048).hex().encode(),
    "base64-like": lambda r: bytes(
        r.choices(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopq", k=PAGE)
    ),
    "sparse": lambda r: (r.randbytes(16) + bytes(112)) * 32,
    "half-random": lambda r: r.randbytes(2048) + bytes(2048),
    "last-quarter": lambda r: r.randbytes(3072) + b"the quick brown fox jumps over! " * 32,
    "repeated-key": lambda r: r.randbytes(32) * 128,
    "zero": lambda r: bytes(PAGE),
}

#: Words that share their upper bytes; all but the first have what LZ finds.
OBJECTS: dict[str, Fill] = {
    "near": lambda r: words("Q", [0x7F5A00000000 + r.randrange(2**20) * 16 for _ in range(512)]),
    "objects": lambda r: words(
        "Q", [n for _ in range(128) for n in (1, 0x7F5A00001230, r.randrange(2**20) * 16, 0)]
    ),
    "strings": lambda r: b"".join(
        r.choice([b"alpha", b"beta", b"gamma and delta", b"epsilon"]).ljust(16, b"\0")
        for _ in range(256)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_codecs_gain_on_is_compressible(kind: str) -> None:
    source = random.Random(kind)
    ram = b"".join(KINDS[kind](source) for _ in range(400))

    good, raw = compressible_pages(ram, [(0, 400)])

    assert not raw
    assert good == list(range(400))


@pytest.mark.parametrize(
    ("kind", "are_words"),
    [
        ("counters", True), ("near", True), ("small-ints", False), ("pointers", False),
        ("tagged", False),
        ("objects", False), ("strings", False), ("sparse", False), ("hex", False), ("zero", False),
    ],
)  # fmt: skip
def test_words_are_numbers_and_pointers_that_seldom_come_again(kind: str, are_words: bool) -> None:
    """The others fill too many bits of a word, or have what LZ finds: `objects`, `strings`."""
    source = random.Random(kind)
    fill = {**KINDS, **OBJECTS}[kind]
    ram = b"".join(fill(source) for _ in range(400))

    words, others, raw = split_pages(ram, [(0, 400)])

    assert not raw
    assert len(words if are_words else others) >= 320


@pytest.mark.parametrize("contents", ["text", "heap"])
def test_contents_of_the_workload_are_compressible(contents: str) -> None:
    _, raw = compressible_pages(filled(contents, 512), [(0, 512)])

    assert not raw


@pytest.mark.parametrize("kind", ["random", "random-with-headers", "workload", "deflated"])
def test_random_and_compressed_pages_are_raw(kind: str) -> None:
    if kind == "random":
        ram = random.Random(1).randbytes(512 * PAGE)
    elif kind == "random-with-headers":
        ram = b"".join(bytes(48) + random.Random(i).randbytes(PAGE - 48) for i in range(512))
    elif kind == "workload":
        ram = filled("random", 512)
    else:
        ram = zlib.compress(filled("heap", 2048), 9)[16 : 16 + 512 * PAGE]
    pages = len(ram) // PAGE

    good, raw = compressible_pages(ram, [(0, pages)])

    assert pages > 300
    assert len(good) <= pages // 200
    assert len(raw) >= pages - pages // 200


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=12), st.integers(0, 2**32)
)
def test_both_parts_hold_each_page_once_in_order_and_merged(
    gaps: list[tuple[int, int]], seed: int
) -> None:
    runs, end = [], 0
    for gap, count in gaps:
        runs.append((end + gap, count))
        end += gap + count
    source = random.Random(seed)
    is_random = [source.random() < 0.5 for _ in range(end)]
    ram = b"".join(source.randbytes(PAGE) if flag else bytes(PAGE) for flag in is_random)

    good, raw = compressible_pages(ram, runs)

    assert good == [page for page in pages_in(runs) if not is_random[page]]
    assert raw == [page for page in pages_in(runs) if is_random[page]]


def test_the_runs_may_be_split_in_their_own_table() -> None:
    ram = random.Random(5).randbytes(PAGE) + bytes(PAGE) + random.Random(6).randbytes(PAGE)
    table = bytearray(table_of([(0, 3)]) + bytes(16))

    assert _native.split_compressible(ram, table, 1, table) == (0, 1, 1, 2)
    assert runs_of(table, 3) == [(1, 1), (0, 1), (2, 1)]
