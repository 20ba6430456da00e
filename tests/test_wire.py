"""What crosses a process or a host: round trips, and hostile bytes."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.errors import WireError

SESSION = bytes(range(16))


def run_table(runs: list[tuple[int, int]]) -> bytes:
    return b"".join(wire.RUN.pack(first, count) for first, count in runs)


runs = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 8)), max_size=60)


@st.composite
def pages_packets(draw: st.DrawFn) -> wire.Packet:
    """PAGES of any kind, or DELTAS."""
    data, zero = draw(runs), draw(runs)
    kind = draw(st.sampled_from([wire.PacketKind.PAGES, wire.PacketKind.DELTAS]))
    if kind is wire.PacketKind.DELTAS:
        data, zero = data or [(7, 1)], []
    encoded = draw(st.integers(0, len(data))) if kind is wire.PacketKind.PAGES else len(data)
    pages, encoded_pages = (sum(count for _, count in part) for part in (data, data[:encoded]))
    plain_bytes, codec = encoded_pages * 4096, wire.CodecId.RAW
    if kind is wire.PacketKind.DELTAS:
        plain_bytes = draw(st.integers(3 * pages, 4096 * pages))
    payload_bytes = plain_bytes
    if encoded and (kind is wire.PacketKind.PAGES or draw(st.booleans())):
        codec = draw(st.sampled_from([one for one in wire.CodecId if one is not wire.CodecId.RAW]))
        payload_bytes = draw(st.integers(1, plain_bytes - 1))
    return wire.Packet(
        kind,
        draw(st.binary(min_size=16, max_size=16)),
        channel_id=draw(st.integers(1, 255)),
        incarnation=draw(st.integers(1, 2**32 - 1)),
        sequence=draw(st.integers(1, 2**64 - 1)),
        round_number=draw(st.integers(1, 2**32 - 1)),
        block_id=draw(st.integers(1, 2**16 - 1)),
        codec=codec,
        pages=pages,
        zero_pages=sum(count for _, count in zero),
        payload_bytes=payload_bytes + (pages - encoded_pages) * 4096,
        plane_runs=draw(st.integers(0, encoded)) if kind is wire.PacketKind.PAGES else 0,
        encoded_runs=encoded,
        gathered_runs=draw(st.integers(0, len(data) - encoded)),
        plain_bytes=plain_bytes,
        data_runs=run_table(data),
        zero_runs=run_table(zero),
    )


def open_packet() -> wire.Packet:
    return wire.Packet(wire.PacketKind.OPEN, SESSION, 1, 1, 1)


@given(pages_packets())
def test_a_packet_decodes_to_itself(packet: wire.Packet) -> None:
    assert wire.decode_packet(packet.encode()) == packet


@given(pages_packets())
def test_payload_frames_hold_exactly_the_pages_of_the_runs(packet: wire.Packet) -> None:
    assert sum(packet.frame_sizes()) == packet.payload_bytes
    groups = [bool(packet.encoded_runs), bool(packet.gathered_runs)]
    direct = len(packet.data_runs) // wire.RUN.size - packet.encoded_runs - packet.gathered_runs
    assert len(packet.frame_sizes()) == direct + sum(groups)


def encoded_packet(**other: Any) -> wire.Packet:
    """Two pages in 100 bytes of zstd, and one raw page."""
    fields: dict[str, Any] = {
        "codec": wire.CodecId.ZSTD, "pages": 3, "payload_bytes": 4196, "encoded_runs": 1,
        "plain_bytes": 8192, "data_runs": run_table([(0, 2), (4, 1)]),
    }  # fmt: skip
    kind = other.pop("kind", wire.PacketKind.PAGES)
    return wire.Packet(kind, SESSION, 1, 1, 2, **fields | other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"plain_bytes": 8191}, {"plain_bytes": 2**32 - 1}, {"plain_bytes": 0},
        {"payload_bytes": 4096}, {"payload_bytes": 4096 + 8192}, {"payload_bytes": 0},
        {"payload_bytes": 2**64 - 1}, {"codec": wire.CodecId.RAW}, {"encoded_runs": 0},
        {"encoded_runs": 2}, {"encoded_runs": 3}, {"gathered_runs": 2}, {"plane_runs": 2},
        {"kind": wire.PacketKind.DELTAS},
        {"kind": wire.PacketKind.DELTAS, "encoded_runs": 2, "plain_bytes": 200, "plane_runs": 1,
         "payload_bytes": 100},
        {"kind": wire.PacketKind.DELTAS, "encoded_runs": 2, "plain_bytes": 8},
        {"kind": wire.PacketKind.DELTAS, "encoded_runs": 2, "plain_bytes": 3 * 4096 + 1},
        {"kind": wire.PacketKind.DELTAS, "encoded_runs": 2, "plain_bytes": 9, "payload_bytes": 9},
        {"kind": wire.PacketKind.DELTAS, "encoded_runs": 2, "plain_bytes": 9, "payload_bytes": 8,
         "zero_pages": 1, "zero_runs": b"\x09\0\0\0\x01\0\0\0"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_encoded_must_shrink_and_promise_what_its_pages_hold(wrong: dict[str, Any]) -> None:
    assert wire.decode_packet(encoded_packet().encode()) == encoded_packet()

    with pytest.raises(WireError, match="encoded"):
        wire.decode_packet(encoded_packet(**wrong).encode())


@given(pages_packets(), st.data())
def test_a_cut_header_is_refused(packet: wire.Packet, data: st.DataObject) -> None:
    frame = packet.encode()
    length = data.draw(st.integers(0, len(frame) - 1))

    with pytest.raises(WireError):
        wire.decode_packet(frame[:length])


@given(pages_packets(), st.binary(min_size=1, max_size=64))
def test_a_header_with_something_behind_it_is_refused(packet: wire.Packet, tail: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_packet(packet.encode() + tail)


@given(st.binary(max_size=4096))
def test_random_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_packet(data)


@given(pages_packets(), st.data())
def test_one_changed_byte_is_refused_or_changes_what_is_said(
    packet: wire.Packet, data: st.DataObject
) -> None:
    frame = bytearray(packet.encode())
    position = data.draw(st.integers(0, len(frame) - 1))
    frame[position] ^= data.draw(st.integers(1, 255))

    try:
        decoded = wire.decode_packet(bytes(frame))
    except WireError:
        return
    assert decoded != packet


@pytest.mark.parametrize(
    ("field", "offset", "size"),
    [
        pytest.param("channel", 24, 2, id="channel-id"),
        pytest.param("block", 26, 2, id="block-id"),
        pytest.param("incarnation", 28, 4, id="incarnation"),
        pytest.param("sequence", 32, 8, id="sequence"),
        pytest.param("round", 40, 4, id="round"),
        pytest.param("kind", 6, 1, id="kind"),
        pytest.param("codec", 7, 1, id="codec"),
        pytest.param("version", 4, 2, id="version"),
        pytest.param("magic", 0, 4, id="magic"),
    ],
)
def test_zero_is_invalid_in_every_naming_field(field: str, offset: int, size: int) -> None:
    frame = bytearray(open_packet().encode())
    assert any(frame[offset : offset + size]), field

    frame[offset : offset + size] = bytes(size)

    with pytest.raises(WireError):
        wire.decode_packet(bytes(frame))


def test_a_packet_may_not_promise_more_than_a_batch() -> None:
    table = run_table([(0, wire.BATCH_PAGES_MAX + 1)])
    packet = wire.Packet(
        wire.PacketKind.PAGES, SESSION, 1, 1, 2, pages=wire.BATCH_PAGES_MAX + 1,
        payload_bytes=(wire.BATCH_PAGES_MAX + 1) * 4096, data_runs=table,
    )  # fmt: skip

    with pytest.raises(WireError, match=r"513 pages; at most 512"):
        wire.decode_packet(packet.encode())


def test_counts_that_differ_from_the_runs_are_named() -> None:
    packet = wire.Packet(
        wire.PacketKind.PAGES, SESSION, 1, 1, 2, pages=3, payload_bytes=3 * 4096,
        data_runs=run_table([(0, 2)]),
    )  # fmt: skip

    with pytest.raises(WireError, match="3 pages and 0 zero pages, but runs of 2 and 0"):
        wire.decode_packet(packet.encode())


def test_a_round_end_carries_no_runs() -> None:
    frame = wire.Packet(
        wire.PacketKind.ROUND_END, SESSION, 1, 1, 2, pages=1, payload_bytes=4096,
        data_runs=run_table([(0, 1)]),
    ).encode()  # fmt: skip

    with pytest.raises(WireError, match="ROUND_END packet with runs"):
        wire.decode_packet(frame)


def main_decoder() -> wire.Decoder[wire.ToDestination]:
    return wire.Decoder(wire.ToDestination, wire.MAIN_BYTES_MAX, "main channel")


def test_main_channel_messages_round_trip() -> None:
    hello = wire.Hello(1, SESSION, 4096, [wire.BlockShape("ram", 4096, 4096)], 2, "ram", True)

    assert main_decoder().decode(wire.encode(hello)) == hello


@given(st.binary(max_size=2000))
def test_random_bytes_on_the_main_channel_are_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        main_decoder().decode(data)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("version", "said"),
    [
        (wire.VERSION + 1, f"speaks version {wire.VERSION + 1}, this build {wire.VERSION}"),
        (1, f"speaks version 1, this build {wire.VERSION}"),
        (wire.VERSION, "unknown field `novelty`"),
    ],
)
def test_a_hello_that_another_version_has_more_to_say_in_is_refused_by_its_version(
    version: int, said: str, is_stream: bool
) -> None:
    hello = wire.Hello(version, SESSION, 4096, [], 2, "ram", True)
    fields = msgspec.msgpack.decode(wire.encode(hello)) | {"novelty": [1, {"a": b"b"}]}
    decoder: wire.Decoder[Any] = wire.Decoder(wire.Hello, wire.HELLO_BYTES_MAX, "main channel")
    if is_stream:
        decoder = wire.Decoder(wire.StreamHello, 2 * wire.HELLO_BYTES_MAX, "stream")
        begin = msgspec.msgpack.decode(wire.encode(wire.StreamHello(hello, answers=False)))
        fields = begin | {"hello": fields}

    with pytest.raises(WireError, match=said):
        decoder.decode(msgspec.msgpack.encode(fields))


def test_the_longest_hello_is_not_too_long_for_a_stranger() -> None:
    block = wire.BlockShape("x" * 255, 2**63, 2**63)
    hello = wire.Hello(
        2**63, SESSION, 2**63, [block] * wire.BLOCKS_MAX, 2**63, "a kind of a guest" * 20, False
    )

    assert wire.HELLO_BYTES_MAX - 1024 < len(wire.encode(hello)) <= wire.HELLO_BYTES_MAX


def test_deep_nesting_on_the_main_channel_is_a_wire_error() -> None:
    with pytest.raises(WireError):
        main_decoder().decode(b"\x91" * 500_000)


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(WireError):
        main_decoder().decode(wire.encode(wire.Armed()))


def test_unknown_members_are_refused() -> None:
    data = msgspec.msgpack.encode({"type": "Abort", "reason": "x", "more": 1})

    with pytest.raises(WireError, match="more"):
        main_decoder().decode(data)


def test_an_oversized_message_is_refused_by_its_length() -> None:
    with pytest.raises(WireError, match="allowed"):
        main_decoder().decode(bytes(wire.MAIN_BYTES_MAX + 1))


@pytest.mark.parametrize("size", [0, -4096, 4095, 2**44 + 4096])
def test_impossible_block_sizes_are_refused(size: int) -> None:
    with pytest.raises(WireError, match="RAM block 'ram'"):
        wire.BlockShape("ram", size, 4096).check()


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_block_names_have_qemus_limits(name: str) -> None:
    with pytest.raises(WireError):
        wire.BlockShape(name, 4096, 4096).check()


def test_the_header_layout_is_frozen() -> None:
    assert wire.HEADER.size == 82
    assert open_packet().encode() == (
        b"rfpk\x04\x00\x01\x01" + SESSION + struct.pack("<HHIQI", 1, 1, 1, 1, 1) + bytes(38)
    )
