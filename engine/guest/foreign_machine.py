"""What the agent of a process that others have started drives."""

from __future__ import annotations

from typing import Protocol

from engine.guest.foreign import ForeignBlock
from engine.guest.foreign_tracking import ForeignTracker
from engine.memory.tracking import TrackerName


class ForeignMachine(Protocol):
    """What an agent drives: a guest in a process that others have started. No event loop; all but
    `resume` may take long. All raise MigrationError when it cannot be done."""

    kind: str  #: as in `--guest`
    qmp_path: str  #: of a QEMU's socket, else empty
    pid: int
    blocks: list[ForeignBlock]
    is_running: bool  #: as of the last look or order

    @property
    def what(self) -> str:
        """The process, as people are told of it."""
        ...

    def looks_running(self) -> bool:
        """Look whether it runs: others than we may have stopped or continued it."""
        ...

    def pause(self) -> int:
        """Stop it; return the monotonic time (ns) when all stood."""
        ...

    def resume(self) -> None:
        """Have it run, without waiting: that happens whatever becomes of this process."""
        ...

    def vcpus(self) -> list[int]:
        """Threads that a throttle is meant for, as of now."""
        ...

    def confirm(self) -> None:
        """Wait for what became of the last `resume`, if there was one."""
        ...

    def save(self) -> tuple[int, int]:
        """Device state of the stopped guest: a memfd, the caller's, and its size."""
        ...

    def load(self, state_fd: int, size: int) -> None:
        """Take a device state over: the guest is whole then, and stands."""
        ...

    def check_all_wait(self) -> None:
        """Look whether whoever touches a missing page would wait for it.

        :raise MemoryRefused: other processes would not."""
        ...

    def count_vcpus(self) -> int:
        """Threads that must wait for "all wait"; 0: nobody can say."""
        ...

    def start_tracking(self, wanted: TrackerName | None) -> list[ForeignTracker]:
        """Begin to track each process that writes; the first one's maps all of the memory. The
        trackers stay ours."""
        ...

    def stop_tracking(self) -> None:
        """Track no more. Idempotent."""
        ...

    def check_sharers(self, besides: frozenset[int]) -> None:
        """Look who else maps the memory; slow, for a guest that runs.

        :param besides: processes that may, for they only read.
        :raise MemoryRefused: somebody may write what is not seen."""
        ...

    def end(self) -> None:
        """Have what waits give up soon."""
        ...

    def close(self) -> None:
        """Let it be; nothing may run in another thread any more."""
        ...
