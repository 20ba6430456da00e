"""QEMU's page deltas against a model of the format in Python, and hostile ones."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native
from tests.native.support import PAGE, bitmap_of, pages_of, table_of

NAMES = _native.kernel_names("xbzrle")


def length_of(number: int) -> bytes:
    """ULEB128."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def runs_between(old: bytes, new: bytes) -> Iterator[tuple[int, bytes]]:
    """(bytes kept, bytes changed) pairs; the last one may have changed none."""
    kept, changed = 0, bytearray()
    for before, after in zip(old, new, strict=True):
        if before != after:
            changed.append(after)
        elif changed:
            yield kept, bytes(changed)
            kept, changed = 1, bytearray()
        else:
            kept += 1
    yield kept, bytes(changed)


def delta_between(old: bytes, new: bytes) -> bytes:
    """The model."""
    return b"".join(
        length_of(kept) + length_of(len(changed)) + changed
        for kept, changed in runs_between(old, new)
        if changed
    )


def encode(name: str, old: bytes, new: bytes, room: int = PAGE) -> bytes | None:
    output = bytearray(room)
    length = _native.xbzrle_encode(name, old, new, output)
    return None if length < 0 else bytes(output[:length])


def apply(old: bytes, deltas: bytes) -> bytes:
    """One delta with its length, applied to a page that was placed before."""
    with mmap.mmap(-1, PAGE) as ram:
        ram[:] = old
        _native.delta_apply(ram, bitmap_of({0}, 1), deltas, table_of([(0, 1)]), 1, 1)
        return ram[:]


def with_length(delta: bytes) -> bytes:
    return struct.pack("<H", len(delta)) + delta


@st.composite
def page_pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """An old page, and a new one that differs in runs of all lengths."""
    source = random.Random(draw(st.integers(0, 2**32)))
    old = source.randbytes(PAGE) if draw(st.booleans()) else bytes(PAGE)
    new, at = bytearray(old), 0
    longest = draw(st.sampled_from([1, 2, 8, 100, 300, PAGE]))
    for kept, changed in draw(
        st.lists(st.tuples(st.integers(0, longest), st.integers(1, longest)))
    ):
        at += kept
        new[at : at + changed] = (byte ^ 0x5A for byte in new[at : at + changed])
        at += changed
    return old, bytes(new[:PAGE])


@pytest.mark.parametrize("name", NAMES)
@given(page_pairs())
def test_every_kernel_writes_what_the_model_does_and_it_decodes(
    name: str, pages: tuple[bytes, bytes]
) -> None:
    old, new = pages
    wanted = delta_between(old, new)

    delta = encode(name, old, new)

    assert delta == (wanted if len(wanted) <= PAGE else None)
    if delta:
        assert apply(old, with_length(delta)) == new
        assert encode(name, old, new, len(wanted)) == wanted
        assert encode(name, old, new, len(wanted) - 1) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_documented_example(name: str) -> None:
    old = bytes(1001) + bytes.fromhex("05060708090a0b0c0d0e0f1011121368 00006b006d") + bytes(3074)
    new = bytes(1001) + bytes.fromhex("0102030405060708090a0b0c0d0e0f68 0000670069") + bytes(3074)
    delta = bytes.fromhex("e9070f0102030405060708090a0b0c0d0e0f 030167 010169")

    assert encode(name, old, new) == delta
    assert delta_between(old, new) == delta
    assert apply(old, with_length(delta)) == new


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_the_page(name: str) -> None:
    old = bytes(PAGE)
    first, last = b"\x01" + bytes(PAGE - 1), bytes(PAGE - 1) + b"\x01"

    assert encode(name, old, old) == b""
    assert encode(name, old, first) == b"\x00\x01\x01"
    assert encode(name, old, last) == b"\xff\x1f\x01\x01"
    assert encode(name, old, b"\x01" * PAGE) is None
    assert encode(name, old, b"\x01" * PAGE, 2 * PAGE) == b"\x00\x80\x20" + b"\x01" * PAGE


def model_decodes(delta: bytes) -> list[tuple[int, bytes]] | None:
    """The changes (place, bytes) of a valid delta, None for any other."""
    changes: list[tuple[int, bytes]] = []
    at = place = 0
    while at < len(delta) or not changes:
        lengths = []
        for _ in range(2):
            part = delta[at : at + 2]
            if len(part) == 0 or (part[0] >= 0x80 and (len(part) < 2 or part[1] >= 0x80)):
                return None
            lengths.append(part[0] % 0x80 + (part[1] * 0x80 if part[0] >= 0x80 else 0))
            at += 2 if part[0] >= 0x80 else 1
        kept, changed = lengths
        data = delta[at : at + changed]
        if changed == 0 or len(data) < changed or (kept == 0 and changes):
            return None
        place += kept
        changes.append((place, data))
        place += changed
        at += changed
        if place > PAGE:
            return None
    return changes


#: Nearly right: short runs, then bytes that are lengths or content as it comes.
nearly_deltas = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=6)).map(
            lambda run: length_of(run[0]) + length_of(len(run[1])) + run[1]
        ),
        st.binary(max_size=3),
        st.sampled_from([b"\xff\x1f\x01x", b"\x80\x20", b"\x80\x00\x01x", b"\xff\x7f", b"\x00"]),
    ),
    max_size=6,
).map(b"".join)


@given(st.one_of(nearly_deltas, st.binary(max_size=40)))
def test_any_bytes_are_applied_as_the_model_says_or_refused_and_nothing_written(
    delta: bytes,
) -> None:
    changes = model_decodes(delta)
    with mmap.mmap(-1, 3 * PAGE) as ram:
        before = b"\xaa" * 3 * PAGE
        ram[:] = before
        deltas = with_length(b"\x00\x01x") + with_length(delta)  # the first one is right
        if changes is None:
            with pytest.raises(ValueError, match="delta 1 of 2 is wrong"):
                _native.delta_apply(ram, bitmap_of({0, 1}, 3), deltas, table_of([(0, 2)]), 1, 3)
            assert ram[:] == before
            return
        wanted = bytearray(before)
        wanted[0] = ord("x")
        for place, data in changes:
            wanted[PAGE + place : PAGE + place + len(data)] = data
        _native.delta_apply(ram, bitmap_of({0, 1}, 3), deltas, table_of([(0, 2)]), 1, 3)
        assert ram[:] == wanted


@given(st.binary(max_size=60), st.integers(1, 4))
def test_random_batches_never_write_outside_their_pages(deltas: bytes, pages: int) -> None:
    with mmap.mmap(-1, 6 * PAGE) as ram:
        placed = bitmap_of((), 6)
        try:
            _native.delta_apply(ram, placed, deltas, table_of([(1, pages)]), 1, 6)
        except ValueError:
            assert ram[:] == bytes(6 * PAGE)
            assert not any(placed)
        assert ram[:PAGE] == bytes(PAGE)
        assert ram[(1 + pages) * PAGE :] == bytes((5 - pages) * PAGE)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_batch_that_is_cut_or_has_more_is_refused_whole(cut: int) -> None:
    deltas = with_length(b"\x00\x01x") + with_length(b"\x03\x02yz")
    runs = table_of([(0, 1), (2, 1)])
    with mmap.mmap(-1, 3 * PAGE) as ram:
        placed = bitmap_of((), 3)
        for wrong in (deltas[:-cut], deltas + bytes(cut), b""):
            with pytest.raises(ValueError, match="is wrong, or bytes are left over"):
                _native.delta_apply(ram, placed, wrong, runs, 2, 3)
            assert ram[:] == bytes(3 * PAGE)
            assert not any(placed)
        _native.delta_apply(ram, placed, deltas, runs, 2, 3)
        assert ram[0] == ord("x")
        assert ram[2 * PAGE + 3 : 2 * PAGE + 5] == b"yz"
        assert pages_of(placed) == {0, 2}
