"""What an operator asks of postcopy, on either side; checks in QEMU's words and order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from engine.control import machine
from engine.control.conversation import Conversation
from engine.control.host import Host
from engine.control.incoming import IncomingMigration
from engine.control.notifiers import Side
from engine.control.outgoing import OutgoingMigration
from engine.control.restart import Paused
from engine.control.status import Status
from engine.control.uri import Address, Target
from engine.errors import UsageError

PAUSED_BY_USER: Final = "Postcopy migration is paused by the user"
ONLY_CHANNELS: Final = "Migration requires multi-channel URIs (e.g. tcp)"
PAUSABLE: Final = (Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER)


class Process(Host, Protocol):
    """What it uses of the control process."""

    outgoing: OutgoingMigration | None
    incoming: IncomingMigration | None

    def follow(self, incoming: IncomingMigration) -> None: ...


class PostcopyControl:
    """The control process's commands of postcopy; owns nothing."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def start(self) -> None:
        """QMP `migrate-start-postcopy`.

        :raise UsageError: the capability is off, or no migration has begun.
        :raise MigrationError: the migration goes over a stream."""
        if not self._process.capability("postcopy-ram"):
            raise UsageError(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        if self._process.outgoing is None:
            raise UsageError("Postcopy must be started after migration has been started")
        self._process.outgoing.start_postcopy()

    def pause(self) -> None:
        """QMP `migrate-pause`.

        :raise UsageError: neither side is in postcopy."""
        outgoing, incoming = self._process.outgoing, self._process.incoming
        if outgoing is not None and outgoing.status in PAUSABLE:
            outgoing.handle(machine.Failure(PAUSED_BY_USER))
        elif incoming is not None and incoming.status in PAUSABLE:
            incoming.pause(PAUSED_BY_USER)
        else:
            raise UsageError(
                "migrate-pause is currently only supported during postcopy-active or "
                "postcopy-recover state"
            )

    def recover(self, parse: Callable[[], Target]) -> None:
        """QMP `migrate-recover`: returns when it listens.

        :param parse: gives the address, which QEMU looks at last.
        :raise UsageError: no postcopy is paused here, or it cannot listen there."""
        incoming = self._process.incoming
        if incoming is None or incoming.status is not Status.POSTCOPY_PAUSED:
            raise UsageError("Migrate recover can only be run when postcopy is paused.")
        address = parse()
        if not isinstance(address, Address):
            raise UsageError(ONLY_CHANNELS)
        try:
            incoming.recover(address)
        except OSError as exc:
            raise UsageError(f"Failed to listen on '{address.display}': {exc.strerror}") from exc

    async def resume(self, address: Target) -> None:
        """QMP `migrate` with `resume`.

        :raise UsageError: no postcopy is paused here."""
        outgoing = self._process.outgoing
        if outgoing is None or outgoing.status is not Status.POSTCOPY_PAUSED:
            raise UsageError("Cannot resume if there is no paused migration")
        if self._process.capability("release-ram"):
            raise UsageError("Postcopy recovery cannot work when release-ram capability is set")
        if not isinstance(address, Address):
            raise UsageError(ONLY_CHANNELS)
        await outgoing.suspended()
        outgoing.recover(Conversation(address))

    def take_up(self, paused: Paused) -> None:
        """Go on with what the control process before this one has left, as paused."""
        process = self._process
        if paused.side is Side.SOURCE:
            process.outgoing = OutgoingMigration.paused(process, paused.session)
        else:
            process.follow(IncomingMigration.paused(process, paused.session))
