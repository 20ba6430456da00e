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
from engine.control.stall import STALL_NEEDS_POSTCOPY, OnStall
from engine.control.status import POSTCOPY, Status
from engine.control.uri import Address, Target, cannot_listen
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

    @property
    def has_given_away(self) -> bool:
        """The guest is at the destination, or may be, which still lacks pages."""
        outgoing = self._process.outgoing
        return outgoing is not None and outgoing.status in POSTCOPY

    @property
    def lacks_pages(self) -> bool:
        """The guest runs here and waits for pages of a source."""
        incoming = self._process.incoming
        return incoming is not None and incoming.status in POSTCOPY

    def check_stall(self, address: Target) -> None:
        """:raise UsageError: `x-on-stall` wants what this migration cannot do."""
        if self._process.parameters.x_on_stall != OnStall.POSTCOPY.value:
            return
        if not self._process.capability("postcopy-ram"):
            raise UsageError(STALL_NEEDS_POSTCOPY)
        if not isinstance(address, Address):
            raise UsageError("x-on-stall=postcopy needs channels (tcp: or unix:), not one stream")

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
        if incoming is None or not incoming.may_recover:
            raise UsageError("Migrate recover can only be run when postcopy is paused.")
        address = parse()
        if not isinstance(address, Address):
            raise UsageError(ONLY_CHANNELS)
        try:
            incoming.recover(address)
        except OSError as exc:
            raise UsageError(cannot_listen(address, exc)) from exc

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
