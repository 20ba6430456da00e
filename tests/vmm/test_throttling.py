"""A guest that knows nothing of us gets less processor time, and gets it back whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import engine
from engine.errors import GuestError
from engine.guest.cgroups import (
    SWITCHED_ON,
    THREADS_MAX,
    Hierarchy,
    ThreadQuotas,
    find_hierarchy,
    threads_of,
)
from engine.guest.foreignguest import ForeignGuest, attach_process, attach_qemu
from engine.guest.throttling import StopCycle, Throttle, Undoing, Way, stands
from tests.guest.support import run
from tests.support import eventually
from tests.vmm.machines import needs_qemu, pair, vm
from tests.vmm.test_end_to_end import agents_of

pytestmark = pytest.mark.process

BUSY = """
import mmap, sys, threading
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    for _ in range(int(sys.argv[2])):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    print(flush=True)
    step = 0
    while True:
        step += 1
        memory[step * 4096 % len(memory)] = step & 255
"""
SIZE = 16 * 1024 * 1024
WINDOW_S = 0.4
LITTLE, MUCH = 0.15, 0.5  #: of a CPU; a throttle of 95 percent leaves 0.05


def quotas_work() -> bool:
    """Whether this user may make groups with quotas for his own processes."""
    hierarchy = find_hierarchy()
    group = None if hierarchy is None else hierarchy.group_of(os.getpid(), os.getpid())
    return group is not None and os.access(group, os.W_OK)


needs_quotas = pytest.mark.skipif(not quotas_work(), reason="needs a control group to write to")


def times(pid: int) -> dict[int, tuple[int, int]]:
    """For how many ns each thread of a process has run, and waited for a CPU."""
    found = {}
    for each in threads_of(pid):
        ran, waited, _ = Path(f"/proc/{pid}/task/{each}/schedstat").read_text().split()
        found[each] = int(ran), int(waited)
    return found


def share(pid: int, *, waiting: bool = False) -> float:
    """The part of a CPU that its busiest thread uses, or would use if others did not."""
    began_ns, before = time.monotonic_ns(), times(pid)
    time.sleep(WINDOW_S)
    now, took_ns = times(pid), time.monotonic_ns() - began_ns
    used = [sum(now[each][: 1 + waiting]) - sum(before[each][: 1 + waiting]) for each in before]
    return max(used) / took_ns


def is_slow(pid: int) -> bool:
    """It gets what a throttle of 95 percent leaves, soon: who shares a CPU stands a bit late."""
    return eventually(lambda: share(pid) < LITTLE)


def groups(pid: int) -> list[str]:
    """What control groups its threads are in."""
    found = [Path(f"/proc/{pid}/task/{thread}/cgroup").read_text() for thread in threads_of(pid)]
    return sorted(found)


def quotas(pid: int) -> list[str]:
    """The quotas of those of its threads that have one in a group of ours."""
    found = []
    for name in ("cpu.cfs_quota_us", "cpu.max"):
        found += [
            each.read_text() for each in Path("/sys/fs/cgroup").rglob(f"ramferry-{pid}-*/{name}")
        ]
    return [each for each in found if not each.startswith(("-1", "max"))]


def is_free(pid: int) -> bool:
    """Nothing slows it down: no group of ours, and it runs or waits for a CPU that others have."""
    if "ramferry" in "".join(groups(pid)):
        return False
    return eventually(lambda: share(pid, waiting=True) > MUCH)


@contextlib.contextmanager
def busy(
    directory: Path, threads: int = 1, name: str = "busy"
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to a file of memory as fast as it can."""
    path = directory / name
    path.write_bytes(bytes(SIZE))
    command = [sys.executable, "-c", BUSY, str(path), str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def directory() -> Iterator[Path]:
    """In a tmpfs: only memory can be tracked."""
    path = Path("/dev/shm") / f"rf-throttle-{os.getpid()}"
    path.mkdir()
    yield path
    for each in path.iterdir():
        each.unlink()
    path.rmdir()


# -- where the groups are ------------------------------------------------------------------------


V1 = "30 23 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_OTHER = "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def test_the_hierarchy_with_the_cpu_controller_is_found(tmp_path: Path) -> None:
    v2 = f"29 23 0:25 /pod {tmp_path}/v2 rw - cgroup2 cgroup2 rw,nsdelegate"
    (tmp_path / "v2").mkdir()
    mounts, controllers = tmp_path / "mountinfo", tmp_path / "v2/cgroup.controllers"

    controllers.write_text("hugetlb\n")
    mounts.write_text(f"{V1_OTHER}\n{v2}\n{V1}\n")
    assert find_hierarchy(str(mounts)) == Hierarchy(1, "/", Path("/sys/fs/cgroup/cpu,cpuacct"))

    controllers.write_text("cpuset cpu io\n")
    assert find_hierarchy(str(mounts)) == Hierarchy(2, "/pod", tmp_path / "v2")

    mounts.write_text(f"{V1_OTHER}\n")
    assert find_hierarchy(str(mounts)) is None


@dataclass(frozen=True)
class Drawn(Hierarchy):
    """A hierarchy of plain files, in which every thread is in one group until ours is made."""

    groups: dict[int, Path] = field(default_factory=dict)

    def group_of(self, pid: int, thread: int) -> Path | None:
        return self.groups.get(thread)


@pytest.mark.parametrize("is_on", [True, False])
def test_version_2_gets_threaded_groups_and_cpu_max(tmp_path: Path, is_on: bool) -> None:
    me = os.getpid()
    (tmp_path / "cgroup.subtree_control").write_text("cpu io" if is_on else "io")
    drawn = Drawn(2, "/", tmp_path, {me: tmp_path})

    ThreadQuotas(me, drawn).limit([me], 80)

    group = tmp_path / f"ramferry-{me}-{me}{'' if is_on else SWITCHED_ON}"
    assert (group / "cgroup.type").read_text() == "threaded"
    assert (group / "cgroup.threads").read_text() == str(me)
    assert (group / "cpu.max").read_text() == "2000 10000"
    assert (tmp_path / "cgroup.subtree_control").read_text() == ("cpu io" if is_on else "+cpu")


def test_version_2_does_not_change_how_others_share_their_time(tmp_path: Path) -> None:
    """There are no quotas then, so that the process is stopped and continued instead."""
    me, control = os.getpid(), tmp_path / "cgroup.subtree_control"
    control.write_text("io")
    (tmp_path / "somebody").mkdir()

    with pytest.raises(OSError, match="would share its CPU time"):
        ThreadQuotas(me, Drawn(2, "/", tmp_path, {me: tmp_path})).limit([me], 80)

    assert control.read_text() == "io"
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["somebody"]


@pytest.mark.parametrize("is_beside", [True, False])
def test_version_2_is_not_switched_off_for_others_that_have_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_beside: bool
) -> None:
    me, control = os.getpid(), tmp_path / "cgroup.subtree_control"
    control.write_text("io")
    quotas = ThreadQuotas(me, Drawn(2, "/", tmp_path, {me: tmp_path}))
    quotas.limit([me], 80)
    if is_beside:
        (tmp_path / "somebody").mkdir()
    monkeypatch.setattr(ThreadQuotas, "_remove", lambda _self, group: shutil.rmtree(group))

    quotas.undo()

    assert control.read_text() == ("+cpu" if is_beside else "-cpu")


@pytest.mark.parametrize(
    ("percent", "period", "quota"),
    [(1, 10_000, 9_900), (90, 10_000, 1_000), (91, 11_111, 1_000), (99, 100_000, 1_000)],
)
def test_a_quota_is_never_below_the_kernels_least(
    tmp_path: Path, percent: int, period: int, quota: int
) -> None:
    me = os.getpid()
    drawn = Drawn(1, "/", tmp_path, {me: tmp_path})

    ThreadQuotas(me, drawn).limit([me], percent)

    group = tmp_path / f"ramferry-{me}-{me}"
    assert (group / "cpu.cfs_period_us").read_text() == str(period)
    assert (group / "cpu.cfs_quota_us").read_text() == str(quota)


@needs_quotas
def test_threads_go_into_groups_of_their_own_and_back(directory: Path) -> None:
    hierarchy = find_hierarchy()
    assert hierarchy is not None
    with busy(directory) as process:
        before = groups(process.pid)
        ThreadQuotas(process.pid, hierarchy).limit(threads_of(process.pid), 95)
        assert len(set(groups(process.pid))) == len(threads_of(process.pid))
        assert is_slow(process.pid)
        ours = hierarchy.group_of(process.pid, process.pid)
        assert ours is not None
        assert ours.is_dir()

        ThreadQuotas(process.pid, hierarchy).undo()  # somebody else does it

        assert groups(process.pid) == before
        assert not ours.exists()
        assert is_free(process.pid)


def test_one_group_that_stays_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, removed = os.getpid(), []

    def remove(_self: ThreadQuotas, group: Path) -> None:
        removed.append(group.name)
        if len(removed) == 1:
            raise PermissionError(group)

    drawn = Drawn(1, "/", tmp_path, {me: tmp_path})
    for thread in (1, 2):
        (tmp_path / f"ramferry-{me}-{thread}").mkdir()
    monkeypatch.setattr(ThreadQuotas, "_remove", remove)
    monkeypatch.setattr("engine.guest.cgroups.threads_of", lambda _pid: [me])

    with pytest.raises(PermissionError):
        ThreadQuotas(me, drawn).undo()

    assert sorted(removed) == [f"ramferry-{me}-1", f"ramferry-{me}-2"]


def version_2() -> Hierarchy | None:
    """Where groups of version 2 can be made, with or without the CPU controller."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4])
        if after.startswith("cgroup2 ") and os.access(mount, os.W_OK):
            return Hierarchy(2, before.split()[3], mount)
    return None


@pytest.mark.skipif(version_2() is None, reason="needs control groups of version 2 to write to")
def test_threads_come_back_from_groups_of_version_2(directory: Path) -> None:
    hierarchy = version_2()
    assert hierarchy is not None
    with busy(directory) as process:
        home = hierarchy.group_of(process.pid, process.pid)
        assert home is not None
        above = home / f"rf-test-{process.pid}"
        above.mkdir()
        try:
            (above / "cgroup.procs").write_text(str(process.pid))
            before = groups(process.pid)
            ours = above / f"ramferry-{process.pid}-{process.pid}{SWITCHED_ON}"
            ours.mkdir()
            (ours / "cgroup.type").write_text("threaded")
            (ours / "cgroup.threads").write_text(str(process.pid))
            assert groups(process.pid) != before

            ThreadQuotas(process.pid, hierarchy).undo()

            assert groups(process.pid) == before
            assert not ours.exists()
        finally:
            (home / "cgroup.procs").write_text(str(process.pid))
            above.rmdir()


# -- in stops ------------------------------------------------------------------------------------


def test_a_process_is_stopped_for_its_share_and_runs_at_the_end(directory: Path) -> None:
    with busy(directory) as process:
        cycle = StopCycle(process.pid, 95)
        try:
            assert is_slow(process.pid)
        finally:
            cycle.close()
        assert is_free(process.pid)


def test_who_is_stopped_by_others_stays_stopped(directory: Path) -> None:
    with busy(directory) as process:
        os.kill(process.pid, signal.SIGSTOP)
        assert eventually(lambda: stands(process.pid))
        cycle = StopCycle(process.pid, 50)
        try:
            assert share(process.pid) == 0
        finally:
            cycle.close()
        assert stands(process.pid)


def test_where_there_are_too_many_threads_for_groups_the_process_is_stopped(
    directory: Path,
) -> None:
    with busy(directory, threads=THREADS_MAX) as process:
        before = groups(process.pid)
        throttle = Throttle(process.pid, lambda: threads_of(process.pid))
        try:
            throttle.set(95)
            throttle.put_on()
            assert throttle.way is Way.STOPS
            assert groups(process.pid) == before
            assert is_slow(process.pid)
        finally:
            throttle.close()
        assert is_free(process.pid)


def test_a_throttle_out_of_range_is_refused() -> None:
    throttle = Throttle(os.getpid(), lambda: [os.getpid()])
    for percent in (-1, 100):
        with pytest.raises(GuestError, match="0 to 99 are allowed"):
            throttle.set(percent)


# -- as a guest ----------------------------------------------------------------------------------


async def check_throttled(guest: ForeignGuest) -> None:
    """It is, also after it stood; and is free in the end."""
    free = await asyncio.to_thread(groups, guest.pid)
    way = await guest.throttle(95)
    assert way in [each.value for each in Way]
    assert await asyncio.to_thread(is_slow, guest.pid)
    await guest.pause(for_migration=True)
    assert not quotas(guest.pid)
    await guest.resume(for_migration=True)
    assert await asyncio.to_thread(is_slow, guest.pid)
    await guest.throttle(0)
    assert await asyncio.to_thread(groups, guest.pid) == free
    assert await asyncio.to_thread(is_free, guest.pid)


@pytest.mark.parametrize("threads", [1, THREADS_MAX])
def test_a_process_is_throttled_except_while_it_is_told_to_stand(
    directory: Path, threads: int
) -> None:
    async def scenario(pid: int) -> None:
        guest = await attach_process(pid, str(directory / "busy"), incoming=False)
        try:
            await check_throttled(guest)
        finally:
            await guest.quit()

    with busy(directory, threads) as process:
        run(scenario(process.pid))


@pytest.mark.guest
@needs_qemu
def test_a_qemu_is_throttled_except_while_it_is_told_to_stand() -> None:
    async def scenario(path: str) -> None:
        guest = await attach_qemu(path, incoming=False)
        try:
            await check_throttled(guest)
        finally:
            await guest.quit()

    with vm() as machine:
        run(scenario(f"{machine.directory}/ramferry.qmp"))
        assert machine.goes_on()


@pytest.mark.parametrize("threads", [1, THREADS_MAX])
def test_a_process_is_free_when_the_agent_is_killed(directory: Path, threads: int) -> None:
    async def scenario(pid: int) -> None:
        guest = await attach_process(pid, str(directory / "busy"), incoming=False)
        try:
            await guest.throttle(99)
            os.kill(agents_of(os.getpid())[0], signal.SIGKILL)
            await guest.died()
            assert await asyncio.to_thread(is_free, pid)
        finally:
            await guest.quit()

    with busy(directory, threads) as process:
        run(scenario(process.pid))


@pytest.mark.parametrize("threads", [1, THREADS_MAX])
def test_a_process_is_free_when_control_is_killed(directory: Path, threads: int) -> None:
    """In mid-migration, by auto-converge, over a link that never ends it."""

    async def scenario(pid: int, twin: int) -> None:
        settings = ["auto-converge=on", "cpu-throttle-initial=90", "downtime-limit=1"]
        here = engine.Control.start(f"process:pid={pid},path={directory}/busy", settings=settings)
        there = engine.Control.start(f"process:pid={twin},path={directory}/twin", "tcp:127.0.0.1:0")
        async with here, there:
            migration = await here.migrate(there, max_bandwidth=16 * 1024 * 1024)
            async for progress in migration.progress(0.01):
                if "x-throttle" in progress.raw:
                    break
            assert progress.raw["x-throttle"] in [each.value for each in Way]
            os.kill(here.pid, signal.SIGKILL)
            assert await asyncio.to_thread(
                eventually, lambda: "ramferry" not in "".join(groups(pid))
            )
            assert await asyncio.to_thread(is_free, pid)

    with busy(directory, threads) as process, busy(directory, name="twin") as twin:
        asyncio.run(scenario(process.pid, twin.pid))


@pytest.mark.parametrize("threads", [1, THREADS_MAX])
def test_a_process_is_free_when_an_agent_that_does_not_end_is_killed_for_it(
    directory: Path, threads: int
) -> None:
    async def scenario(pid: int) -> None:
        guest = await attach_process(pid, str(directory / "busy"), incoming=False)
        try:
            await guest.throttle(99)
            os.kill(agents_of(os.getpid())[0], signal.SIGSTOP)
        finally:
            await guest.quit()
        assert await asyncio.to_thread(is_free, pid)

    with busy(directory, threads) as process:
        run(scenario(process.pid))


@needs_quotas
def test_who_is_stopped_by_others_stays_stopped_when_the_agent_is_killed(directory: Path) -> None:
    """Its throttle was a quota, which stops nobody."""

    async def scenario(pid: int) -> None:
        guest = await attach_process(pid, str(directory / "busy"), incoming=False)
        try:
            await guest.throttle(50)
            os.kill(pid, signal.SIGSTOP)
            assert await asyncio.to_thread(eventually, lambda: stands(pid))
            os.kill(agents_of(os.getpid())[0], signal.SIGKILL)
            await guest.died()
            assert "ramferry" not in "".join(groups(pid))
            assert stands(pid)
        finally:
            await guest.quit()

    with busy(directory) as process:
        run(scenario(process.pid))


def test_undoing_a_process_that_has_ended_does_nothing(directory: Path) -> None:
    with busy(directory) as process:
        undoing = Undoing(process.pid)
        process.kill()
        process.wait()
        undoing.undo(stops=True)
        undoing.close()


@pytest.mark.guest
@needs_qemu
def test_auto_converge_brings_a_fast_guest_to_its_end() -> None:
    """Which would not end by itself: it dirties its memory faster than the link carries."""

    async def scenario(source: str, destination: str) -> engine.Statistics:
        settings = ["auto-converge=on", "cpu-throttle-initial=99"]
        here = engine.Control.start(source, settings=settings)
        there = engine.Control.start(destination, "tcp:127.0.0.1:0")
        async with here, there:
            migration = await here.migrate(there, max_bandwidth=64 * 2**20, downtime_limit=300)
            return await migration.result()

    with pair(mib=32) as (source, destination):
        result = asyncio.run(scenario(source.spec, destination.spec))

        assert result.raw["x-throttle"] in [each.value for each in Way]
        assert destination.goes_on()
        assert "ramferry" not in "".join(groups(source.pid))
