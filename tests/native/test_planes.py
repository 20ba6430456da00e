"""Bit planes against their definition, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from tests.native.support import PAGE, table_of

PLANE_PAGES = 32  #: of a group (native/planes.h)


def planes_of(pages: bytes) -> bytes:
    """Group by group: bit i of plane k's word c is bit k of word c of a page's row i."""
    found = b""
    for start in range(0, len(pages), PLANE_PAGES * PAGE):
        group = np.frombuffer(pages[start : start + PLANE_PAGES * PAGE], np.uint8)
        bits = np.unpackbits(group, bitorder="little").reshape(
            -1, 64, 8, 64
        )  # page, row, word, bit
        found += np.packbits(bits.transpose(3, 0, 2, 1), bitorder="little").tobytes()
    return found


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(0, 4),
    st.integers(0, 2**32),
)
def test_gathered_planes_are_the_bits_of_their_pages(
    gaps: list[tuple[int, int]], plane_runs: int, seed: int
) -> None:
    runs, end = [], 0
    for gap, count in gaps:
        runs.append((end + gap, count))
        end += gap + count
    plane_runs = min(plane_runs, len(runs))
    ram = np.random.default_rng(seed).bytes(end * PAGE)
    pages = [ram[first * PAGE : (first + count) * PAGE] for first, count in runs]
    first, rest = b"".join(pages[:plane_runs]), b"".join(pages[plane_runs:])

    gathered = _native.gather(ram, table_of(runs), len(runs), plane_runs)

    assert gathered == planes_of(first) + rest
    assert _native.restore_planes(gathered, len(first) // PAGE) == first


@pytest.mark.parametrize("bit", [0, 1, 7, 8, 31, 32, 63])
def test_a_bit_that_all_words_have_is_one_stretch(bit: int) -> None:
    page = np.full(PAGE // 8, 1 << bit, np.uint64).tobytes()

    planes = _native.gather(page, table_of([(0, 1)]), 1, 1)

    assert planes == bytes(bit * 64) + b"\xff" * 64 + bytes((63 - bit) * 64)
