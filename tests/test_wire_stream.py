"""Chunks of a stream: whole ones only, exactly so many bytes, and none that was changed."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import WireError
from engine.wire import CHUNK, ChunkReader, chunk

HEAD_MAX, BODY_MAX = 64, 256
heads = st.binary(min_size=1, max_size=HEAD_MAX)
bodies = st.binary(max_size=BODY_MAX)


def read(data: bytes, pieces: list[int]) -> tuple[list[tuple[bytes, bytes]], int]:
    """What comes out of a stream that delivers so many bytes at a time, and how far it was read."""
    reader, taken, at = ChunkReader(HEAD_MAX, BODY_MAX), [], 0
    for size in [*pieces, *([len(data)] * 4 * len(data))]:
        room = reader.room
        piece = data[at : at + min(size, len(room))]
        if not piece:
            break
        room[: len(piece)] = piece
        at += len(piece)
        if (one := reader.took(len(piece))) is not None:
            taken.append((bytes(one[0]), bytes(one[1])))
    return taken, at


@given(
    st.lists(st.tuples(heads, bodies), max_size=4), st.lists(st.integers(1, 40), max_size=40),
    st.binary(max_size=3),
)  # fmt: skip
def test_chunks_come_out_as_they_went_in_however_they_are_cut(
    sent: list[tuple[bytes, bytes]], pieces: list[int], behind: bytes
) -> None:
    data = b"".join(chunk(head, [body]) for head, body in sent)

    taken, read_bytes = read(data + behind, pieces)

    assert taken == sent
    assert read_bytes <= len(data) + len(behind)


@given(heads, bodies)
def test_a_reader_never_wants_a_byte_behind_the_chunk(head: bytes, body: bytes) -> None:
    data = chunk(head, [body])
    reader, at = ChunkReader(HEAD_MAX, BODY_MAX), 0
    while at < len(data):
        room = reader.room
        assert 0 < len(room) <= len(data) - at
        room[:] = data[at : at + len(room)]
        at += len(room)
        whole = reader.took(len(room))
    assert whole is not None
    assert reader.is_between


@given(heads, bodies, st.data())
def test_no_changed_bit_comes_through(head: bytes, body: bytes, data: st.DataObject) -> None:
    changed = chunk(head, [body])
    bit = data.draw(st.integers(0, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8

    with contextlib.suppress(WireError):
        assert read(bytes(changed), [])[0] == []


@pytest.mark.parametrize(
    ("head", "body"), [(0, 0), (HEAD_MAX + 1, 0), (1, BODY_MAX + 1), (2**32 - 1, 2**32 - 1)]
)
def test_forbidden_lengths_are_refused_before_any_memory_is_taken(head: int, body: int) -> None:
    with pytest.raises(WireError, match=f"chunk of {head} and {body} bytes"):
        read(CHUNK.pack(head, body, 0) + b"x" * 20, [])
