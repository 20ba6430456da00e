"""Frames of the fault channel: what is encoded is decoded, anything else is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.errors import WireError

frames = st.builds(
    wire.FaultFrame,
    st.sampled_from(wire.FaultKind),
    st.binary(min_size=16, max_size=16),
    st.integers(1, 2**64 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(1, 2**16 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(1, wire.FAULT_PAGES_MAX),
)


@given(frames)
def test_a_frame_survives_the_wire(frame: wire.FaultFrame) -> None:
    encoded = frame.encode()
    assert len(encoded) == 56
    assert wire.decode_fault_frame(encoded) == frame


@given(frames, st.integers(0, 55), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_what_it_says(
    frame: wire.FaultFrame, at: int, change: int
) -> None:
    data = bytearray(frame.encode())
    data[at] ^= change
    with contextlib.suppress(WireError):
        assert wire.decode_fault_frame(bytes(data)) != frame


@given(st.binary(max_size=80))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_fault_frame(data)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pages": 513}, "513 pages"),
        ({"pages": 0}, "0 pages"),
        ({"block_id": 0}, "zero id"),
        ({"sequence": 0}, "zero id or sequence"),
        ({"request": 0}, "zero id"),
        ({"session": bytes(15)}, None),
    ],
)
def test_what_no_frame_can_say_is_refused(fields: dict[str, int], reason: str | None) -> None:
    words = {
        "kind": wire.FaultKind.DEMAND, "session": b"s" * 16, "sequence": 1, "request": 1,
    } | fields  # fmt: skip
    frame = wire.FaultFrame(**words)  # type: ignore[arg-type]
    if reason is None:
        assert wire.decode_fault_frame(frame.encode()).session != bytes(15)
        return
    with pytest.raises(WireError, match=reason):
        wire.decode_fault_frame(frame.encode())
