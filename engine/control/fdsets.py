"""Descriptors that clients handed to the process for good: QEMU's fd sets (monitor/fds.c).

A set holds descriptors of one file, opened in several ways; `/dev/fdset/ID` stands for it. The
process owns them until they are removed or it ends, whichever client brought them.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from typing import Any, Final

from engine.errors import UsageError

FDS_MAX: Final = 256  #: of all sets together


@dataclass(frozen=True, slots=True)
class SetFd:
    """One descriptor, and what its client calls it."""

    fd: int
    opaque: str | None

    def as_dict(self) -> dict[str, Any]:
        named = {} if self.opaque is None else {"opaque": self.opaque}
        return {"fd": self.fd, **named}


@dataclass(slots=True)
class FdSets:
    """All sets of one process, by id; no set is empty."""

    _sets: dict[int, list[SetFd]] = field(default_factory=dict)

    def add(self, fd: int, set_id: int | None, opaque: str | None) -> int:
        """Take a descriptor over, into the set of that id or a new one; return the set's id.

        :raise UsageError: the id is negative, or there are too many; the descriptor is closed."""
        try:
            if set_id is not None and set_id < 0:
                raise UsageError("Parameter 'fdset-id' expects a non-negative value")
            if sum(map(len, self._sets.values())) >= FDS_MAX:
                raise UsageError(f"there are {FDS_MAX} descriptors in fd sets already; remove some")
        except UsageError:
            os.close(fd)
            raise
        if set_id is None:
            set_id = next(free for free in range(FDS_MAX + 1) if free not in self._sets)
        self._sets.setdefault(set_id, []).append(SetFd(fd, opaque))
        return set_id

    def remove(self, set_id: int, fd: int | None) -> None:
        """Close one descriptor of a set, or all of them.

        :raise UsageError: there is no such set or descriptor."""
        fds = self._sets.get(set_id, [])
        gone = [one for one in fds if fd is None or one.fd == fd]
        if not gone:
            which = f"fdset-id:{set_id}" + ("" if fd is None else f", fd:{fd}")
            raise UsageError(f"File descriptor named '{which}' not found")
        left = [one for one in fds if one not in gone]
        if left:
            self._sets[set_id] = left
        else:
            del self._sets[set_id]
        for one in gone:
            os.close(one.fd)

    def duplicate(self, set_id: int, flags: int) -> int:
        """A descriptor of the set that was opened with the access mode of `flags`; the caller's.

        :raise UsageError: there is no such set, or none of its descriptors fits."""
        if set_id not in self._sets:
            raise UsageError(f"Failed to find fdset /dev/fdset/{set_id}")
        for one in self._sets[set_id]:
            mode = fcntl.fcntl(one.fd, fcntl.F_GETFL) & os.O_ACCMODE
            if mode == flags & os.O_ACCMODE:
                return os.dup(one.fd)
        raise UsageError(
            f"/dev/fdset/{set_id} has no descriptor with the access mode that is needed; "
            "give it one with 'add-fd'"
        )

    def query(self) -> list[dict[str, Any]]:
        """QAPI FdsetInfo of each, the highest id first as in QEMU."""
        return [
            {"fdset-id": set_id, "fds": [one.as_dict() for one in fds]}
            for set_id, fds in sorted(self._sets.items(), reverse=True)
        ]

    def close(self) -> None:
        """Close all. Idempotent."""
        for fds in self._sets.values():
            for one in fds:
                os.close(one.fd)
        self._sets.clear()
