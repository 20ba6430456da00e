"""CPU quotas for single threads of a process that others have started, by control groups.

Each thread gets a group of its own below the one that it is in, and goes back from there. Nothing
of the groups that were there is changed, and the names of ours say whose they are: whoever knows
the process's id can undo all of it, so the death of who made them is survived.

Version 1: `cpu.cfs_quota_us` (Documentation/scheduler/sched-bwc.rst). Version 2: `cpu.max` of a
*threaded* group (Documentation/admin-guide/cgroup-v2.rst), for which `cpu` is switched on in the
group above, and off again. That would change how groups of others that are below it, too, share
their time: with such there are no quotas, and for those that have come meanwhile it stays on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.errors import MemoryRefused

PERIOD_US: Final = 10_000
QUOTA_US_MIN: Final = 1_000  #: the kernel's
THREADS_MAX: Final = 256  #: so many groups are made at most
UNDO_ATTEMPTS: Final = 5  #: threads that are born meanwhile are in the group of their parent
SWITCHED_ON: Final = "-cpu"  #: ends the names of groups for which `cpu` was switched on above


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where the groups of this machine that know quotas are.

    :ivar root: the group that `mount` shows."""

    version: int
    root: str
    mount: Path

    @property
    def threads_file(self) -> str:
        return "tasks" if self.version == 1 else "cgroup.threads"

    def group_of(self, pid: int, thread: int) -> Path | None:
        """The group that a thread is in; None: it is not to be seen from here, or has ended."""
        try:
            lines = Path(f"/proc/{pid}/task/{thread}/cgroup").read_text().splitlines()
        except OSError:
            return None
        for line in lines:
            number, controllers, group = line.split(":", 2)
            is_here = number == "0" if self.version == 2 else "cpu" in controllers.split(",")
            if is_here and (group + "/").startswith(self.root.rstrip("/") + "/"):
                return self.mount / group[len(self.root.rstrip("/")) :].lstrip("/")
        return None


def find_hierarchy(mountinfo: str = "/proc/self/mountinfo") -> Hierarchy | None:
    """The mounted hierarchy that has the CPU controller; None: there is none."""
    for line in Path(mountinfo).read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup" and "cpu" in options.split(","):
            return Hierarchy(1, root, Path(mount))
        if kind == "cgroup2":
            with contextlib.suppress(OSError):
                if "cpu" in (Path(mount) / "cgroup.controllers").read_text().split():
                    return Hierarchy(2, root, Path(mount))
    return None


def threads_of(pid: int) -> list[int]:
    """:raise OSError: the process has ended."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


class ThreadQuotas:
    """Quotas of threads of one process. Whoever knows its id may make another of these and undo
    what the first has done."""

    def __init__(self, pid: int, hierarchy: Hierarchy) -> None:
        """:raise MemoryRefused: no group of the process is to be seen from here."""
        self._pid, self._hierarchy = pid, hierarchy
        self._above: set[Path] = set()  #: groups below which there may be some of ours
        self._look()
        if not self._above:
            raise MemoryRefused(f"process {pid} is in no control group that can be seen")

    @property
    def version(self) -> int:
        """Of control groups."""
        return self._hierarchy.version

    @property
    def _prefix(self) -> str:
        return f"ramferry-{self._pid}-"

    def _look(self) -> None:
        """Find the groups that the threads are in, or were in before they came into ours."""
        with contextlib.suppress(OSError):
            for thread in threads_of(self._pid):
                if (group := self._hierarchy.group_of(self._pid, thread)) is not None:
                    is_ours = group.name.startswith(self._prefix)
                    self._above.add(group.parent if is_ours else group)

    def limit(self, threads: Iterable[int], percent: int) -> None:
        """Take so much of their time away from each, 1 to 99 percent; also if it was another part
        before.

        :raise OSError: the kernel refuses; `undo` what may have been done."""
        for thread in threads:
            group = self._hierarchy.group_of(self._pid, thread)
            if group is None:  # it has ended
                continue
            if not group.name.startswith(self._prefix):
                group = self._make(group, thread)
                (group / self._hierarchy.threads_file).write_text(str(thread))
            self._set(group, percent)

    def _make(self, above: Path, thread: int) -> Path:
        """A group for a thread, with no quota yet."""
        self._above.add(above)
        if self._hierarchy.version == 1:
            group = above / f"{self._prefix}{thread}"
            group.mkdir(exist_ok=True)
            return group
        control = above / "cgroup.subtree_control"
        is_on = "cpu" in control.read_text().split()
        if not is_on and self._has_others(above):
            raise OSError(f"other groups below {above} would share its CPU time in another way")
        group = above / f"{self._prefix}{thread}{'' if is_on else SWITCHED_ON}"
        group.mkdir(exist_ok=True)
        (group / "cgroup.type").write_text("threaded")
        if not is_on:
            control.write_text("+cpu")
        return group

    def _set(self, group: Path, percent: int) -> None:
        left = 100 - percent
        period_us = max(PERIOD_US, QUOTA_US_MIN * 100 // left)
        quota_us = max(QUOTA_US_MIN, period_us * left // 100)
        if self._hierarchy.version == 2:
            (group / "cpu.max").write_text(f"{quota_us} {period_us}")
            return
        (group / "cpu.cfs_quota_us").write_text("-1")  # so that period and quota fit at any time
        (group / "cpu.cfs_period_us").write_text(str(period_us))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))

    def relax(self) -> None:
        """No quota, until the next `limit`: much sooner than `undo`, which waits for all CPUs.

        :raise OSError: the kernel refuses."""
        name, text = ("cpu.max", "max") if self.version == 2 else ("cpu.cfs_quota_us", "-1")
        for group in self._ours():
            (group / name).write_text(text)

    def _ours(self) -> list[Path]:
        return [
            each
            for above in self._above
            for each in above.glob(f"{self._prefix}*")
            if each.is_dir()
        ]

    def _has_others(self, above: Path) -> bool:
        """Whether groups that are not ours are below it."""
        return any(
            each.is_dir() and not each.name.startswith(self._prefix) for each in above.iterdir()
        )

    def undo(self) -> None:
        """Every thread back to where it was, and no group of ours any more. Idempotent.

        :raise OSError: not all could be undone; the kernel says why."""
        self._look()
        ours, failures = self._ours(), list[OSError]()
        for group in ours:
            try:
                self._remove(group)
            except OSError as exc:  # the others are freed in any case
                failures.append(exc)
        for above in {each.parent for each in ours if each.name.endswith(SWITCHED_ON)}:
            with contextlib.suppress(OSError):  # the group has gone
                if not self._has_others(above):  # who came meanwhile may count on it
                    (above / "cgroup.subtree_control").write_text("-cpu")
        if failures:
            raise failures[0]

    def _remove(self, group: Path) -> None:
        for attempts_left in reversed(range(UNDO_ATTEMPTS)):
            try:
                for thread in (group / self._hierarchy.threads_file).read_text().split():
                    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                        (group.parent / self._hierarchy.threads_file).write_text(thread)
                group.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if not attempts_left:
                    raise
            else:
                return
