"""The page hash tells every change, and scans only what it may."""

from __future__ import annotations

import os
import random

from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from tests.native.support import (
    PAGE,
    bitmap_of,
    pages_of,
    shared_memory,
    slice_pages,
    slices,
    table_of,
)

PAGES = 200
some_pages = st.sets(st.integers(0, PAGES - 1))
TABLE = table_of([(0, PAGES)])


def hash_of(page: bytes | bytearray, seed: int) -> bytes:
    """One page's hash."""
    hashes = bytearray(16)
    _native.hash_pages(page, seed, hashes, table_of([(0, 1)]), 1)
    return bytes(hashes)


def test_every_single_byte_and_every_seed_matter() -> None:
    page = bytearray(random.Random(3).randbytes(PAGE))
    seen = {hash_of(page, 1)}
    for at in range(PAGE):
        page[at] ^= 1 + at % 255
        seen.add(hash_of(page, 1))
        page[at] ^= 1 + at % 255
    seen |= {hash_of(page, seed) for seed in (0, 2, 3, 2**63, 2**64 - 1)}

    assert len(seen) == 1 + PAGE + 5


def test_hashes_land_at_their_pages_and_nowhere_else() -> None:
    pages = [bytes([i]) * PAGE for i in range(5)]
    hashes = bytearray(b"\xaa" * 16 * 10)

    _native.hash_pages(b"".join(pages), 9, hashes, table_of([(7, 2), (0, 3)]), 2)

    places = {7: 0, 8: 1, 0: 2, 1: 3, 2: 4}
    for page in range(10):
        wanted = hash_of(pages[places[page]], 9) if page in places else b"\xaa" * 16
        assert hashes[16 * page : 16 * page + 16] == wanted


@given(some_pages, some_pages, some_pages, slices(PAGES))
def test_scan_sets_changed_candidates_of_the_slice(
    changed: set[int], candidates: set[int], dirty: set[int], page_slice: _native.Slice
) -> None:
    ram, hashes = bytearray(PAGES * PAGE), bytearray(16 * PAGES)
    _native.hash_pages(ram, 4, hashes, TABLE, 1)
    for page in changed:
        ram[page * PAGE + page * 19 % PAGE] = 1
    dirty_bitmap = bitmap_of(dirty, PAGES)

    newly_set = _native.hash_scan(
        ram, 4, hashes, bytes(bitmap_of(candidates, PAGES)), dirty_bitmap, page_slice
    )

    found = changed & candidates & slice_pages(page_slice)
    assert pages_of(dirty_bitmap) == dirty | found
    assert newly_set == len(found - dirty)


def test_scan_leaves_pages_that_are_no_candidates_unallocated() -> None:
    with shared_memory(PAGES * PAGE) as (fd, ram):
        dirty = bitmap_of((), PAGES)

        _native.hash_scan(
            ram, 1, bytes(16 * PAGES), bitmap_of({5}, PAGES), dirty, (PAGES, 64, 0, 1)
        )

        assert pages_of(dirty) == {5}
        assert os.fstat(fd).st_blocks * 512 <= PAGE
