"""All zero-scan kernels against Python."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native

NAMES = _native.kernel_names("zero_scan")


def test_scalar_is_always_there_and_names_are_unique() -> None:
    assert "scalar" in NAMES
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(
    st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 4095), st.integers(1, 255))), max_size=9)
)
def test_every_kernel_says_what_python_says(name: str, pages: list[tuple[int, int] | None]) -> None:
    memory = bytearray(4096 * len(pages))
    for index, page in enumerate(pages):
        if page is not None:
            memory[index * 4096 + page[0]] = page[1]
    flags = bytearray(b"\x07" * len(pages))

    zero_count = _native.zero_scan(name, memory, flags, 4096)

    assert list(flags) == [page is None for page in pages]
    assert zero_count == pages.count(None)


@pytest.mark.parametrize("name", NAMES)
def test_a_huge_page_is_one_page(name: str) -> None:
    memory = bytearray(4 * 1024 * 1024)
    memory[-1] = 1
    flags = bytearray(2)

    assert _native.zero_scan(name, memory, flags, 2 * 1024 * 1024) == 1
    assert flags == b"\x01\x00"


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="'fastest' is not known"):
        _native.zero_scan("fastest", bytes(4096), bytearray(1), 4096)
    with pytest.raises(ValueError, match="no kernels of kind 'gather'"):
        _native.kernel_names("gather")
