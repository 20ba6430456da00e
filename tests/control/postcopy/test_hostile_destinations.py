"""A real source whose postcopy is paused, and a destination that answers what it must not."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import engine
from engine import wire
from engine.control.mainchannel import ConnectionLost, DestinationEnd
from engine.control.notifiers import Side
from engine.control.uri import Address
from tests.guest.support import SESSION
from tests.survival.test_restart_postcopy import given_away, journal_of

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

WAIT_S: Final = 30
EIGHT: Final = b"\1" + bytes(7)
CODECS: Final = (0, 1)


def resumed(
    endpoints: list[str], faults: str = "tcp://127.0.0.1:1", session: bytes = SESSION
) -> wire.Resumed:
    return wire.Resumed(wire.VERSION, session, endpoints, faults, CODECS)


BOTH: Final = ["tcp://127.0.0.1:1"] * 2
ANSWERS = [
    pytest.param([wire.Received(0, 256, EIGHT)], "bitmap at page 256 of 256", id="behind-RAM"),
    pytest.param([wire.Received(3, 0, EIGHT)], "RAM block 3 of 1", id="a-block-that-is-not"),
    pytest.param([wire.Received(0, 0, EIGHT)] * 2, "more pieces", id="without-end"),
    pytest.param([resumed([])], "2 channels wanted", id="no-channel"),
    pytest.param([resumed(BOTH * 2)], "2 channels wanted", id="a-channel-too-many"),
    pytest.param([resumed(BOTH, session=bytes(16))], "version", id="another-session"),
    pytest.param([resumed(["tcp://x:y"] * 2)], "no port", id="an-endpoint-without-port"),
    pytest.param([resumed(BOTH, faults="ipc:///etc")], "no port", id="faults-without-port"),
    pytest.param([wire.GoesOn()], "answered with GoesOn", id="goes-on-early"),
    pytest.param([wire.TookOver()], "answered with TookOver", id="took-over"),
    pytest.param([wire.Refused("no\nway")], "the destination refused: no", id="refused"),
]


@pytest.fixture
def paused_source(tmp_path: Path) -> Iterator[engine.Control]:
    """To be entered: a source whose postcopy is paused."""
    rundir = Path(os.environ["XDG_RUNTIME_DIR"]) / "guest"
    rundir.mkdir(mode=0o700)
    with given_away(rundir) as control:
        journal = journal_of(control, tmp_path, rundir, Side.SOURCE)
        journal.postcopy(Side.SOURCE, SESSION)
        journal.close(in_order=False)
        control.kill()
        yield engine.Control.start(f"workload:size=1M,rundir={rundir}", state_dir=tmp_path)


async def refused(source: engine.Control, answers: list[wire.Message]) -> str:
    """What the source says of them, once it is paused again."""
    destination = DestinationEnd(Address("127.0.0.1", 0), wire.Resume)
    try:
        port = destination.address.port
        await source.execute("migrate", uri=f"tcp:127.0.0.1:{port}", resume=True)
        question = await destination.accept()
        assert question.session == SESSION
        with contextlib.suppress(ConnectionLost):
            for answer in answers:
                await destination.send(answer)
        while True:
            info = await source.execute("query-migrate")
            if info["status"] == "postcopy-paused":  # again: it was not when it said Resume
                return str(info["error-desc"])
            await asyncio.sleep(0.01)
    finally:
        destination.close()


def test_a_wrong_answer_pauses_again_and_says_what_is_wrong(
    paused_source: engine.Control,
) -> None:
    async def scenario() -> None:
        async with paused_source as source, asyncio.timeout(2 * WAIT_S):
            for case in ANSWERS:
                answers, says = case.values
                assert isinstance(answers, list)
                assert str(says) in await refused(source, answers)

    asyncio.run(scenario())


def test_who_has_every_page_says_so_when_it_is_asked_again(paused_source: engine.Control) -> None:
    """Its word was lost with the connection."""

    async def scenario() -> None:
        async with paused_source as source, asyncio.timeout(WAIT_S):
            destination = DestinationEnd(Address("127.0.0.1", 0), wire.Resume)
            try:
                uri = f"tcp:127.0.0.1:{destination.address.port}"
                await source.execute("migrate", uri=uri, resume=True)
                await destination.accept()
                await destination.send(wire.HasAll())
                while (await source.execute("query-migrate"))["status"] != "completed":
                    await asyncio.sleep(0.01)
            finally:
                destination.close()

    asyncio.run(scenario())
