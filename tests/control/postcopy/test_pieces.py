"""Bitmaps in pieces, against sets of pages; pieces of hostile peers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.control.postcopy.pieces import Announced, Collected, put, received_pieces, take_away
from engine.errors import WireError
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock

PAGES = (1, 64, 65, 200)  #: of each block: less than a word, a word, more, and several
Pages = set[tuple[int, int]]

every_page = [(block, page) for block, count in enumerate(PAGES) for page in range(count)]
some_pages = st.sets(st.sampled_from(every_page))


@contextmanager
def bitmaps(pages: Iterable[tuple[int, int]] = ()) -> Iterator[PageBitmaps]:
    blocks = [RamBlock(f"ram{i}", count * PAGE_SIZE, -1) for i, count in enumerate(PAGES)]
    ours = PageBitmaps.create("test", blocks)
    try:
        for block, page in pages:
            ours[block][page // 8] |= 1 << page % 8
        yield ours
    finally:
        ours.close()


def pages_of(ours: PageBitmaps) -> Pages:
    return {(i, page) for i, page in every_page if ours[i][page // 8] >> page % 8 & 1}


def through_the_wire(message: wire.Message) -> wire.Message:
    decoder: wire.Decoder[wire.Message] = wire.Decoder(
        wire.ToSource | wire.ToDestination, wire.MAIN_BYTES_MAX, "test"
    )
    return decoder.decode(wire.encode(message))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One word each, so that these bitmaps have several."""
    monkeypatch.setattr(wire, "BITS_BYTES_MAX", 8)


@pytest.mark.usefixtures("small_pieces")
@given(there=some_pages, before=some_pages)
def test_what_is_put_is_there_and_what_is_taken_away_is_not(there: Pages, before: Pages) -> None:
    with bitmaps(there) as said, bitmaps(before) as known, bitmaps(before) as dirty:
        for piece in received_pieces(said):
            assert len(piece.bits) == 8
            assert any(piece.bits)
            message = through_the_wire(piece)
            assert isinstance(message, wire.Received)
            put(message, known)
            take_away(message, dirty)
        assert pages_of(known) == before | there
        assert pages_of(dirty) == before - there


@given(rounds=st.lists(some_pages, max_size=4))
def test_each_page_is_announced_once(rounds: list[Pages]) -> None:
    told: Pages = set()
    with bitmaps() as stale:
        announced = Announced(stale.blocks)
        for dirty_pages in rounds:
            with bitmaps(dirty_pages) as dirty, bitmaps() as news:
                for piece in announced.news(dirty):
                    put(piece, news)
                    put(piece, stale)
                assert pages_of(news) == dirty_pages - told
            told |= dirty_pages
        assert pages_of(stale) == told


@given(
    block=st.integers(-2, len(PAGES) + 1) | st.integers(-(2**63), 2**63 - 1),
    first_page=st.integers(-65, 260) | st.integers(-(2**63), 2**63 - 1),
    bits=st.binary(max_size=40) | st.integers(0, 5).map(lambda words: b"\1" + bytes(8 * words + 7)),
)
def test_a_piece_is_right_or_changes_nothing(block: int, first_page: int, bits: bytes) -> None:
    message = wire.Received(block, first_page, bits)
    number = int.from_bytes(bits, "little")
    named = {first_page + bit for bit in range(8 * len(bits)) if number >> bit & 1}
    is_right = (
        0 <= block < len(PAGES)
        and first_page >= 0
        and first_page % 64 == 0
        and len(bits) > 0
        and len(bits) % 8 == 0
        and first_page + 8 * len(bits) <= -(-PAGES[block] // 64) * 64
        and all(page < PAGES[block] for page in named)
    )
    with bitmaps() as ours:
        if is_right:
            put(message, ours)
            assert pages_of(ours) == {(block, page) for page in named}
            return
        with pytest.raises(WireError):
            put(message, ours)
        with pytest.raises(WireError):
            take_away(message, ours)
        assert pages_of(ours) == set()


def test_a_piece_that_is_too_long_is_refused() -> None:
    bits = bytes(wire.BITS_BYTES_MAX + 8)
    with pytest.raises(WireError, match="bytes of a bitmap"):
        wire.Received(0, 0, bits).check([8 * len(bits)])


def test_a_peer_cannot_say_more_pieces_than_there_are() -> None:
    with bitmaps() as ours:
        collected = Collected(ours.blocks)
        for _ in PAGES:
            collected.take(wire.Received(0, 0, b"\1" + bytes(7)))
        with pytest.raises(WireError, match="more pieces"):
            collected.take(wire.Received(0, 0, b"\1" + bytes(7)))


def test_a_collected_piece_is_checked_when_it_comes() -> None:
    with bitmaps() as ours:
        collected = Collected(ours.blocks)
        with pytest.raises(WireError, match="beyond 1"):
            collected.take(wire.Received(0, 0, b"\2" + bytes(7)))


@given(there=some_pages, before=some_pages)
def test_what_was_collected_is_taken_away_at_once(there: Pages, before: Pages) -> None:
    with bitmaps(there) as said, bitmaps(before) as dirty:
        collected = Collected(said.blocks)
        for piece in received_pieces(said):
            collected.take(piece)
        collected.take_away_from(dirty)
        assert pages_of(dirty) == before - there
