"""What ramferry says of a QEMU that it cannot migrate: one line, and the QEMU is as before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from engine.errors import GuestError, MemoryRefused, MigrationError
from engine.guest import qemu_machine
from engine.guest.base import TrackerName
from engine.guest.foreign import ForeignBlock
from engine.guest.foreignguest import ForeignGuest, attach_qemu
from engine.guest.qemu_machine import QemuMachine
from engine.guest.qemu_memory import find_blocks
from engine.memory.blocks import PAGE_SIZE, STRIPE_SIZE
from engine.memory.tracking import Tracking
from tests.guest.support import run
from tests.support import open_descriptors
from tests.vmm.machines import MIB, SETTINGS, Monitor, Vm, needs_qemu, vm

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu]
FILE = "memory-backend-file,id=ram0,size=64M"


@contextlib.asynccontextmanager
async def attached(machine: Vm, *, incoming: bool = False) -> AsyncIterator[ForeignGuest]:
    guest = await attach_qemu(f"{machine.directory}/ramferry.qmp", incoming=incoming)
    try:
        yield guest
    finally:
        await guest.quit()


def refusal(machine: Vm, *, incoming: bool = False) -> str:
    """Why it cannot be attached to; its guest goes on as if nobody had asked."""

    async def scenario() -> str:
        with pytest.raises(MigrationError) as caught:
            async with attached(machine, incoming=incoming):
                pass
        return str(caught.value)

    reason = run(scenario())
    assert "\n" not in reason
    return reason


def test_all_is_found_by_itself() -> None:
    async def scenario(machine: Vm) -> None:
        async with attached(machine) as guest:
            assert [(each.name, each.size) for each in guest.blocks] == [
                ("ram0", 32 * MIB),
                ("ram1", 32 * MIB),
            ]
            for block, path in zip(guest.blocks, machine.rams, strict=True):
                assert os.path.samestat(os.fstat(block.fd), path.stat())
                assert block.backing_page_size == PAGE_SIZE
            assert guest.is_running
            assert guest.pid == machine.pid

    with vm(blocks=2) as machine:
        run(scenario(machine))
        assert machine.status == "running"
        assert machine.goes_on()


def test_private_memory_is_refused() -> None:
    with vm(memory=["-m", "64"]) as machine:
        assert "is not shared; start QEMU with -object memory-backend-file" in refusal(machine)
        assert machine.goes_on()


def test_a_file_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    memory = ["-object", f"{FILE},mem-path={tmp_path}/ram", "-machine", "memory-backend=ram0"]
    with vm(memory=["-m", "64", *memory]) as machine:
        assert "'ram0' (memory-backend-file) is not shared" in refusal(machine)


def test_a_memfd_is_refused_where_qemu_would_send_it_itself() -> None:
    memory = ["-object", "memory-backend-memfd,id=a,size=64M,share=on", "-m", "64"]
    with vm(memory=[*memory, "-machine", "memory-backend=a"]) as machine:
        version = machine.monitor.ask("query-version")["qemu"]
        if (version["major"], version["minor"]) < (8, 1):
            pytest.skip("this QEMU leaves memfds to others")
        assert "only if it has a file; memory backend 'a'" in refusal(machine)


def test_a_monitor_with_another_client_is_refused() -> None:
    with vm() as machine:
        other = Monitor(machine.directory / "ramferry.qmp")
        try:
            assert "another client is connected" in refusal(machine)
        finally:
            other.close()


def test_a_path_where_nobody_listens_is_refused() -> None:
    with vm() as machine:
        (machine.directory / "ramferry.qmp").unlink()

        assert "no QEMU answers at" in refusal(machine)


def test_a_source_that_waits_and_a_destination_that_does_not_are_refused() -> None:
    with vm() as machine:
        assert "start it with -incoming defer" in refusal(machine, incoming=True)
    with vm("-incoming", "defer") as machine:
        assert "waits for a migration" in refusal(machine)


MAPS = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0):
    print(flush=True)
    input()
"""


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[int]:
    """Another process maps the file: its id."""
    command = [sys.executable, "-c", MAPS, str(path)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield other.pid
        other.communicate(b"\n")


def test_memory_that_another_process_maps_is_refused() -> None:
    with vm() as machine:
        with mapped(machine.rams[0]) as other:
            assert (
                f"other processes map the memory of process {machine.pid}, too (pid {other})"
                in refusal(machine)
            )
        assert machine.goes_on()


def test_memory_that_another_process_maps_later_is_not_tracked() -> None:
    async def scenario(machine: Vm) -> str:
        async with attached(machine) as guest:
            refused = pytest.raises(MemoryRefused, match="other processes map")
            with mapped(machine.rams[0]), refused as caught:
                await guest.start_tracking(None)
            await guest.start_tracking(None)  # it has gone
            return str(caught.value)

    with vm() as machine:
        assert f"memory of process {machine.pid}" in run(scenario(machine))


def test_a_drive_that_bypasses_the_page_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    drive = f"file={tmp_path}/disk,format=raw,if=none,id=disk,cache=none"
    with vm("-drive", drive) as machine:
        assert "bypasses the page cache (cache.direct=on)" in refusal(machine)


def test_a_qemu_that_migrates_by_itself_is_refused() -> None:
    with vm() as machine:
        machine.monitor.ask("migrate-set-parameters", **{"max-bandwidth": 1024})
        machine.monitor.ask("migrate", uri="exec:cat > /dev/null")

        assert "QEMU's own migration is" in refusal(machine)

        machine.monitor.ask("migrate_cancel")


def test_a_destination_to_which_nothing_came_has_its_settings_back() -> None:
    def settings(machine: Vm) -> list[Any]:
        return [machine.monitor.ask(f"query-migrate-{what}") for what in SETTINGS]

    async def scenario(machine: Vm) -> None:
        async with attached(machine, incoming=True):
            assert await asyncio.to_thread(settings, machine) != before

    with vm("-incoming", "defer") as machine:
        before = settings(machine)
        run(scenario(machine))
        assert settings(machine) == before


def test_a_destination_that_dies_as_it_is_attached_to_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with vm("-incoming", "defer") as machine:

        def find_and_kill(*arguments: Any) -> list[ForeignBlock]:
            found = find_blocks(*arguments)
            machine.process.kill()
            machine.process.wait()
            return found

        monkeypatch.setattr(qemu_machine, "find_blocks", find_and_kill)
        before = open_descriptors()
        with pytest.raises(GuestError) as caught:
            QemuMachine(f"{machine.directory}/ramferry.qmp", incoming=True)

        assert f"process {machine.pid} cannot be looked at" in str(caught.value)
        assert isinstance(caught.value.__cause__, OSError)
        assert open_descriptors() == before


def test_a_second_ramferry_cannot_track_what_one_tracks() -> None:
    async def scenario(machine: Vm) -> str:
        async with attached(machine) as first:
            await first.start_tracking(None)
            second = await attach_qemu(f"{machine.directory}/second.qmp", incoming=False)
            try:
                with pytest.raises(MigrationError) as caught:
                    await second.start_tracking(None)
            finally:
                await second.quit()
            return str(caught.value)

    with vm("-qmp", "unix:second.qmp,server=on,wait=off") as machine:
        assert "has a userfaultfd already" in run(scenario(machine))


def test_other_trackers_and_missing_pages_of_a_source_are_refused() -> None:
    async def scenario(machine: Vm) -> None:
        async with attached(machine) as guest:
            with pytest.raises(MigrationError, match="working is: uffd-wp"):
                await guest.start_tracking(TrackerName.BITMAP)
            with pytest.raises(MigrationError, match="only a guest that waits for a migration"):
                await guest.open_missing()

    with vm() as machine:
        run(scenario(machine))


def harvest(guest: ForeignGuest, tracking: Tracking) -> list[bytearray]:
    """The pages written since the last harvest, a bitmap a block."""
    from engine import _native

    bitmaps = []
    for block, tracked in zip(guest.blocks, tracking.pieces, strict=True):
        found = bytearray(-(-block.page_count // 64) * 8)
        whole = (block.page_count, STRIPE_SIZE // PAGE_SIZE, 0, 1)
        _native.pagemap_scan(tracking.fds[0], tracked.address, found, whole)
        bitmaps.append(found)
    return bitmaps


def pages_of(bitmap: bytearray) -> set[int]:
    return {i for i in range(len(bitmap) * 8) if bitmap[i // 8] >> i % 8 & 1}


def test_tracking_tells_exactly_what_the_guest_wrote() -> None:
    """Nothing while it stands; while it runs, every page whose content has changed."""

    async def scenario(machine: Vm) -> None:
        async with attached(machine) as guest:
            tracking = await guest.start_tracking(None)
            assert await asyncio.to_thread(machine.goes_on)
            await guest.pause(for_migration=True)
            harvest(guest, tracking)
            before = machine.memory()
            assert [pages_of(each) for each in harvest(guest, tracking)] == [set(), set()]
            await guest.resume(for_migration=True)
            assert await asyncio.to_thread(machine.goes_on)
            await guest.pause(for_migration=True)
            found = [pages_of(each) for each in harvest(guest, tracking)]
            changed = [
                {i for i in range(len(old) // PAGE_SIZE) if differs(old, new, i)}
                for old, new in zip(before, machine.memory(), strict=True)
            ]
            assert changed[0]
            for was_found, has_changed in zip(found, changed, strict=True):
                assert has_changed <= was_found
                assert len(was_found - has_changed) < 64  # QEMU's own: written with what was there
            await guest.resume(for_migration=True)
            assert guest.is_running

    with vm(blocks=2) as machine:
        run(scenario(machine))
        assert machine.goes_on()


def differs(old: bytes, new: bytes, page: int) -> bool:
    place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
    return old[place] != new[place]
