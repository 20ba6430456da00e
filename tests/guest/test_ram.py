"""The ram guest: this process is its agent."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.errors import GuestError, MemoryRefused, UsageError
from engine.guest.base import Guest, Handover, TrackerName
from engine.guest.spec import open_guest, parse_guest_spec
from tests.guest.support import SESSION, run

SECOND_NS = 1_000_000_000


@contextlib.asynccontextmanager
async def ram(
    options: str = "size=1M", *, incoming: bool = False, start: bool = True
) -> AsyncIterator[Guest]:
    guest = await open_guest(parse_guest_spec(f"ram:{options}"), incoming=incoming, run=start)
    try:
        yield guest
    finally:
        await guest.quit()


def test_its_contents_are_compared_while_it_runs_and_nothing_is_tracked_while_it_stands() -> None:
    async def scenario() -> None:
        async with ram() as guest:
            assert guest.is_running
            assert (await guest.start_tracking(None)).name is TrackerName.HASH
            await guest.stop_tracking()
            assert await guest.pause(for_migration=False) <= time.monotonic_ns()
            assert (await guest.start_tracking(None)).name is TrackerName.NONE
            with pytest.raises(GuestError, match="migrated as it stands"):
                await guest.resume(for_migration=False)
            await guest.stop_tracking()
            await guest.resume(for_migration=False)
            for name in (TrackerName.UFFD, TrackerName.BITMAP, TrackerName.NONE):
                with pytest.raises(MemoryRefused, match="working are: content-hash"):
                    await guest.start_tracking(name)
            assert await guest.writes() is None

    run(scenario())


@pytest.mark.parametrize("is_run", [False, True])
def test_the_token_makes_the_incoming_guest_the_owner(is_run: bool) -> None:
    async def scenario() -> None:
        async with ram(start=is_run) as source, ram(incoming=True) as destination:
            taken = asyncio.get_running_loop().create_future()

            async def note(at_ns: int) -> None:
                taken.set_result(at_ns)

            assert not destination.is_running
            await source.connect_handover(
                await destination.listen_handover("tcp:127.0.0.1:0"), SESSION
            )
            await source.pause(for_migration=True)
            await destination.load_state(await source.save_state())
            await destination.arm(SESSION, is_run, note)

            assert await source.hand_over(10 * SECOND_NS) is Handover.TAKEN

            assert await taken <= time.monotonic_ns()
            assert destination.is_running is is_run
            with pytest.raises(GuestError, match="handed over"):
                await source.resume(for_migration=True)
            with pytest.raises(GuestError):
                await source.hand_over(SECOND_NS)

    run(scenario())


def test_a_destination_that_ended_refuses_by_not_being_there() -> None:
    async def scenario() -> None:
        async with ram() as source:
            async with ram(incoming=True) as destination:
                await source.connect_handover(
                    await destination.listen_handover("tcp:127.0.0.1:0"), SESSION
                )
                await source.pause(for_migration=True)

            assert await source.hand_over(10 * SECOND_NS) is Handover.REFUSED

            await source.resume(for_migration=True)
            assert source.is_running

    run(scenario())


def test_only_its_own_state_is_taken_and_only_before_it_owns() -> None:
    async def scenario() -> None:
        async with ram(incoming=True) as guest:
            with pytest.raises(GuestError, match="not that of a ram guest"):
                await guest.load_state(b"x")
            with pytest.raises(GuestError, match="does not listen"):
                await guest.arm(SESSION, True, lambda _at_ns: asyncio.sleep(0))
        async with ram() as guest:
            with pytest.raises(GuestError, match="only a guest that waits"):
                await guest.listen_handover("tcp:127.0.0.1:0")

    run(scenario())


def test_a_file_is_the_ram_of_one_guest_only(tmp_path: Path) -> None:
    """As source and destination it would be punched while it is sent."""
    path = tmp_path / "ram"

    async def scenario() -> None:
        async with ram(f"size=1M,path={path}") as guest:
            with pytest.raises(UsageError, match="is the RAM of another guest; use another path"):
                async with ram(f"size=1M,path={path}", incoming=True):
                    pass
            assert guest.is_running
            assert path.stat().st_size == 1024 * 1024
        async with ram(f"size=1M,path={path}"):
            pass

    run(scenario())
