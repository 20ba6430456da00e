"""What a migration borrows from the control process: guest, settings, workers, events."""

from __future__ import annotations

from typing import Protocol

from engine import wire
from engine.control.dirtylimit import DirtyLimit
from engine.control.notifiers import Notifiers, Side
from engine.control.objects import Objects
from engine.control.parameters import Parameters
from engine.control.pool import Pool
from engine.control.status import RunState
from engine.guest.base import Guest


class Host(Protocol):
    """The control process, as far as a migration may touch it. All of it outlives the migration."""

    @property
    def guest(self) -> Guest: ...
    @property
    def runs_on_arrival(self) -> bool: ...
    @property
    def parameters(self) -> Parameters: ...
    @property
    def senders(self) -> Pool[wire.SenderReport]: ...
    @property
    def receivers(self) -> Pool[wire.ReceiverReport]: ...
    @property
    def pages(self) -> Pool[wire.PagesReport]: ...
    @property
    def faults(self) -> Pool[wire.FaultsReport]: ...

    @property
    def inherits_unknown(self) -> bool:
        """The process before this one was killed, and nobody has said who has the right to run."""
        ...

    @property
    def run_state(self) -> RunState: ...
    @property
    def uuid(self) -> str: ...
    @property
    def dirty_limit(self) -> DirtyLimit: ...
    @property
    def notifiers(self) -> Notifiers: ...
    @property
    def objects(self) -> Objects: ...

    def promise(self, side: Side, session: bytes = b"") -> None:
        """From here on the right to run may move: on record, should we be killed.

        :param session: in postcopy, which can be resumed then."""
        ...

    def postcopy_begins(self, side: Side, session: bytes) -> None:
        """The guest runs at the destination and lacks pages: on record, should we be killed."""
        ...

    def settle(self, side: Side) -> None:
        """It is known again who has it."""
        ...

    def capability(self, name: str) -> bool:
        """Whether the migration capability is on."""
        ...

    def emit(self, event: str, data: dict[str, object] | None = None) -> None:
        """Send a QMP event to whoever listens; never blocks."""
        ...

    def set_run_state(self, state: RunState) -> None:
        """The guest has been stopped or started; emits STOP or RESUME when that changed. RUNNING is
        SUSPENDED of one that sleeps."""
        ...
