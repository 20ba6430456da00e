"""A real destination, and a source that says what it must not: refused, and never a wrong page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
import pytest

import engine
from engine import wire
from engine.control.mainchannel import ConnectionLost, SourceEnd
from engine.control.uri import Address, parse_uri
from engine.guest.base import Handover
from tests.guest.support import SECOND_NS, SESSION, workload, writes_reach
from tests.kernel import has_userfaultfd

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]

PAGES: Final = 256
WAIT_S: Final = 30
EIGHT: Final = b"\1" + bytes(7)
PAUSED = "postcopy-paused"


class Source:
    """What a source's control process says, one message at a time; its guest is real."""

    def __init__(self, guest: Any, main: SourceEnd, address: Address) -> None:
        self.guest, self.main, self._address = guest, main, address

    async def ask(self, message: wire.Message, answer: type[wire.Message]) -> Any:
        await self.main.send(message)
        return await self.hear(answer)

    async def hear(self, answer: type[wire.Message]) -> Any:
        async with asyncio.timeout(WAIT_S):
            while not isinstance(heard := await self.main.receive(), answer):
                pass
        return heard

    async def greet(self) -> None:
        shapes = [wire.BlockShape.of(block) for block in self.guest.blocks]
        hello = wire.Hello(wire.VERSION, SESSION, 4096, shapes, 1, "workload", True)
        welcome = await self.ask(hello, wire.Welcome)
        await self.guest.connect_handover(self._address.reach(welcome.handover), SESSION)

    async def begin(self) -> None:
        await self.greet()
        await self.ask(wire.BeginPostcopy(0), wire.PostcopyReady)

    async def arm(self) -> None:
        """Nothing of the guest is there; it stands, and may run there now."""
        await self.begin()
        for piece in self.everything():
            await self.main.send(piece)
        await self.ask(wire.DiscardStale(), wire.StaleDiscarded)
        await self.guest.pause(for_migration=True)
        await self.main.send(wire.DeviceState(await self.guest.save_state()))
        await self.ask(wire.Arm(0, True), wire.Armed)

    async def give_away(self) -> None:
        await self.arm()
        assert await self.guest.hand_over(20 * SECOND_NS, keeps_ram=True) is Handover.TAKEN
        await self.hear(wire.TookOver)

    def everything(self) -> list[wire.Stale]:
        return [wire.Stale(0, 0, b"\xff" * (PAGES // 8))]


@contextlib.asynccontextmanager
async def couple() -> AsyncIterator[tuple[Source, engine.Control]]:
    settings = ["postcopy-ram=on"]
    spec = "workload:size=1M,fill=off"
    async with (
        workload("size=1M,rate=1M") as guest,
        engine.Control.start(spec, "tcp:127.0.0.1:0", settings) as destination,
    ):
        await writes_reach(guest, 10)
        address = parse_uri(await destination.address())
        assert isinstance(address, Address)
        main = SourceEnd(address)
        await main.connect()
        try:
            yield Source(guest, main, address), destination
        finally:
            main.close()


PIECES = [
    pytest.param(wire.Stale(1, 0, EIGHT), "RAM block 1 of 1", id="a-block-that-is-not"),
    pytest.param(wire.Stale(-1, 0, EIGHT), "RAM block -1 of 1", id="a-block-below-zero"),
    pytest.param(wire.Stale(0, PAGES, EIGHT), "8 bytes of a bitmap at page 256", id="behind-RAM"),
    pytest.param(wire.Stale(0, 2**62, EIGHT), "of a bitmap at page", id="far-behind-RAM"),
    pytest.param(wire.Stale(0, -64, EIGHT), "of a bitmap at page -64", id="before-RAM"),
    pytest.param(wire.Stale(0, 1, EIGHT), "of a bitmap at page 1", id="misaligned"),
    pytest.param(wire.Stale(0, 0, b"\1"), "1 bytes of a bitmap", id="no-whole-word"),
    pytest.param(wire.Stale(0, 0, b""), "0 bytes of a bitmap", id="nothing"),
    pytest.param(wire.BeginPostcopy(0), "postcopy cannot begin here", id="begun-twice"),
    pytest.param(wire.Pushed(), "before the guest may run", id="pushed-early"),
    pytest.param(wire.GoOn(), "without a pause", id="goes-on-without-a-pause"),
    pytest.param(wire.Arm(0, True), "device state has not come", id="armed-without-state"),
    pytest.param(wire.Arm(1, True), "have not placed round 1", id="armed-ahead"),
    pytest.param(
        wire.Resume(wire.VERSION, SESSION, [], 1, ()), "unexpected Resume", id="resumed-on-the-way"
    ),
]


@pytest.mark.parametrize(("message", "says"), PIECES)
def test_what_cannot_be_before_the_switch_ends_the_migration(
    message: wire.Message, says: str
) -> None:
    async def scenario() -> tuple[str, int]:
        async with couple() as (source, destination):
            await source.begin()
            failed = await source.ask(message, wire.Failed)
            return failed.reason, await destination.wait()

    reason, exit_code = asyncio.run(scenario())
    assert says in reason
    assert exit_code == 1


@pytest.mark.parametrize(
    "message",
    [wire.Stale(0, 0, EIGHT), wire.DiscardStale(), wire.Pushed(), wire.GoOn()],
    ids=lambda message: type(message).__name__,
)
def test_postcopy_that_has_not_begun_has_no_messages(message: wire.Message) -> None:
    async def scenario() -> str:
        async with couple() as (source, destination):
            await source.greet()
            reason: str = (await source.ask(message, wire.Failed)).reason
            assert await destination.wait() == 1
            return reason

    assert "postcopy" in asyncio.run(scenario())


LATE = [
    pytest.param(wire.Stale(0, 0, EIGHT), "cannot become stale", id="stale"),
    pytest.param(wire.DiscardStale(), "cannot be freed", id="discard"),
    pytest.param(wire.BeginPostcopy(0), "postcopy cannot begin here", id="begin"),
    pytest.param(wire.Arm(0, True), "behind its promise", id="arm"),
    pytest.param(wire.DeviceState(b""), "behind its promise", id="state"),
    pytest.param(wire.GoOn(), "without a pause", id="go-on"),
    pytest.param(wire.Reopen(7, 1), "cannot be made anew", id="a-channel-that-is-not"),
]


@pytest.mark.parametrize(("message", "says"), LATE)
def test_what_cannot_be_once_the_guest_runs_pauses_and_changes_no_page(
    message: wire.Message, says: str
) -> None:
    async def scenario() -> dict[str, Any]:
        async with couple() as (source, destination), asyncio.timeout(WAIT_S):
            await source.give_away()
            await source.main.send(message)
            while (info := await destination.execute("query-migrate"))["status"] != PAUSED:
                await asyncio.sleep(0.01)
            assert info["x-postcopy"]["missing-pages"] == PAGES
            found: dict[str, Any] = info
            return found

    assert says in asyncio.run(scenario())["error-desc"]


def test_a_guest_that_may_run_is_not_armed_again() -> None:
    async def scenario() -> str:
        async with couple() as (source, destination):
            await source.arm()
            reason: str = (await source.ask(wire.Stale(0, 0, EIGHT), wire.Failed)).reason
            assert await destination.wait() == 1
            return reason

    assert "cannot become stale" in asyncio.run(scenario())


async def _paused(destination: engine.Control) -> str:
    """Break a destination's postcopy off; where its source may come again."""
    await destination.execute("migrate-pause")
    while (await destination.execute("query-migrate"))["status"] != PAUSED:
        await asyncio.sleep(0.01)
    await destination.recover()
    return await destination.address()


STRANGERS = [
    pytest.param({"session": b"x" * 16}, "another postcopy is paused", id="session"),
    pytest.param({"version": 99}, "version 99 expected", id="version"),
    pytest.param({"channels": 0}, "0 channels", id="no-channels"),
    pytest.param({"channels": 256}, "256 channels", id="many-channels"),
    pytest.param({"blocks": []}, "0 RAM blocks", id="no-ram"),
    pytest.param({"codecs": (200,)}, "cannot decode", id="codec"),
]


def test_strangers_at_the_recovery_port_are_refused_and_keep_nobody_out() -> None:
    """One after the other, and then the right one."""

    async def scenario() -> None:
        async with couple() as (source, destination), asyncio.timeout(WAIT_S):
            await source.give_away()
            shapes = [wire.BlockShape.of(block) for block in source.guest.blocks]
            right = wire.Resume(wire.VERSION, SESSION, shapes, 1, ())
            address = parse_uri(await _paused(destination))
            assert isinstance(address, Address)
            for case in STRANGERS:
                wrong, says = case.values
                assert isinstance(wrong, dict)
                stranger = SourceEnd(address)
                await stranger.connect()
                await stranger.send(msgspec.structs.replace(right, **wrong))
                answer = await stranger.receive()
                assert isinstance(answer, wire.Refused)
                assert str(says) in answer.reason
                stranger.close()
            silent, ours = SourceEnd(address), SourceEnd(address)
            await silent.connect()
            await ours.connect()
            await ours.send(right)
            answer = await ours.receive()
            assert isinstance(answer, wire.Resumed)
            assert len(answer.endpoints) == 1
            for one in (silent, ours):
                one.close()
            with contextlib.suppress(ConnectionLost):
                await ours.receive()

    asyncio.run(scenario())
