"""The migration itself: begin, end, look."""

from __future__ import annotations

from typing import Any

from engine.control import views
from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.control.uri import parse_destination, parse_migrate_target


class Migrate(Arguments, frozen=True):
    """`detach` is accepted and ignored, as in QEMU 10.0."""

    uri: str | None = None
    channels: list[dict[str, Any]] | None = None
    resume: bool = False
    detach: bool = False


class MigrateIncoming(Arguments, frozen=True):
    """`exit-on-error`: the process ends with status 1 when the migration fails."""

    uri: str | None = None
    channels: list[dict[str, Any]] | None = None
    exit_on_error: bool = True


class Migration:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

    async def migrate(self, arguments: Migrate) -> None:
        address = parse_destination(arguments.uri, arguments.channels)
        await self._process.migrate(address, arguments.resume)

    async def migrate_incoming(self, arguments: MigrateIncoming) -> None:
        if arguments.channels is not None and len(arguments.channels) > 1:
            raise QmpError("Channel list must have only one entry, for type 'main'")
        address = parse_migrate_target(arguments.uri, arguments.channels)
        await self._process.migrate_incoming(address, arguments.exit_on_error)

    async def migrate_cancel(self, _: object) -> None:
        await self._process.cancel()

    async def query_migrate(self, _: object) -> object:
        return views.migration_info(self._process.outgoing, self._process.incoming)


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Migration(process)
    registry.add("migrate", commands.migrate, Migrate)
    registry.add("migrate-incoming", commands.migrate_incoming, MigrateIncoming)
    registry.add("migrate_cancel", commands.migrate_cancel)
    registry.add("query-migrate", commands.query_migrate)
