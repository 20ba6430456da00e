"""What a source that knows the session may still not do, and what a stranger may not."""

from __future__ import annotations

import asyncio
import logging

import pytest

from engine import wire
from engine.worker import COMPLAINT_INTERVAL_NS, Complaints
from tests.multifd.rig import ReceiverRig, receiver
from tests.multifd.test_receiver import opened, packet, pages, round_end

pytestmark = pytest.mark.process

PAGE = b"x" * 4096


def table(*runs: tuple[int, int]) -> bytes:
    return b"".join(wire.RUN.pack(*run) for run in runs)


def zeros(sequence: int, *runs: tuple[int, int]) -> list[bytes]:
    count = sum(pages for _, pages in runs)
    head = packet(wire.PacketKind.PAGES, sequence, zero_pages=count, zero_runs=table(*runs))
    return [head.encode()]


def data(
    sequence: int, runs: list[tuple[int, int]], gathered: int, **fields: object
) -> list[bytes]:
    counts = [count for _, count in runs]
    head = packet(
        wire.PacketKind.PAGES, sequence, pages=sum(counts), payload_bytes=sum(counts) * 4096,
        gathered_runs=gathered, data_runs=table(*runs), **fields,
    )  # fmt: skip
    frames = [PAGE * sum(counts[:gathered])] if gathered else []
    return [head.encode(), *frames, *(PAGE * count for count in counts[gathered:])]


TWICE = "out of order or there twice"
BOTH = {"zero_pages": 1, "zero_runs": table((1, 1))}
OUTSIDE = {"zero_pages": 1, "zero_runs": table((64, 1))}


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        pytest.param([zeros(2, (0, 9), (8, 1))], TWICE, id="zero-runs-overlap"),
        pytest.param([zeros(2, *[(0, 64)] * 64)], TWICE, id="zero-runs-repeat"),
        pytest.param([zeros(2, (9, 1), (3, 1))], TWICE, id="zero-runs-descend"),
        pytest.param([data(2, [(0, 2), (1, 1)], 2)], TWICE, id="data-runs-overlap"),
        pytest.param([data(2, [(0, 2), (1, 1)], 1)], TWICE, id="gathered-and-direct-overlap"),
        pytest.param([data(2, [(0, 2)], 1, **BOTH)], TWICE, id="data-and-zero-overlap"),
        pytest.param([data(2, [(0, 2)], 1, **OUTSIDE)], "not within 64", id="last-run-outside"),
        pytest.param([data(2, [(5, 1), (64, 1)], 0)], "not within 64", id="last-direct-outside"),
        pytest.param(
            [zeros(2, (0, wire.ZERO_PAGES_MAX + 1))],
            "16385 zero pages; at most 16384",
            id="more-zero-pages-than-any-sender-sends",
        ),
        pytest.param(
            [[round_end(2, 0, round_number=2), b"x"]],
            "payload frames are not of the sizes",
            id="the-end-with-a-payload",
        ),
        pytest.param(
            [[packet(wire.PacketKind.OPEN, 1, incarnation=2).encode(), b"x"]],
            "payload frames are not of the sizes",
            id="open-with-a-payload",
        ),
        pytest.param(
            [[round_end(2, 0, round_number=2)], [round_end(3, 0, round_number=2)]],
            "round 2 after the end of 2",
            id="the-same-end-again",
        ),
        pytest.param(
            [[round_end(2, 0, round_number=2)], data(3, [(0, 1)], 1, round_number=2)],
            "round 2 after the end of 2",
            id="pages-of-a-round-that-ended",
        ),
        pytest.param(
            [zeros(2, (0, 1)), data(3, [(1, 1)], 1, round_number=2)],
            "round 2 in round 1",
            id="pages-of-another-round",
        ),
        pytest.param(
            [zeros(2, (0, 1)), [round_end(3, 0, 1, round_number=2)]],
            "round 2 in round 1",
            id="end-of-another-round",
        ),
    ],
)
def test_a_packet_against_the_rules_breaks_the_channel_and_writes_nothing(
    frames: list[list[bytes]], reason: str
) -> None:
    async def scenario() -> tuple[wire.ChannelBroken, bytes]:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            for message in frames:
                await socket.send_multipart(message)
            broken = await rig.heard.next(wire.ChannelBroken)
            return broken, rig.ram()

    broken, ram = asyncio.run(scenario())
    assert reason in broken.reason
    assert ram == bytes(len(ram))


def test_gathered_direct_and_zero_runs_may_lie_between_each_other() -> None:
    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            await socket.send_multipart(
                data(2, [(1, 1), (7, 2), (0, 1), (3, 2)], 2, zero_pages=2, zero_runs=table((5, 2)))
            )
            await socket.send(round_end(3, 6, 2))
            await rig.heard.next(wire.RoundReceived)
            return rig.ram()[: 9 * 4096]

    assert asyncio.run(scenario()) == PAGE * 2 + bytes(4096) + PAGE * 2 + bytes(8192) + PAGE * 2


@pytest.mark.parametrize(("again", "is_placed"), [(3, True), (4, True), (2, False)])
def test_a_new_incarnation_may_repeat_the_newest_round_but_none_before(
    again: int, is_placed: bool
) -> None:
    async def play(rig: ReceiverRig) -> None:
        async with rig.channel() as first, rig.channel() as second:
            await opened(rig, first)
            for sequence, number in ((2, 2), (3, 3)):
                await first.send(round_end(sequence, 0, round_number=number))
            await rig.heard.next(wire.RoundReceived, 2)
            await opened(rig, second, incarnation=2)
            fields = {"incarnation": 2, "round_number": again}
            await second.send_multipart(pages(2, 0, PAGE, **fields))
            await second.send(round_end(3, 1, **fields))
            await rig.heard.until(
                lambda: (
                    len(rig.heard.of(wire.RoundReceived)) == 3 or rig.heard.of(wire.ChannelBroken)
                )
            )

    async def scenario() -> tuple[bool, bool]:
        async with receiver() as rig:
            await play(rig)
            return rig.ram()[:4096] == PAGE, not rig.heard.of(wire.ChannelBroken)

    assert asyncio.run(scenario()) == (is_placed, is_placed)


def test_a_stranger_cannot_fill_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with receiver() as rig, rig.channel() as stranger:
            for _ in range(500):
                await stranger.send(b"junk")
            await opened(rig, stranger)  # on the same connection, so all the junk came before

    asyncio.run(scenario())

    lines = capfd.readouterr().err.count("dropped a stranger's message")
    assert 1 <= lines < 10


def test_complaints_are_counted_while_they_are_not_said(caplog: pytest.LogCaptureFixture) -> None:
    now_ns = 0
    complaints = Complaints(lambda: now_ns)
    with caplog.at_level(logging.WARNING, "ramferry.worker"):
        for _ in range(3):
            complaints.say("junk")
        now_ns += COMPLAINT_INTERVAL_NS
        complaints.say("more junk")
        now_ns += COMPLAINT_INTERVAL_NS
        complaints.say("junk")

    assert [record.getMessage() for record in caplog.records] == [
        "junk", "more junk (2 more before)", "junk",
    ]  # fmt: skip
