"""Sizes: one grammar, exact, and nothing else passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.sizes import UNITS, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("4k", 4096), ("1.5G", 3 * 2**29), ("2T", 2**41), ("7b", 7),
        ("0.1k", 102), ("18446744073709551615", 2**64 - 1), ("1.50M", 3 * 2**19),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "+1", "1x", "1e9", "nan", "inf", "1..2M", "M5", "1.", ".5G", "1_0", "0x10",
     " 1", "1\n", "\u0661", "1GG", "1KB", "9" * 5000],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(UsageError, match="Invalid size") as refused:
        parse_size(text)
    assert len(str(refused.value)) < 180
    assert "\n" not in str(refused.value)


@given(st.integers(min_value=0, max_value=10**20 - 1), st.sampled_from(list(UNITS)), st.booleans())
def test_sizes_are_in_units_of_1024(number: int, unit: str, upper: bool) -> None:
    assert parse_size(f"{number}{unit.upper() if upper else unit}") == number * UNITS[unit]


@given(st.integers(0, 2**40), st.integers(0, 99))
def test_fractions_are_exact(whole: int, hundredths: int) -> None:
    assert parse_size(f"{whole}.{hundredths:02}T") == (whole * 100 + hundredths) * 2**40 // 100
