"""The handover over real sockets, with a peer that answers, breaks, lies, or is not there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ChannelError, GuestError, UsageError, WireError
from engine.guest.base import Handover
from engine.guest.handover import (
    CONNECTIONS_MAX,
    DestinationEnd,
    NobodyListens,
    SourceEnd,
    _is_this_host,
    parse_endpoint,
)
from engine.guest.token import MESSAGE, Kind, decode, encode
from tests.guest.support import SESSION, run

SECOND_NS = 1_000_000_000


@contextlib.asynccontextmanager
async def destination(uri: str = "tcp:127.0.0.1:0") -> AsyncIterator[tuple[DestinationEnd, str]]:
    taken: list[bool] = []
    end = DestinationEnd(lambda: taken.append(True))
    endpoint = await end.listen(uri)
    try:
        yield end, endpoint
    finally:
        await end.end()
        assert taken == ([True] if end.token.taken else [])


async def soon(fact: Callable[[], bool]) -> None:
    """Until it is so; `run` bounds it."""
    while not fact():
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def source(endpoint: str) -> AsyncIterator[SourceEnd]:
    end = SourceEnd(SESSION)
    await end.connect(endpoint)
    try:
        yield end
    finally:
        end.close()


@contextlib.asynccontextmanager
async def proxy(endpoint: str, cut_after: Callable[[int, Kind, bool], bool]) -> AsyncIterator[str]:
    """Forward messages; `cut_after(connection, kind, is_answer)` ends a connection instead."""
    target = parse_endpoint(endpoint)
    connections: list[asyncio.StreamWriter] = []
    handlers: set[asyncio.Task[None]] = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        number = len(connections)
        there_writer = writer  # until there is one
        try:
            there_reader, there_writer = await asyncio.open_connection(target.host, target.port)
            while True:
                message = await reader.readexactly(MESSAGE.size)
                if cut_after(number, decode(message)[0], False):
                    return
                there_writer.write(message)
                if decode(message)[0] is Kind.CONFIRM:
                    continue
                answer = await there_reader.readexactly(MESSAGE.size)
                if cut_after(number, decode(answer)[0], True):
                    return
                writer.write(answer)
        except (EOFError, OSError):
            pass
        finally:
            writer.close()
            there_writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(forward(reader, writer))
        handlers.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await server.wait_closed()


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "tcp:localhost:0", "unix:{}/handover.sock"])
def test_an_armed_destination_takes_the_token_once(uri: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with destination(uri.format(tmp_path)) as (there, endpoint):
            async with source(endpoint) as here:
                there.arm(SESSION)

                assert await here.hand_over(10 * SECOND_NS) is Handover.TAKEN

            assert there.token.taken == SESSION
            assert there.disarm() is False
            with pytest.raises(GuestError, match="taken over already"):
                there.arm(SESSION)

    run(scenario())


@pytest.mark.parametrize("state", ["never armed", "disarmed", "armed for another", "closed"])
def test_a_destination_that_is_not_armed_refuses_and_the_source_may_run(state: str) -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint), source(endpoint) as here:
            if state == "armed for another":
                there.arm(b"x" * 16)
            elif state != "never armed":
                there.arm(SESSION)
            if state == "disarmed":
                assert there.disarm() is True
            if state == "closed":
                await there.close()

            assert await here.hand_over(10 * SECOND_NS) is Handover.REFUSED

            assert there.token.taken is None
            if state in ("never armed", "disarmed"):
                with pytest.raises(GuestError, match="void"):
                    there.arm(SESSION)

    run(scenario())


def test_a_lost_answer_is_asked_for_and_found_taken_even_after_the_destination_closed() -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint):
            lost: list[Kind] = []

            def lose_first_answer(_: int, kind: Kind, is_answer: bool) -> bool:
                if is_answer and kind is Kind.TAKEN and not lost:
                    lost.append(kind)
                    return True
                return False

            async with proxy(endpoint, lose_first_answer) as between, source(between) as here:
                there.arm(SESSION)
                handing = asyncio.ensure_future(here.hand_over(10 * SECOND_NS))
                while there.token.taken is None:
                    await asyncio.sleep(0)
                await there.close()  # as its control process does when it was told

                assert await handing is Handover.TAKEN
                assert lost == [Kind.TAKEN]
                while not there.token.confirmed:
                    await asyncio.sleep(0.001)

    run(scenario())


def test_a_lost_take_is_void_for_ever_once_it_was_asked_for() -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint):
            lose_take = lambda _number, kind, _is_answer: kind is Kind.TAKE  # noqa: E731
            async with proxy(endpoint, lose_take) as between, source(between) as here:
                there.arm(SESSION)

                assert await here.hand_over(10 * SECOND_NS) is Handover.REFUSED

            assert there.token.answer(Kind.TAKE, SESSION) is Kind.REFUSED

    run(scenario())


def test_no_answer_before_the_deadline_is_unknown_and_bounded() -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint):
            lose_answers = lambda _number, kind, is_answer: (  # noqa: E731
                is_answer and kind is not Kind.WAITING
            )
            async with proxy(endpoint, lose_answers) as between, source(between) as here:
                there.arm(SESSION)
                began = time.monotonic()

                assert await here.hand_over(SECOND_NS // 5) is Handover.UNKNOWN

                assert time.monotonic() - began < 30
            assert there.token.taken == SESSION

    run(scenario())


def test_a_connection_that_idled_away_is_made_anew_before_the_token_is_sent() -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint), source(endpoint) as here:
            there.arm(SESSION)
            assert here._connection is not None
            here._connection.shutdown(socket.SHUT_RDWR)

            await here.check()

            assert not here.is_sent
            assert await here.hand_over(10 * SECOND_NS) is Handover.TAKEN

    run(scenario())


def test_a_destination_that_is_gone_is_noticed_before_the_guest_is_stopped() -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint), source(endpoint) as here:
            await there.end()

            with pytest.raises(ChannelError, match="greeting the destination guest again"):
                await here.check()

            assert not here.is_sent

    run(scenario())


def test_a_missing_socket_file_proves_nothing(tmp_path: Path) -> None:
    """Control may have removed it while the guest behind it has the token."""

    async def scenario() -> None:
        async with destination() as (there, endpoint):
            lose_taken = lambda number, kind, is_answer: is_answer and kind is Kind.TAKEN  # noqa: E731
            async with proxy(endpoint, lose_taken) as between, source(between) as here:
                there.arm(SESSION)
                here._addresses = [(socket.AF_UNIX, f"{tmp_path}/removed")]

                assert await here.hand_over(SECOND_NS) is Handover.UNKNOWN
            assert there.token.taken == SESSION

    run(scenario())


def test_a_refusal_by_another_host_proves_nothing_and_one_by_this_kernel_does() -> None:
    refused = NobodyListens(_is_this_host(socket.AF_INET, ("192.0.2.1", 4444)))
    assert not refused.is_proof
    for family, address in (
        (socket.AF_UNIX, "/any"),
        (socket.AF_INET, ("127.9.9.9", 1)),
        (socket.AF_INET6, ("::1", 1, 0, 0)),
    ):
        assert _is_this_host(family, address)
    assert not _is_this_host(socket.AF_INET6, ("fe80::1%eth0", 1, 0, 2))


def test_a_taker_that_its_guest_outlives_proves_nothing_by_its_death() -> None:
    """A QEMU may run on without its agent."""

    async def scenario() -> None:
        async with destination() as (there, endpoint):
            here = SourceEnd(SESSION, dies_with_taker=False)
            lose_taken = lambda number, kind, is_answer: is_answer and kind is Kind.TAKEN  # noqa: E731
            async with proxy(endpoint, lose_taken) as between:
                await here.connect(between)
                there.arm(SESSION)
                here._addresses = [(socket.AF_INET, ("127.0.0.1", 1))]

                assert await here.hand_over(10 * SECOND_NS) is Handover.UNKNOWN
            here.close()
            assert there.token.taken == SESSION

    run(scenario())


def test_a_far_host_that_refuses_leaves_the_outcome_unknown_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.guest.handover._is_this_host", lambda family, address: False)

    async def scenario() -> None:
        async with destination() as (there, endpoint), source(endpoint) as here:
            here._token.is_sent = True  # a TAKE whose answer was lost
            await there._give_up_listener()
            here.close()
            began = time.monotonic()

            assert await here.hand_over(50 * SECOND_NS) is Handover.UNKNOWN

            assert time.monotonic() - began < 25

    run(scenario())


def test_a_listener_that_ends_says_goodbye_so_that_nobody_has_to_guess(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            destination(f"unix:{tmp_path}/token") as (there, endpoint),
            source(endpoint) as here,
        ):
            await there.end()

            assert await here.hand_over(10 * SECOND_NS) is Handover.REFUSED
            with pytest.raises(GuestError, match="void"):
                there.token.arm(SESSION)

    run(scenario())


def test_a_guest_that_took_over_is_not_handed_on_before_its_source_knows() -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint):
            lose_taken = lambda number, kind, is_answer: (  # noqa: E731
                number == 1 and is_answer and kind is Kind.TAKEN
            )
            async with proxy(endpoint, lose_taken) as between, source(between) as here:
                there.arm(SESSION)
                handing = asyncio.ensure_future(here.hand_over(10 * SECOND_NS))
                await soon(lambda: there.token.taken is not None)
                assert not there.is_settled

                assert await handing is Handover.TAKEN

                await soon(lambda: there.is_settled)

    run(scenario())


def test_connecting_where_nobody_listens_is_an_error_that_says_where(tmp_path: Path) -> None:
    async def scenario() -> None:
        for endpoint in ("tcp:127.0.0.1:1", f"unix:{tmp_path}/nobody.sock"):
            with pytest.raises(ChannelError, match="connecting the handover to"):
                await SourceEnd(SESSION).connect(endpoint)

    run(scenario())


def test_a_crowd_of_idle_strangers_does_not_keep_the_source_out() -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint):
            where = parse_endpoint(endpoint)
            strangers = []
            for _ in range(3 * CONNECTIONS_MAX):
                _, writer = await asyncio.open_connection(where.host, where.port)
                strangers.append(writer)
            async with source(endpoint) as here:
                there.arm(SESSION)

                assert await here.hand_over(10 * SECOND_NS) is Handover.TAKEN

            for writer in strangers:
                writer.close()

    run(scenario())


@settings(max_examples=60, deadline=None)
@given(
    garbage=st.one_of(
        st.binary(min_size=1, max_size=100).filter(lambda b: b[:4] != b"rfho"),
        st.tuples(
            st.integers(0, 2**16 - 1),
            st.integers(9, 2**16 - 1),
            st.binary(min_size=16, max_size=16),
        ).map(lambda t: MESSAGE.pack(b"rfho", *t)),
    )
)
def test_garbage_costs_its_connection_and_nothing_else(garbage: bytes) -> None:
    async def scenario() -> None:
        async with destination() as (there, endpoint):
            there.arm(SESSION)
            where = parse_endpoint(endpoint)
            reader, writer = await asyncio.open_connection(where.host, where.port)
            writer.write(garbage)
            writer.write_eof()

            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""

            writer.close()
            assert there.token.armed == SESSION
            assert there.token.taken is None

    run(scenario())


@given(st.sampled_from(list(Kind)), st.binary(min_size=16, max_size=16).filter(any))
def test_messages_survive_encoding_and_each_changed_or_missing_byte_is_noticed(
    kind: Kind, session: bytes
) -> None:
    message = encode(kind, session)

    assert decode(message) == (kind, session)
    for i in range(6):  # magic and version
        with pytest.raises(WireError):
            decode(message[:i] + bytes([message[i] ^ 1]) + message[i + 1 :])
    with pytest.raises(WireError):
        decode(message[:-1])


@pytest.mark.parametrize(
    "text",
    ["tcp:host", "tcp:host:99999", "tcp:host:-1", "unix:", "udp:1:2", "", "unix:" + "x" * 108],
)
def test_an_impossible_endpoint_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="neither tcp:HOST:PORT nor unix:PATH") as caught:
        parse_endpoint(text)

    assert "\n" not in str(caught.value)


def test_a_dead_socket_file_is_replaced_but_a_live_one_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        uri = f"unix:{tmp_path}/handover.sock"
        async with destination(uri):
            second = DestinationEnd(lambda: None)
            with pytest.raises(GuestError, match="cannot listen"):
                await second.listen(uri)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(uri.removeprefix("unix:"))
        async with destination(uri) as (there, endpoint), source(endpoint) as here:
            there.arm(SESSION)
            assert await here.hand_over(10 * SECOND_NS) is Handover.TAKEN

    run(scenario())
