"""The runs of a packet against their definition: ascending tables, no page twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native, wire
from tests.native.support import pages_in, table_of

Runs = list[tuple[int, int]]
runs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4)), max_size=4)


@st.composite
def dealt(draw: st.DrawFn) -> tuple[Runs, int, int, int, Runs]:
    """Disjoint runs dealt to the five tables, each in order: often right; or anything."""
    if draw(st.booleans()):
        data = draw(runs)
        encoded = draw(st.integers(0, len(data)))
        planes = draw(st.integers(0, encoded))
        return data, planes, encoded, draw(st.integers(0, len(data) - encoded)), draw(runs)
    tables: tuple[Runs, Runs, Runs, Runs, Runs] = ([], [], [], [], [])
    first = 0
    for gap, count, table in draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 4)), max_size=20)
    ):
        tables[table].append((first + gap, count))
        first += gap + count
    both = tables[0] + tables[1]
    dealt_data = both + tables[2] + tables[3]
    return dealt_data, len(tables[0]), len(both), len(tables[2]), tables[4]


def is_right(
    data: Runs, planes: int, encoded: int, gathered: int, zero: Runs, page_count: int, unit: int
) -> bool:
    pages = pages_in(data) + pages_in(zero)
    split = encoded + gathered
    tables = (data[:planes], data[planes:encoded], data[encoded:split], data[split:], zero)
    ascending = all(a < b for table in tables for (a, _), (b, _) in itertools.pairwise(table))
    return (
        ascending
        and len(set(pages)) == len(pages)
        and all(count for _, count in data + zero)
        and all(page < page_count for page in pages)
        and not any(first % unit or count % unit for first, count in data + zero)
    )


@given(dealt(), st.integers(0, 200), st.sampled_from([1, 1, 2, 3]), st.booleans())
def test_exactly_the_right_tables_are_accepted(
    packet: tuple[Runs, int, int, int, Runs], page_count: int, unit: int, is_scaled: bool
) -> None:
    data, planes, encoded, gathered, zero = packet
    if is_scaled:  # so that whole units are frequent
        data, zero = ([(first * unit, count * unit) for first, count in t] for t in (data, zero))

    try:
        _native.packet_runs_check(
            table_of(data), planes, encoded, gathered, table_of(zero), page_count, unit
        )
    except ValueError:
        assert not is_right(data, planes, encoded, gathered, zero, page_count, unit)
    else:
        assert is_right(data, planes, encoded, gathered, zero, page_count, unit)


def test_the_largest_indices_do_not_wrap() -> None:
    last = table_of([(2**32 - 1, 1)])
    _native.packet_runs_check(last, 0, 0, 1, b"", 2**32, 1)
    with pytest.raises(ValueError, match="not within"):
        _native.packet_runs_check(table_of([(2**32 - 1, 2)]), 0, 0, 0, b"", 2**32, 1)


def test_no_batch_has_more_pages_than_a_packet_may_have() -> None:
    assert _native.BATCH_WALK_PAGES_MAX == wire.ZERO_PAGES_MAX
