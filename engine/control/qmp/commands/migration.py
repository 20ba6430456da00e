"""The migration itself: begin, end, look."""

from __future__ import annotations

import time
from typing import Final

from engine.control import views
from engine.control.process import ControlProcess
from engine.control.qmp.commands.channels import Channel, as_objects
from engine.control.qmp.messages import Shared
from engine.control.qmp.monitor import current_monitor
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.control.status import Status
from engine.control.streams.opening import no_names
from engine.control.uri import parse_destination, parse_migrate_target

#: Counting the dirty pages of 16 GiB takes 50 us, making and encoding the answer 40, and clients
#: poll: 50 of them at 100 Hz ask 25 times within this time.
SHOWN_AGE_NS: Final = 5_000_000


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


class Shown:
    """What `query-migrate` shows: made once for all who ask within SHOWN_AGE_NS, and anew at once
    after a step of a migration, so that nobody sees an older one than an event has told."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process
        self._answer, self._made_ns = Shared(), 0
        self._state: tuple[object, ...] = ()

    def now(self) -> Shared:
        state, now_ns = self._state_now(), time.monotonic_ns()
        if state != self._state or now_ns - self._made_ns >= SHOWN_AGE_NS:
            self._answer, self._made_ns, self._state = self._make(), now_ns, state
        return self._answer

    def _state_now(self) -> tuple[object, ...]:
        """What may not be shown late; everything else is numbers that grow."""
        process, outgoing, incoming = self._process, self._process.outgoing, self._process.incoming
        return (
            process.told_count,
            process.inherits_unknown,
            process.blockers.reasons(),
            outgoing and (outgoing.machine.phase, outgoing.is_outcome_unknown),
            incoming and (incoming.status, incoming.address),
        )

    def _make(self) -> Shared:
        process = self._process
        reasons = process.blockers.reasons()
        info = views.migration_info(process.outgoing, process.incoming, reasons)
        return Shared(info | ({"x-handover": "unknown"} if process.inherits_unknown else {}))


class Migration:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process
        self._shown = Shown(process)

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

    async def query_migrate(self, _: object) -> Shared:
        return self._shown.now()


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
