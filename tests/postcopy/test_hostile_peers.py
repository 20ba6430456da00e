"""A peer that asks or answers what it may not: it costs the connection, not the guest nor RAM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from engine import wire
from engine.postcopy.statistics import FaultCount, PageCount
from engine.wire import FaultKind
from tests.postcopy.rig import Heard, Rig, rig
from tests.postcopy.support import PAGE, all_dirty, destination, frame, needs_uffd, run, source
from tests.postcopy.toucher import Touches

pytestmark = [pytest.mark.process, needs_uffd]

PAGES = 64
HEAD = wire.FAULT_FRAME.size
DEADLINE_S = 200.0


def read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("hung up")
        data += part
    return data


def read_frame(connection: socket.socket) -> tuple[wire.FaultFrame, bytes]:
    head = wire.decode_fault_frame(read_exactly(connection, HEAD))
    return head, read_exactly(connection, head.payload_bytes)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side gives it up before the deadline."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


# -- a bad destination ---------------------------------------------------------------------------


@asynccontextmanager
async def asked(made: Rig) -> AsyncIterator[tuple[socket.socket, Any, Heard]]:
    """A page service that takes us for its fault service."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made.endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        worker, heard = await made.start_pages()
        connection, _ = await asyncio.to_thread(listener.accept)
        with connection:
            connection.settimeout(DEADLINE_S)
            opening, _ = await asyncio.to_thread(read_frame, connection)
            assert (opening.kind, opening.sequence) == (FaultKind.OPEN, 1)
            connection.sendall(frame(FaultKind.OPENED, 1, made.incarnation))
            await heard.next(wire.FaultChannelOpened)
            yield connection, worker, heard


def changed(good: bytes, at: int, value: bytes) -> bytes:
    return good[:at] + value + good[at + len(value) :]


GOOD = frame(FaultKind.DEMAND, 2, 1)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        pytest.param(frame(FaultKind.DEMAND, 2, 1, first_page=PAGES), "pages 64 and 1", id="end"),
        pytest.param(
            frame(FaultKind.REST, 2, 1, first_page=60, pages=5), "pages 60 and 5", id="over-the-end"
        ),
        pytest.param(
            frame(FaultKind.PREFETCH, 2, 1, first_page=2**32 - 1, pages=512), "429", id="wraps"
        ),
        pytest.param(frame(FaultKind.DEMAND, 2, 1, block_id=2), "RAM block 2 of 1", id="block"),
        pytest.param(frame(FaultKind.DEMAND, 2, 1, block_id=65535), "of 1", id="largest-block"),
        pytest.param(frame(FaultKind.DEMAND, 2, 1, block_id=0), "RAM block 0", id="no-block"),
        pytest.param(frame(FaultKind.DEMAND, 2, 0), "request 0 after 0", id="request-0"),
        pytest.param(frame(FaultKind.DEMAND, 3, 1), "lost or replayed", id="gap"),
        pytest.param(frame(FaultKind.DEMAND, 1, 1), "lost or replayed", id="replayed-sequence"),
        pytest.param(GOOD + GOOD, "frame 2 after 2", id="replayed-frame"),
        pytest.param(GOOD + frame(FaultKind.DEMAND, 3, 1), "request 1 after 1", id="replayed-id"),
        pytest.param(frame(FaultKind.DEMAND, 2, 1, session=bytes(16)), "session", id="session"),
        pytest.param(frame(FaultKind.ZERO, 2, 1), "kind 7 from a peer", id="an-answer"),
        pytest.param(
            frame(FaultKind.DATA, 2, 1, pages=512), "kind 6 from", id="an-answer-of-2-MiB"
        ),
        pytest.param(frame(FaultKind.OPEN, 2, 1), "kind 1", id="opened-again"),
        pytest.param(frame(FaultKind.DEMAND, 2, 1, pages=0), "0 pages", id="no-pages"),
        pytest.param(frame(FaultKind.DEMAND, 2, 1, pages=513), "513 pages", id="too-many-pages"),
        pytest.param(changed(GOOD, 48, struct.pack("<I", 9)), "with 9 bytes", id="payload"),
        pytest.param(changed(GOOD, 0, b"x"), "magic", id="magic"),
        pytest.param(changed(GOOD, 4, b"\2"), "version 2", id="version"),
        pytest.param(changed(GOOD, 6, b"\0"), "kind 0", id="kind-0"),
        pytest.param(changed(GOOD, 7, b"\2"), "codec 2", id="codec"),
        pytest.param(changed(GOOD, 54, b"\1"), "version 1 with codec 1", id="reserved"),
    ],
)
def test_a_bad_request_costs_the_connection_and_the_next_one_works(
    request_: bytes, reason: str
) -> None:
    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                async with asked(made) as (connection, pages, heard):
                    connection.sendall(request_)
                    broken = await heard.next(wire.FaultChannelBroken)
                    assert reason in broken.reason
                    assert await asyncio.to_thread(is_closed, connection)
                    assert heard.lost == []
                await made.start_faults()
                made.reconnect(pages)
                await heard.next(wire.FaultChannelOpened, 2)
                assert (await made.toucher.ask(Touches()))["wrong"] == []

    run(scenario())


def test_a_request_that_cuts_a_huge_page_is_refused() -> None:
    async def scenario() -> None:
        with source(1024) as fd:
            async with rig(fd) as made:
                made.block = replace(made.block, backing_page_size=2 * 1024 * 1024)
                async with asked(made) as (connection, _, heard):
                    connection.sendall(frame(FaultKind.DEMAND, 2, 1, first_page=512, pages=512))
                    answer, payload = await asyncio.to_thread(read_frame, connection)
                    assert (answer.first_page, answer.pages) == (512, 512)
                    assert payload == os.pread(fd, 512 * PAGE, 512 * PAGE)
                    connection.sendall(frame(FaultKind.DEMAND, 3, 2, first_page=1, pages=511))
                    broken = await heard.next(wire.FaultChannelBroken)
                    assert "not whole pages of 512" in broken.reason

    run(scenario())


def test_demands_are_answered_before_what_was_asked_for_in_advance() -> None:
    async def scenario() -> None:
        with source(2048, zero_every=100) as fd:
            async with rig(fd) as made:
                all_dirty(made)
                async with asked(made) as (connection, _, _heard):
                    asks = [
                        frame(FaultKind.PREFETCH, 2 + i, 1 + i, first_page=512 * i, pages=512)
                        for i in range(4)
                    ]
                    asks.append(frame(FaultKind.DEMAND, 6, 5, first_page=2000))
                    connection.sendall(b"".join(asks))
                    seen: list[wire.FaultFrame] = []
                    while sum(answer.pages for answer in seen) < 2049:
                        answer, payload = await asyncio.to_thread(read_frame, connection)
                        if answer.kind is FaultKind.DATA:
                            assert payload == os.pread(fd, len(payload), answer.first_page * PAGE)
                        seen.append(answer)
                    assert [a.sequence for a in seen] == list(range(2, 2 + len(seen)))
                    demanded = next(i for i, a in enumerate(seen) if a.request == 5)
                    assert sum(a.pages for a in seen[:demanded]) <= 64  # not 2048
                    skipped = [a for a in seen if a.kind is FaultKind.SKIPPED]
                    assert [(a.first_page, a.pages) for a in skipped] == [(2000, 1)]

    run(scenario())


def test_prefetches_of_what_others_sent_are_skipped_and_the_rest_never_is() -> None:
    """Nothing is dirty: others have sent it all."""

    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made, asked(made) as (connection, _, _heard):
                connection.sendall(frame(FaultKind.PREFETCH, 2, 1, pages=16))
                answer, _ = await asyncio.to_thread(read_frame, connection)
                assert (answer.kind, answer.pages) == (FaultKind.SKIPPED, 16)
                connection.sendall(frame(FaultKind.REST, 3, 2, pages=16))
                answer, payload = await asyncio.to_thread(read_frame, connection)
                assert (answer.kind, payload) == (FaultKind.DATA, os.pread(fd, 16 * PAGE, 0))

    run(scenario())


def test_a_flood_of_bad_requests_costs_one_connection_each_and_little_memory() -> None:
    """10**5 requests: the first that is bad ends its connection, the others are never looked at."""

    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                async with asked(made) as (connection, pages, heard):
                    before = resident_bytes(pages.pid)
                    bad = frame(FaultKind.DEMAND, 2, 1, first_page=10**6)
                    with contextlib.suppress(OSError):
                        await asyncio.to_thread(connection.sendall, bad * 100_000)
                    await heard.next(wire.FaultChannelBroken)
                    assert resident_bytes(pages.pid) - before < 8 * 1024 * 1024
                assert made.page_statistics[PageCount.REQUESTS] == 0
                assert heard.lost == []

    run(scenario())


def test_a_peer_that_asks_without_end_and_reads_nothing_is_bounded() -> None:
    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                all_dirty(made)
                async with asked(made) as (connection, pages, heard):
                    before = resident_bytes(pages.pid)
                    flood = b"".join(frame(FaultKind.DEMAND, 2 + i, 1 + i) for i in range(100_000))
                    with contextlib.suppress(OSError):
                        await asyncio.to_thread(connection.sendall, flood)
                    broken = await heard.next(wire.FaultChannelBroken)
                    assert "more than 1024 requests at once" in broken.reason
                    assert resident_bytes(pages.pid) - before < 8 * 1024 * 1024
                    assert made.page_statistics[PageCount.REQUESTS] < 20_000

    run(scenario())


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


# -- a bad source --------------------------------------------------------------------------------


def knock(made: Rig, incarnation: int, **fields: Any) -> socket.socket:
    """A connection to the fault service that has said OPEN."""
    host, port = made.endpoint.removeprefix("tcp://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), DEADLINE_S)
    connection.sendall(frame(FaultKind.OPEN, 1, incarnation, **fields))
    return connection


def one_page(**fields: Any) -> bytes:
    return frame(FaultKind.DATA, 2, 1, **fields) + b"x" * PAGE


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(one_page(first_page=8), "not what was asked for", id="another-page"),
        pytest.param(one_page(block_id=2), "not what was asked for", id="another-block"),
        pytest.param(
            frame(FaultKind.DATA, 2, 1, first_page=7, pages=2) + b"x" * 8192,
            "not what was asked for", id="more-than-asked",
        ),
        pytest.param(
            frame(FaultKind.DATA, 2, 2, first_page=7) + b"x" * PAGE, "not open", id="no-request"
        ),
        pytest.param(frame(FaultKind.SKIPPED, 2, 1, first_page=7), "cannot be skipped", id="skip"),
        pytest.param(frame(FaultKind.DEMAND, 2, 1, first_page=7), "kind 3 from", id="a-request"),
        pytest.param(one_page(first_page=7, session=bytes(16)), "session", id="session"),
        pytest.param(
            frame(FaultKind.DATA, 3, 1, first_page=7) + b"x" * PAGE, "lost or replayed", id="gap"
        ),
        pytest.param(
            changed(one_page(first_page=7), 48, struct.pack("<I", 2**32 - 1)), "4294967295 bytes",
            id="length",
        ),
        pytest.param(b"y" * 5000, "magic", id="garbage"),
    ],
)  # fmt: skip
def test_a_bad_answer_is_not_placed_and_the_guest_waits_for_the_right_one(
    answer: bytes, reason: str
) -> None:
    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                _, faults = await made.start_faults()
                made.incarnation += 1
                with await asyncio.to_thread(knock, made, made.incarnation) as connection:
                    opened, _ = await asyncio.to_thread(read_frame, connection)
                    assert opened.kind is FaultKind.OPENED
                    touching = asyncio.create_task(made.toucher.ask(Touches(first=7, count=1)))
                    demand, _ = await asyncio.to_thread(read_frame, connection)
                    assert (demand.kind, demand.first_page) == (FaultKind.DEMAND, 7)
                    connection.sendall(answer)
                    broken = await faults.next(wire.FaultChannelBroken)
                    assert reason in broken.reason
                    assert await asyncio.to_thread(is_closed, connection)
                assert made.block.allocated_bytes() == 0
                assert made.received.count() == 0
                await made.start_pages()
                assert (await touching)["wrong"] == []
                await made.settled()
                assert made.fault_statistics[FaultCount.WAITS] == 1

    run(scenario())


def test_an_answer_that_comes_twice_breaks_the_channel_and_changes_nothing() -> None:
    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                _, faults = await made.start_faults()
                made.incarnation += 1
                with await asyncio.to_thread(knock, made, made.incarnation) as connection:
                    await asyncio.to_thread(read_frame, connection)
                    touching = asyncio.create_task(
                        made.toucher.ask(Touches(first=7, count=1, writes=True))
                    )
                    await asyncio.to_thread(read_frame, connection)
                    right = os.pread(fd, PAGE, 7 * PAGE)
                    connection.sendall(frame(FaultKind.DATA, 2, 1, first_page=7) + right)
                    assert (await touching)["wrong"] == []
                    written = destination(made)
                    connection.sendall(frame(FaultKind.DATA, 3, 1, first_page=7) + right)
                    broken = await faults.next(wire.FaultChannelBroken)
                    assert "not open" in broken.reason
                assert destination(made) == written

    run(scenario())


def test_strangers_are_dropped_and_the_page_service_gets_in() -> None:
    async def scenario() -> None:
        with source(PAGES) as fd, contextlib.ExitStack() as stack:
            async with rig(fd) as made:
                _, faults = await made.start_faults()
                made.incarnation = 7
                wrong = [
                    stack.enter_context(knock(made, 9, session=bytes(16))),
                    stack.enter_context(knock(made, 0)),
                ]
                host, port = made.endpoint.removeprefix("tcp://").rsplit(":", 1)
                silent = [
                    stack.enter_context(socket.create_connection((host, int(port)), DEADLINE_S))
                    for _ in range(40)
                ]
                for connection in wrong + silent[:24]:  # 16 may wait
                    assert await asyncio.to_thread(is_closed, connection)
                _, pages = await made.start_pages()
                await pages.next(wire.FaultChannelOpened)
                with await asyncio.to_thread(knock, made, 3) as older:
                    assert await asyncio.to_thread(is_closed, older)
                assert (await made.toucher.ask(Touches()))["wrong"] == []
                assert faults.of(wire.FaultChannelBroken) == []

    run(scenario())


def test_a_slow_stranger_is_dropped_in_time() -> None:
    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                await made.start_faults()
                host, port = made.endpoint.removeprefix("tcp://").rsplit(":", 1)
                with socket.create_connection((host, int(port)), DEADLINE_S) as stranger:
                    stranger.sendall(b"rfpf")
                    began = time.monotonic()
                    assert await asyncio.to_thread(is_closed, stranger)
                    assert time.monotonic() - began > 9  # and before its own patience ends

    run(scenario())
