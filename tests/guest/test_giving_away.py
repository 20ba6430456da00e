"""The right to run that goes with a stream: given up before, never held by two, back by a word."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.errors import GuestError, NotHandedOver
from engine.guest.spec import RamSpec, open_guest, parse_guest_spec
from tests.guest.support import (
    SESSION,
    Stub,
    adopted,
    copy_ram,
    run,
    socket_of,
    stub,
    workload,
    writes_reach,
)


@contextlib.asynccontextmanager
async def guest_of(kind: str, *, incoming: bool = False) -> AsyncIterator[Any]:
    if kind == "workload":
        async with workload("size=1M", incoming=incoming) as guest:
            yield guest
        return
    spec = parse_guest_spec("ram:size=1M")
    assert isinstance(spec, RamSpec)
    guest = await open_guest(spec, incoming=incoming)
    try:
        yield guest
    finally:
        await guest.quit()


KINDS = pytest.mark.parametrize("kind", ["ram", "workload"])


@KINDS
def test_it_runs_at_the_destination_and_never_again_here(kind: str) -> None:
    async def scenario() -> None:
        async with guest_of(kind) as source, guest_of(kind, incoming=True) as destination:
            taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()

            async def note(at_ns: int) -> None:
                taken.set_result(at_ns)

            await source.pause(for_migration=True)
            await destination.load_state(await source.save_state())
            if kind == "workload":
                copy_ram(source, destination)
            await source.give_away()
            await destination.take_over(SESSION, True, note)
            await taken
            assert destination.is_running
            await source.settle(taken=True)

            with pytest.raises(GuestError, match=r"handed over|at the destination"):
                await source.resume(for_migration=False)
            with pytest.raises(GuestError, match=r"waits for a migration|taken over"):
                await destination.take_over(SESSION, True, note)
            await destination.pause(for_migration=True)
            await destination.give_away()  # nobody has to confirm first: it can go on at once

    run(scenario())


@KINDS
def test_what_was_not_taken_is_held_as_before(kind: str) -> None:
    async def scenario() -> None:
        async with guest_of(kind) as source:
            with pytest.raises(NotHandedOver):
                await source.give_away()  # nobody holds it
            await source.pause(for_migration=True)
            await source.give_away()
            with pytest.raises(NotHandedOver):
                await source.give_away()
            await source.settle(taken=False)
            assert not source.is_running
            await source.resume(for_migration=True)
            assert source.is_running

    run(scenario())


@KINDS
def test_without_an_answer_it_runs_by_the_word_of_its_user_only(kind: str) -> None:
    async def scenario() -> None:
        async with guest_of(kind) as source:
            await source.pause(for_migration=True)
            await source.give_away()
            await source.close_handover()
            assert not source.is_running
            await source.resume(for_migration=False)
            assert source.is_running
            await source.settle(taken=True)  # too late: it is its own
            await source.pause(for_migration=False)
            await source.resume(for_migration=False)
            assert source.is_running

    run(scenario())


def test_a_guest_that_was_given_away_does_not_run_when_its_control_dies(rundir: Any) -> None:
    async def finds_it(control: Stub) -> None:
        async with adopted(socket_of(control)) as guest:
            assert guest.is_outcome_unknown
            assert not guest.is_running
            await guest.resume(for_migration=False)
            await writes_reach(guest, (await guest.writes() or 0) + 1)

    with stub(f"workload:size=1M,rundir={rundir}") as control:
        control.do(do="pause", for_migration=True)
        control.do(do="give_away")
        control.kill()
        run(finds_it(control))
