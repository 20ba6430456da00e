"""What a packet carries, whatever the pages and runs are: exactly the pages, in the right group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import _native, wire
from engine.compress.codecs import CODECS, Codec, Zlib
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.payload import (
    DIRECT_RUN_PAGES_MIN,
    SAMPLE_SPANS,
    SPAN_PAGES,
    Payload,
    _some_pages,
    copied_payload,
    encoded_payload,
    lent_payload,
    sample_of,
)
from tests.multifd.encoded import noise, numbers, page_numbers, pages_of, runs_of, table, text
from tests.multifd.rig import SESSION

Run = tuple[int, int]
#: Stretches of text, numbers and noise, with pages between them that are not sent; a batch at most.
stretches = st.lists(
    st.tuples(st.sampled_from(["text", "numbers", "noise", "gap"]), st.integers(1, 90)),
    min_size=1,
    max_size=5,
).filter(lambda drawn: any(kind != "gap" for kind, _ in drawn))
FILL = {"noise": noise, "numbers": numbers}
any_codec = pytest.mark.parametrize("name", CODECS)


def ram_of(drawn: Sequence[tuple[str, int]]) -> tuple[bytes, list[Run], set[int]]:
    """Memory, the runs that are sent of it, and the pages that shrink."""
    ram, runs, good = b"", [], set()
    for kind, count in drawn:
        first = len(ram) // PAGE_SIZE
        ram += FILL.get(kind, text)(count, first)
        if kind == "gap":
            continue
        runs.append((first, count))
        good |= set(range(first, first + count)) if kind != "noise" else set()
    return ram, merged(runs), good


def merged(runs: Sequence[Run]) -> list[Run]:
    """As `take_batch` gives them: neighbours are one run."""
    joined: list[Run] = []
    for first, count in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def packet_of(payload: Payload, pages: int, page_count: int) -> wire.Packet:
    """As it goes over the wire: checked as a receiver checks it."""
    header = wire.Packet(
        wire.PacketKind.PAGES, SESSION, 1, 1, 2, codec=payload.codec, pages=pages,
        payload_bytes=payload.payload_bytes, plane_runs=payload.plane_runs,
        encoded_runs=payload.encoded_runs, gathered_runs=payload.gathered_runs,
        plain_bytes=payload.plain_bytes, data_runs=payload.data_runs,
    ).encode()  # fmt: skip
    packet = wire.decode_packet(header)
    _native.packet_runs_check(
        packet.data_runs,
        packet.plane_runs,
        packet.encoded_runs,
        packet.gathered_runs,
        b"",
        page_count,
        1,
    )
    assert [len(frame) for frame in payload.frames] == packet.frame_sizes()
    return packet


def sent(payload: Payload, runs: Sequence[Run], ram: bytes) -> tuple[wire.Packet, dict[int, bytes]]:
    packet = packet_of(payload, len(page_numbers(runs)), len(ram) // PAGE_SIZE)
    return packet, pages_of(packet, b"".join(payload.frames))


def expected(runs: Sequence[Run], ram: bytes) -> dict[int, bytes]:
    return {
        page: ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] for page in sorted(page_numbers(runs))
    }


@any_codec
@given(drawn=stretches)
def test_lent_pages_arrive_and_each_is_in_its_group(
    name: str, drawn: list[tuple[str, int]]
) -> None:
    ram, runs, good = ram_of(drawn)

    payload = encoded_payload(memoryview(ram), memoryview(table(runs)), len(runs), CODECS[name]())

    packet, pages = sent(payload, runs, ram)
    assert pages == expected(runs, ram)
    encoded = runs_of(packet)[: packet.encoded_runs]
    direct = runs_of(packet)[packet.encoded_runs + packet.gathered_runs :]
    assert page_numbers(encoded) == good
    assert all(count >= DIRECT_RUN_PAGES_MIN for _, count in direct)
    assert (payload.codec is wire.CodecId.RAW) is not bool(good)
    assert payload.copied_pages == len(pages) - len(page_numbers(direct))


@any_codec
@given(drawn=stretches)
def test_private_copies_arrive_and_each_is_in_its_group(
    name: str, drawn: list[tuple[str, int]]
) -> None:
    """From the copy alone: memory may hold something else by now."""
    ram, runs, good = ram_of(drawn)
    copy = b"".join(expected(runs, ram).values())

    payload = copied_payload(copy, memoryview(table(runs)), len(runs), CODECS[name]())

    packet, pages = sent(payload, runs, ram)
    assert pages == expected(runs, ram)
    assert page_numbers(runs_of(packet)[: packet.encoded_runs]) == good
    assert packet.encoded_runs + packet.gathered_runs == len(runs_of(packet))
    assert payload.copied_pages == payload.pages == len(pages)


@given(drawn=stretches)
def test_a_private_copy_that_was_encoded_in_vain_goes_as_it_is(
    drawn: list[tuple[str, int]],
) -> None:
    ram, runs, good = ram_of(drawn)
    copy = b"".join(expected(runs, ram).values())

    payload = copied_payload(copy, memoryview(table(runs)), len(runs), Zlib(0))

    packet, pages = sent(payload, runs, ram)
    assert pages == expected(runs, ram)
    assert (payload.codec, packet.encoded_runs, packet.plain_bytes) == (wire.CodecId.RAW, 0, 0)
    assert len(payload.tried) == payload.encoded_bytes == len(good) * PAGE_SIZE


@given(drawn=stretches)
def test_what_was_encoded_in_vain_goes_as_it_is(drawn: list[tuple[str, int]]) -> None:
    """zlib's level 0 stores, which is never shorter."""
    ram, runs, good = ram_of(drawn)

    payload = encoded_payload(memoryview(ram), memoryview(table(runs)), len(runs), Zlib(0))

    packet, pages = sent(payload, runs, ram)
    assert pages == expected(runs, ram)
    assert (payload.codec, packet.encoded_runs, packet.plain_bytes) == (wire.CodecId.RAW, 0, 0)
    assert len(payload.tried) == payload.encoded_bytes == len(good) * PAGE_SIZE
    assert payload.frames == lent_payload(
        memoryview(ram), memoryview(table(runs)), len(runs)
    ).frames  # fmt: skip


@any_codec
@pytest.mark.parametrize("pages", [1, wire.BATCH_PAGES_MAX])
@pytest.mark.parametrize("content", [text, numbers, noise])
def test_the_smallest_and_the_largest_batch(name: str, pages: int, content: object) -> None:
    assert callable(content)
    ram, runs = content(pages), [(0, pages)]
    codec: Codec = CODECS[name]()

    payload = encoded_payload(memoryview(ram), memoryview(table(runs)), 1, codec)

    assert sent(payload, runs, ram)[1] == expected(runs, ram)
    assert bool(payload.encoded_runs) is (content is not noise)
    assert payload.plane_runs == (content is numbers)


@given(drawn=stretches)
def test_a_sample_is_of_pages_from_all_over_the_batch(drawn: list[tuple[str, int]]) -> None:
    ram, runs, good = ram_of(drawn)
    payload = lent_payload(memoryview(ram), memoryview(table(runs)), len(runs))
    content = expected(runs, ram)

    sample = _some_pages(payload)

    places = {page: number for number, page in content.items()}
    pages = [places[sample[at : at + PAGE_SIZE]] for at in range(0, len(sample), PAGE_SIZE)]
    order = [page for run in runs_of_payload(payload) for page in range(run[0], sum(run))]
    at = [order.index(page) for page in pages]
    assert at == sorted(set(at))
    assert len(at) <= (SAMPLE_SPANS + 1) * SPAN_PAGES
    step = max(SPAN_PAGES, len(order) // SAMPLE_SPANS)
    assert set(range(0, len(order), step)) <= set(at)
    tried, part = sample_of(payload)
    assert len(tried) == PAGE_SIZE * sum(page in good for page in pages)
    assert part == pytest.approx(len(at) / len(order))


def runs_of_payload(payload: Payload) -> list[Run]:
    words = memoryview(payload.data_runs).cast("I").tolist()
    return list(zip(words[0::2], words[1::2], strict=True))
