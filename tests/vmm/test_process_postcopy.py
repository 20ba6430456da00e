"""A process goes on in its twin before its memory is there."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Final

import pytest

import engine
from engine.control.status import Status
from engine.errors import MemoryRefused
from engine.guest.foreignguest import attach_process
from tests.guest.support import run
from tests.support import eventually as soon
from tests.vmm.postcopy_rig import (
    PAUSED,
    couple,
    eventually,
    in_postcopy,
    needs_kernel_faults,
    start_destination,
    until,
)
from tests.vmm.test_end_to_end import agents_of
from tests.vmm.test_process import STEPPER, Stepper, directory, steppers

pytestmark = [pytest.mark.process]
__all__ = ["directory"]

#: A twin that has the kernel read all of its memory, and never touches it itself.
WRITER: Final = """
import mmap, os, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    out = os.open(sys.argv[1] + ".out", os.O_WRONLY | os.O_CREAT)
    memory.madvise(mmap.MADV_DONTFORK)
    print(flush=True)
    input()
    for start in range(0, len(memory), 65536):
        with memoryview(memory) as whole, whole[start : start + 65536] as part:
            assert os.write(out, part) == len(part)
"""


def userfaultfds(stepper: Stepper) -> int:
    descriptors = Path(f"/proc/{stepper.process.pid}/fd").iterdir()
    return sum("userfaultfd" in os.readlink(each) for each in descriptors)


def lacks_pages(stepper: Stepper) -> bool:
    smaps = Path(f"/proc/{stepper.process.pid}/smaps").read_text()
    return bool(re.search(r"^VmFlags:.* um\b", smaps, re.M))


@needs_kernel_faults
@pytest.mark.parametrize("rounds", [0, 2], ids=["postcopy", "hybrid"])
def test_the_memory_arrives_byte_by_byte_and_the_twin_goes_on(directory: Path, rounds: int) -> None:
    async def scenario(source: Stepper, destination: Stepper) -> None:
        settings = ("max-bandwidth=32M", "downtime-limit=1")
        async with couple(source.spec, destination.spec, *settings, runs=False) as both:
            async for progress in both.migration.progress(0.01):
                if progress.status is Status.ACTIVE and progress.rounds > rounds:
                    break
            await both.migration.start_postcopy()
            await both.finish()

    with steppers(directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.path.read_bytes() == destination.path.read_bytes()
        assert source.stands()
        assert destination.stands()
        assert not lacks_pages(destination)
        assert userfaultfds(destination) == 0
        before = source.steps()
        destination.begin()
        os.kill(destination.process.pid, signal.SIGCONT)
        assert destination.goes_on()
        assert destination.steps() > before


@needs_kernel_faults
def test_what_the_kernel_reads_for_the_twin_is_waited_for(directory: Path) -> None:
    async def scenario(source: Stepper, destination: Stepper) -> None:
        async with in_postcopy(source.spec, destination.spec, runs=True):
            destination.begin()
            await eventually(lambda: destination.process.poll() is not None)
            assert destination.process.returncode == 0

    with steppers(directory, WRITER) as (source, destination):
        asyncio.run(scenario(source, destination))

        out = Path(f"{destination.path}.out").read_bytes()
        assert out == source.path.read_bytes()


@needs_kernel_faults
def test_a_twin_waits_without_ramferry_and_goes_on_with_the_next(
    directory: Path, tmp_path: Path
) -> None:
    async def scenario(source: Stepper, destination: Stepper) -> None:
        async with in_postcopy(source.spec, destination.spec, states=tmp_path, runs=True) as both:
            both.there.kill()
            await both.there.wait()
            await until(both.here, PAUSED)
            destination.begin()
            assert lacks_pages(destination)
            async with start_destination(destination.spec, tmp_path) as again:
                assert "its guest lives and is taken over" in again.stderr
                both.there = again
                await both.recover()
                await both.finish()
                assert await asyncio.to_thread(destination.goes_on)
                assert destination.steps() > source.steps()
            assert await again.wait() == 0  # it ended by itself

    with steppers(directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert source.stands()
        assert not lacks_pages(destination)


@needs_kernel_faults
def test_an_agent_left_alone_says_where_it_is_adopted(directory: Path) -> None:
    async def scenario(source: Stepper, destination: Stepper) -> None:
        async with in_postcopy(source.spec, destination.spec) as both:
            agent = agents_of(both.there.pid)[0]
            both.there.kill()
            await both.there.wait()
            where = Path(os.environ["XDG_RUNTIME_DIR"]) / "ramferry" / f"guest-{agent}.sock"
            assert await asyncio.to_thread(soon, where.is_socket)
            async with engine.Control.start(f"process:socket={where}") as again:
                assert "no journal says of which migration" in again.stderr
                assert (await again.execute("query-status"))["status"] == "paused"
            assert lacks_pages(destination)  # `quit` was its end, not the twin's

    with steppers(directory) as (source, destination):
        asyncio.run(scenario(source, destination))


@needs_kernel_faults
def test_a_twin_that_waits_for_pages_of_nobody_is_refused(directory: Path) -> None:
    async def scenario(source: Stepper, destination: Stepper) -> None:
        async with in_postcopy(source.spec, destination.spec) as both:
            os.kill(agents_of(both.there.pid)[0], signal.SIGKILL)
            both.there.kill()
            await both.there.wait()
            path = str(destination.path)
            with pytest.raises(MemoryRefused, match="waits for pages of a migration that nobody"):
                await attach_process(destination.process.pid, path, incoming=True)

    with steppers(directory) as (source, destination):
        asyncio.run(scenario(source, destination))

        assert lacks_pages(destination)


def kill_our_agent() -> None:
    """It has ended when this returns."""
    agent = agents_of(os.getpid())[0]
    os.kill(agent, signal.SIGKILL)
    os.waitid(os.P_PID, agent, os.WEXITED | os.WNOWAIT)


@needs_kernel_faults
def test_nobody_waits_when_an_agent_dies_before_it_was_told_to_end_that(directory: Path) -> None:
    async def scenario(destination: Stepper) -> None:
        path = str(destination.path)
        guest = await attach_process(destination.process.pid, path, incoming=True)
        try:
            await guest.open_missing()
            assert lacks_pages(destination)
            kill_our_agent()  # our event loop has not seen it yet
            await guest.close_missing()
            assert not guest.is_missing_open
        finally:
            await guest.quit()

    with steppers(directory) as (_, destination):
        run(scenario(destination))

        assert not lacks_pages(destination)
        assert userfaultfds(destination) == 0


def test_a_twin_that_may_not_wait_in_the_kernel_is_refused(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("taking a capability from the twin needs root; CI runs this as root")
    may_all = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n"
    drop = ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace")

    async def scenario(destination: Stepper) -> str:
        path = str(destination.path)
        guest = await attach_process(destination.process.pid, path, incoming=True)
        try:
            await guest.open_missing()
        except MemoryRefused as exc:
            return str(exc)
        finally:
            await guest.quit()
        return ""

    with steppers(directory, STEPPER, *drop) as (_, destination):
        reason = run(scenario(destination))

        wanted = "sysctl vm.unprivileged_userfaultfd=1, or start it with CAP_SYS_PTRACE"
        assert (wanted in reason) is not may_all
        assert userfaultfds(destination) == 0
        assert not lacks_pages(destination)
