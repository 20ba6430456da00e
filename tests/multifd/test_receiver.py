"""A live receiver: right packets land, wrong ones cost the channel and never touch RAM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import wire
from tests.multifd.rig import SESSION, ReceiverRig, first_report, receiver

pytestmark = pytest.mark.process


def packet(kind: wire.PacketKind, sequence: int, **fields: Any) -> wire.Packet:
    merged: dict[str, Any] = {"session": SESSION, "channel_id": 1, "incarnation": 1} | fields
    return wire.Packet(kind, sequence=sequence, **merged)


def opening(incarnation: int = 1, **fields: Any) -> bytes:
    return packet(wire.PacketKind.OPEN, 1, incarnation=incarnation, **fields).encode()


def pages(sequence: int, first: int, content: bytes, **fields: Any) -> list[bytes]:
    count = len(content) // 4096
    head = packet(
        wire.PacketKind.PAGES,
        sequence,
        **{
            "pages": count,
            "payload_bytes": len(content),
            "gathered_runs": 1,
            "data_runs": wire.RUN.pack(first, count),
        }
        | fields,
    )
    return [head.encode(), content]


def round_end(sequence: int, count: int, zero: int = 0, **fields: Any) -> bytes:
    return packet(
        wire.PacketKind.ROUND_END, sequence, pages=count, zero_pages=zero,
        payload_bytes=count * 4096, **fields,
    ).encode()  # fmt: skip


async def opened(rig: ReceiverRig, socket: zmq.asyncio.Socket, incarnation: int = 1) -> None:
    count = len(rig.heard.of(wire.Opened)) + 1
    await socket.send(opening(incarnation))
    await rig.heard.next(wire.Opened, count)


def test_what_is_acknowledged_is_where_the_runs_say() -> None:
    content = os.urandom(3 * 4096)

    async def scenario() -> tuple[bytes, wire.RoundReceived]:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            await socket.send_multipart(pages(2, 5, content))
            await socket.send(round_end(3, 3))
            report = await rig.heard.next(wire.RoundReceived)
            return rig.ram(), report

    ram, report = asyncio.run(scenario())
    assert report == wire.RoundReceived(0, 1, 1, 1, 3, 0, 3 * 4096)
    assert ram == bytes(5 * 4096) + content + bytes(56 * 4096)


def test_a_later_round_overwrites_and_zero_pages_clear() -> None:
    old, new = os.urandom(4 * 4096), os.urandom(4096)

    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            await socket.send_multipart(pages(2, 0, old))
            await socket.send(round_end(3, 4))
            zero_runs = wire.RUN.pack(1, 1) + wire.RUN.pack(9, 3)
            await socket.send_multipart(
                pages(4, 3, new, round_number=2, zero_pages=4, zero_runs=zero_runs)
            )
            await socket.send(round_end(5, 1, 4, round_number=2))
            await rig.heard.next(wire.RoundReceived, 2)
            return rig.ram()[: 4 * 4096]

    expected = old[:4096] + bytes(4096) + old[2 * 4096 : 3 * 4096] + new
    assert asyncio.run(scenario()) == expected


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        pytest.param(pages(3, 0, b"x" * 4096), "packets were lost", id="gap-in-sequence"),
        pytest.param(pages(2, 64, b"x" * 4096), "block 'ram'", id="page-behind-the-block"),
        pytest.param(pages(2, 63, b"x" * 8192), "block 'ram'", id="run-over-the-end"),
        pytest.param(pages(2, 2**32 - 1, b"x" * 4096), "block 'ram'", id="largest-page-index"),
        pytest.param(pages(2, 0, b"x" * 4096, block_id=2), "RAM block 2 of 1", id="no-such-block"),
        pytest.param([pages(2, 0, b"x" * 4096)[0]], "payload frames", id="payload-missing"),
        pytest.param(
            [pages(2, 0, b"x" * 4096)[0], b"x" * 4095], "payload frames", id="payload-cut"
        ),
        pytest.param(
            [*pages(2, 0, b"x" * 4096), b"more"], "payload frames", id="payload-with-a-tail"
        ),
        pytest.param([round_end(2, 1)], "1 pages and 0 zero pages were sent", id="wrong-totals"),
        pytest.param([b"garbage"], "packet header of 7 bytes", id="not-a-packet"),
        pytest.param([opening(1)], "OPEN of incarnation 1", id="opened-twice"),
        pytest.param(pages(2, 0, b"x" * 4096, session=bytes(16)), "another session", id="session"),
        pytest.param(pages(2, 0, b"x" * 4096, channel_id=2), "channel id 2", id="channel"),
        pytest.param([b"h", *[b"x"] * 600], "too many frames", id="too-many-frames"),
    ],
)
def test_a_wrong_packet_breaks_the_channel_and_writes_nothing(
    frames: list[bytes], reason: str
) -> None:
    async def scenario() -> tuple[wire.ChannelBroken, bytes]:
        async with receiver() as rig, rig.channel() as socket:
            await opened(rig, socket)
            await socket.send_multipart(frames)
            broken = await rig.heard.next(wire.ChannelBroken)
            return broken, rig.ram()

    broken, ram = asyncio.run(scenario())
    assert reason in broken.reason
    assert broken.incarnation == 1
    assert ram == bytes(len(ram))


def test_after_a_wrong_packet_nothing_of_the_incarnation_is_used_and_the_next_one_works() -> None:
    async def scenario() -> tuple[bytes, int]:
        async with receiver() as rig, rig.channel() as first, rig.channel() as second:
            await opened(rig, first)
            await first.send(b"garbage")
            await rig.heard.next(wire.ChannelBroken)
            await first.send_multipart(pages(2, 0, b"a" * 4096))
            await first.send(round_end(3, 1))
            await opened(rig, second, incarnation=2)
            await first.send_multipart(pages(2, 1, b"b" * 4096))
            await second.send_multipart(pages(2, 2, b"c" * 4096, incarnation=2))
            await second.send(round_end(3, 1, incarnation=2))
            report = await rig.heard.next(wire.RoundReceived)
            return rig.ram()[: 3 * 4096], report.incarnation

    ram, incarnation = asyncio.run(scenario())
    assert ram == bytes(8192) + b"c" * 4096
    assert incarnation == 2


def test_a_stranger_is_dropped_and_the_peer_goes_on() -> None:
    content = os.urandom(4096)

    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as peer, rig.channel() as stranger:
            await opened(rig, peer)
            await stranger.send(b"garbage")
            await stranger.send(opening(incarnation=9, session=b"another-session!"))
            await stranger.send_multipart(pages(2, 0, b"x" * 4096))
            await stranger.send_multipart([b"h", *[b"x"] * 600])
            await peer.send_multipart(pages(2, 1, content))
            await peer.send(round_end(3, 1))
            await rig.heard.next(wire.RoundReceived)
            assert not rig.heard.of(wire.ChannelBroken)
            return rig.ram()[:8192]

    assert asyncio.run(scenario()) == bytes(4096) + content


def test_a_frame_over_the_limit_costs_the_connection_only() -> None:
    content = os.urandom(4096)

    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as peer, rig.channel() as stranger:
            await opened(rig, peer)
            await stranger.send(bytes(wire.PAYLOAD_BYTES_MAX + 1))
            await peer.send_multipart(pages(2, 1, content))
            await peer.send(round_end(3, 1))
            await rig.heard.next(wire.RoundReceived)
            return rig.ram()[4096:8192]

    assert asyncio.run(scenario()) == content


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=4), max_size=20))
def test_random_messages_never_touch_ram_nor_stop_the_receiver(
    messages: list[list[bytes]],
) -> None:
    content = os.urandom(4096)

    async def scenario() -> bytes:
        async with receiver() as rig, rig.channel() as stranger, rig.channel() as peer:
            for frames in messages:
                await stranger.send_multipart(frames)
            await opened(rig, peer)
            await peer.send_multipart(pages(2, 7, content))
            await peer.send(round_end(3, 1))
            await rig.heard.next(wire.RoundReceived)
            return rig.ram()

    assert asyncio.run(scenario()) == bytes(7 * 4096) + content + bytes(56 * 4096)


def test_the_death_of_a_receiver_is_heard() -> None:
    async def scenario() -> list[str]:
        async with receiver() as rig:
            os.kill(rig.worker.pid, signal.SIGKILL)
            await rig.heard.until(lambda: rig.heard.lost)
            return rig.heard.lost

    assert asyncio.run(scenario()) == ["receiver -1 is lost: the process died"]


def test_a_file_where_a_receiver_should_listen_survives_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "channel"
    path.write_text("precious")

    report = asyncio.run(first_report(f"ipc://{path}"))

    assert report == wire.WorkerFailed(
        f"cannot listen on ipc://{path}: '{path}' exists and is not a socket; choose another path"
    )
    assert path.read_text() == "precious"


def test_the_socket_of_a_live_receiver_is_not_stolen(tmp_path: Path) -> None:
    path = tmp_path / "channel"
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        before = path.stat()

        report = asyncio.run(first_report(f"ipc://{path}"))

        assert isinstance(report, wire.WorkerFailed)
        assert "another process listens" in report.reason
        assert path.stat().st_ino == before.st_ino
        path.unlink()


def test_the_socket_that_a_killed_receiver_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "channel"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    report = asyncio.run(first_report(f"ipc://{path}"))

    assert isinstance(report, wire.Ready)
    assert report.endpoint == f"ipc://{path}"
    path.unlink()  # a receiver that has lost its control leaves it to `remove_files`
