"""The migration itself: begin, end, look."""

from __future__ import annotations

from engine.control import views
from engine.control.process import ControlProcess
from engine.control.qmp.commands.channels import Channel, as_objects
from engine.control.qmp.monitor import current_monitor
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.control.status import Status
from engine.control.streams.opening import no_names
from engine.control.uri import parse_destination, parse_migrate_target


class Migrate(Arguments, frozen=True):
    """`detach` is accepted and ignored, as in QEMU 10.0."""

    uri: str | None = None
    channels: list[Channel] | None = None
    resume: bool = False
    detach: bool = False


class MigrateIncoming(Arguments, frozen=True):
    """`exit-on-error`: the process ends with status 1 when the migration fails."""

    uri: str | None = None
    channels: list[Channel] | None = None
    exit_on_error: bool = True


class MigrateRecover(Arguments, frozen=True):
    """Where the destination listens for the source that comes back."""

    uri: str


class MigrateContinue(Arguments, frozen=True):
    """The status that the client believes the migration is in."""

    state: Status


class Migration:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

    async def migrate(self, arguments: Migrate) -> None:
        address = parse_destination(arguments.uri, as_objects(arguments.channels))
        await self._process.migrate(address, arguments.resume, _taken)

    async def migrate_incoming(self, arguments: MigrateIncoming) -> None:
        self._process.check_incoming()
        if arguments.channels is not None and len(arguments.channels) > 1:
            raise QmpError("Channel list must have only one entry, for type 'main'")
        address = parse_migrate_target(arguments.uri, as_objects(arguments.channels))
        await self._process.migrate_incoming(address, arguments.exit_on_error, _taken)

    async def migrate_continue(self, arguments: MigrateContinue) -> None:
        await self._process.migrate_continue(arguments.state)

    async def migrate_cancel(self, _: object) -> None:
        await self._process.cancel()

    async def migrate_start_postcopy(self, _: object) -> None:
        self._process.postcopy.start()

    async def migrate_pause(self, _: object) -> None:
        self._process.postcopy.pause()

    async def migrate_recover(self, arguments: MigrateRecover) -> None:
        self._process.postcopy.recover(lambda: parse_migrate_target(arguments.uri, None))

    async def query_migrate(self, _: object) -> object:
        process = self._process
        reasons = process.blockers.reasons()
        info = views.migration_info(process.outgoing, process.incoming, reasons)
        return info | ({"x-handover": "unknown"} if process.inherits_unknown else {})


def _taken(name: str) -> int:
    """The descriptor that this client gave the name, which it then has not any more, as in QEMU.

    :raise UsageError: there is none."""
    monitor = current_monitor.get()
    if monitor is None or name not in monitor.named:
        return no_names(name)
    return monitor.named.pop(name)


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Migration(process)
    registry.add("migrate", commands.migrate, Migrate)
    registry.add("migrate-incoming", commands.migrate_incoming, MigrateIncoming)
    registry.add("migrate_cancel", commands.migrate_cancel)
    registry.add("migrate-continue", commands.migrate_continue, MigrateContinue)
    registry.add("migrate-start-postcopy", commands.migrate_start_postcopy)
    registry.add("migrate-pause", commands.migrate_pause, oob=True)
    registry.add("migrate-recover", commands.migrate_recover, MigrateRecover, oob=True)
    registry.add("query-migrate", commands.query_migrate, is_immediate=True)
