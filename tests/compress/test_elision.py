"""Pages that did not change stay out; what the destination has is always the source's."""

from __future__ import annotations

import mmap

from hypothesis import given
from hypothesis import strategies as st

from engine.compress.elision import ChangedPages, SentHashes
from tests.native.support import PAGE, pages_in, runs_of, table_of

PAGES = 70


class Link:
    """Two blocks at a source, and at a destination to which batches are delivered."""

    def __init__(self) -> None:
        self.hashes = SentHashes([PAGES, PAGES])
        self.source = [mmap.mmap(-1, PAGES * PAGE) for _ in range(2)]
        self.target = [bytearray(PAGES * PAGE) for _ in range(2)]

    def send(self, block: int, runs: list[tuple[int, int]]) -> tuple[ChangedPages, list[int]]:
        pages, table = bytearray(PAGES * PAGE), bytearray(PAGES * 8)
        changed = self.hashes.gather(
            block, self.source[block], table_of(runs), len(runs), pages, table
        )
        sent = pages_in(runs_of(table, changed.runs))
        assert len(sent) == changed.pages == len(pages_in(runs)) - changed.unchanged_pages
        for position, page in enumerate(sent):
            content = pages[position * PAGE : (position + 1) * PAGE]
            self.target[block][page * PAGE : (page + 1) * PAGE] = content
        return changed, sent


def test_a_page_goes_again_only_when_its_content_is_another() -> None:
    link = Link()

    first, _ = link.send(0, [(0, 10), (20, 5)])
    link.source[0][3 * PAGE] = 1
    link.source[0][20 * PAGE + 4095] = 1
    second, sent = link.send(0, [(0, 10), (20, 5)])
    link.source[0][3 * PAGE] = 0
    third, _ = link.send(0, [(0, 10)])
    other, _ = link.send(1, [(0, 10)])

    assert first == ChangedPages(15, 2, 0)
    assert (second, sent) == (ChangedPages(2, 2, 13), [3, 20])
    assert third == ChangedPages(1, 1, 9)
    assert other == ChangedPages(10, 1, 0)


def test_what_is_forgotten_goes_again() -> None:
    link = Link()
    link.send(0, [(0, PAGES)])

    link.hashes.forget_pages(0, table_of([(1, 2), (60, 10)]), 2)
    _, sent = link.send(0, [(0, PAGES)])
    link.hashes.forget()
    everything, _ = link.send(0, [(0, PAGES)])

    assert sent == [1, 2, *range(60, 70)]
    assert everything == ChangedPages(PAGES, 1, 0)


@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, PAGES - 1), max_size=8),
            st.binary(min_size=1, max_size=2),
            st.integers(0, PAGE - 2),
            st.integers(0, PAGES - 1).flatmap(
                lambda first: st.tuples(st.just(first), st.integers(1, PAGES - first))
            ),
        ),
        max_size=8,
    )
)
def test_the_destination_has_every_page_that_was_asked_for(
    steps: list[tuple[set[int], bytes, int, tuple[int, int]]],
) -> None:
    link = Link()
    asked = set[int]()
    for written, content, at, run in steps:
        for page in written:
            start = page * PAGE + at
            link.source[0][start : start + len(content)] = content
        before = bytes(link.target[0])
        _, sent = link.send(0, [run])
        for page in pages_in([run]):
            own = slice(page * PAGE, (page + 1) * PAGE)
            assert link.target[0][own] == link.source[0][own]
            assert (page in sent) == (page not in asked or before[own] != link.source[0][own])
        asked.update(pages_in([run]))
