"""kill -9 in the postcopy of a real QEMU: it never sees a page that is not its own, and where
somebody is left to serve it, every page comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import engine
from engine.control.status import Status
from engine.errors import UsageError
from tests.support import WAIT_S
from tests.support import eventually as soon
from tests.survival.proxy import LISTEN, TARGET, proxy
from tests.vmm.machines import Vm, needs_qemu, pair
from tests.vmm.postcopy_rig import (
    ON,
    PAUSED,
    SLOW,
    Couple,
    couple,
    eventually,
    in_postcopy,
    lacks_pages,
    needs_kernel_faults,
    start_destination,
    start_source,
    until,
)
from tests.vmm.test_end_to_end import agents_of, stand_as
from tests.vmm.test_injection import left_open

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu, needs_kernel_faults]

MAIN, OTHERS = (
    0,
    (1, 2, 3, 257),
)  #: ports of handover, channels and faults, counted from the main one


async def worker(control: engine.Control, name: str) -> int:
    """Process id of a worker, when there is one."""
    async with asyncio.timeout(WAIT_S):
        while True:
            for thread in await control.execute("query-migrationthreads"):
                if thread["name"] == name:
                    return int(thread["thread-id"])
            await asyncio.sleep(0.01)


async def check_arrived(both: Couple, source: Vm, destination: Vm) -> None:
    """Every byte is there, and the guest, which stood, goes on."""
    await both.finish()
    assert await asyncio.to_thread(lambda: source.memory() == destination.memory())
    destination.monitor.ask("cont")
    assert await asyncio.to_thread(destination.goes_on)


def check_ended(source: Vm, destination: Vm) -> None:
    """One guest, and nothing of ours in its process."""
    assert stand_as(source, destination, "running")
    assert not lacks_pages(destination)
    assert left_open(destination) == 0


def waits_for_a_page(machine: Vm) -> bool:
    """Whether one of its threads is in the kernel for it."""
    for task in Path(f"/proc/{machine.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (task / "wchan").read_text() == "handle_userfault":
                return True
    return False


def stands_still(machine: Vm) -> bool:
    """Whether a guest that runs for QEMU comes to a page that is missing, and no further."""
    return soon(lambda: waits_for_a_page(machine)) and machine.rounds() == 0


@pytest.mark.parametrize("side", ["here", "there"])
def test_every_page_comes_when_an_agent_is_killed(side: str) -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec) as both:
            os.kill(agents_of(getattr(both, side).pid)[0], signal.SIGKILL)
            await check_arrived(both, source, destination)
            assert (await both.there.execute("query-status"))["status"] != "internal-error"

    with pair(is_filled=True) as (source, destination):
        asyncio.run(scenario(source, destination))

        check_ended(source, destination)


@pytest.mark.parametrize("who", ["fault-service", "page-service"])
def test_a_service_that_is_killed_comes_back(who: str) -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec) as both:
            control = both.there if who == "fault-service" else both.here
            killed = await worker(control, who)
            os.kill(killed, signal.SIGKILL)
            destination.monitor.ask("cont")  # now it asks for pages
            await eventually(destination.goes_on)
            assert await worker(control, who) != killed
            await both.finish()

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        check_ended(source, destination)


def test_a_control_process_at_the_destination_is_followed_by_another(tmp_path: Path) -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec, states=tmp_path) as both:
            both.there.kill()
            await both.there.wait()
            await until(both.here, PAUSED)
            destination.monitor.ask("cont")  # nobody serves it: it waits
            assert await asyncio.to_thread(stands_still, destination)
            async with start_destination(destination.spec, tmp_path) as again:
                assert "its guest lives and is taken over" in again.stderr
                assert "postcopy is paused: resume it with 'migrate-recover' here" in again.stderr
                both.there = again
                await both.recover()
                await both.finish()
            assert await again.wait() == 0  # it ended by itself
            assert await asyncio.to_thread(destination.goes_on)

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        check_ended(source, destination)


def test_a_control_process_at_the_source_is_followed_by_another(tmp_path: Path) -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec, states=tmp_path) as both:
            both.here.kill()
            await both.here.wait()
            await until(both.there, PAUSED)
            assert source.status == "postmigrate"
            async with start_source(source.spec, *SLOW, states=tmp_path) as again:
                assert "its guest lives and is taken over" in again.stderr
                both.here, both.migration = again, engine.Migration(again)
                with pytest.raises(engine.MigrationError, match="not finalized"):
                    await again.execute("cont")
                await both.recover()
                await check_arrived(both, source, destination)

    with pair(is_filled=True) as (source, destination):
        asyncio.run(scenario(source, destination))

        check_ended(source, destination)


def test_a_guest_waits_for_ever_when_all_of_ramferry_is_killed() -> None:
    """It would read zeros, and say so, if the last of its userfaultfds were closed."""

    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec) as both:
            os.kill(agents_of(both.there.pid)[0], signal.SIGKILL)
            both.there.kill()
            await both.there.wait()
            destination.monitor.ask("cont")
            assert await asyncio.to_thread(stands_still, destination)
            await until(both.here, PAUSED)
            assert source.status == "postmigrate"

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        assert stands_still(destination)


def test_a_source_qemu_that_is_killed_leaves_its_memory_to_ramferry() -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec) as both:
            source.process.kill()
            await check_arrived(both, source, destination)

    with pair(is_filled=True) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert destination.status == "running"
        assert not lacks_pages(destination)


def test_a_destination_qemu_that_is_killed_is_told_on_both_sides() -> None:
    async def scenario(source: Vm, destination: Vm) -> str:
        async with in_postcopy(source.spec, destination.spec) as both:
            destination.process.kill()
            info = await until(both.here, PAUSED)
            assert source.status == "postmigrate"
            await both.there.wait()
            return f"{info['error-desc']} {both.there.stderr}"

    with pair() as (source, destination):
        assert f"qemu (pid {destination.pid})" in asyncio.run(scenario(source, destination))


def test_a_main_channel_that_is_cut_is_a_pause_and_recovery_brings_the_rest() -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with contextlib.AsyncExitStack() as stack:
            between, base = await stack.enter_async_context(proxy((MAIN, *OTHERS)))
            port = f"x-multifd-port-base={base + 1}"
            here = engine.Control.start(source.spec, settings=[*ON, *SLOW, port])
            there = engine.Control.start(destination.spec, f"tcp:{TARGET}:{base}", [*ON, port])
            await stack.enter_async_context(here)
            await stack.enter_async_context(there)
            await there.execute("stop")
            both = Couple(here, there, await here.migrate(f"tcp:{LISTEN}:{base}"))
            await both.migration.start_postcopy()
            for control in (here, there):
                await until(control, Status.POSTCOPY_ACTIVE)
            assert between.cut([base + MAIN]) == 1
            await both.paused()
            assert lacks_pages(destination)
            await there.recover(f"tcp:{TARGET}:{base}")
            await both.migration.resume(f"tcp:{LISTEN}:{base}")
            await check_arrived(both, source, destination)

    with pair(is_filled=True) as (source, destination):
        asyncio.run(scenario(source, destination))

        check_ended(source, destination)


def test_a_stop_that_would_wait_for_a_page_for_too_long_is_taken_back() -> None:
    """A vCPU stops when its page has come; until then QEMU obeys nobody."""

    async def scenario(source: Vm, destination: Vm) -> None:
        async with in_postcopy(source.spec, destination.spec) as both:
            await both.migration.pause()
            await both.paused()
            await both.there.execute("cont")
            await eventually(lambda: stands_still(destination))
            with pytest.raises(UsageError, match="QEMU did not answer 'stop'"):
                await both.there.execute("stop")
            await both.recover()
            await both.finish()
            assert await asyncio.to_thread(destination.goes_on)
            assert (await both.there.execute("query-status"))["status"] == "running"

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        check_ended(source, destination)


# -- while QEMU loads its device state, and waits for a page --------------------------------------


@contextlib.asynccontextmanager
async def loading(source: Vm, destination: Vm) -> AsyncIterator[tuple[Couple, int]]:
    """The destination's QEMU waits in its load, for the page service, which stands."""
    settings = (*SLOW, "pause-before-switchover=on")
    async with couple(source.spec, destination.spec, *settings) as both:
        await both.migration.start_postcopy()
        await until(both.here, Status.PRE_SWITCHOVER)
        service = await worker(both.here, "page-service")
        os.kill(service, signal.SIGSTOP)
        await both.here.execute("migrate-continue", state="pre-switchover")
        await eventually(lambda: waits_for_a_page(destination))
        yield both, service


def test_a_load_that_waits_for_a_page_gets_it_from_the_next_page_service() -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with loading(source, destination) as (both, service):
            os.kill(service, signal.SIGKILL)
            await both.finish()

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        check_ended(source, destination)
        assert destination.goes_on()


@pytest.mark.parametrize("victim", ["source-control", "destination-control", "destination-agent"])
def test_a_load_that_is_given_up_ends_and_leaves_the_guest_at_the_source(victim: str) -> None:
    async def scenario(source: Vm, destination: Vm) -> None:
        async with loading(source, destination) as (both, service):
            killed = both.here.pid if victim == "source-control" else both.there.pid
            os.kill(agents_of(killed)[0] if "agent" in victim else killed, signal.SIGKILL)
            os.kill(service, signal.SIGKILL)
            await eventually(source.goes_on)
            await eventually(lambda: not lacks_pages(destination))

    with pair() as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.status == "running"
        assert destination.rounds() == 0
