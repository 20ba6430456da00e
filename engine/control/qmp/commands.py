"""Every QMP command, in terms of the control process."""

from __future__ import annotations

from typing import Any, Final

from engine.control import views
from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.control.qmp.server import VERSION
from engine.control.status import RunState
from engine.control.uri import parse_destination, parse_migrate_target
from engine.errors import shown
from engine.guest.workload import WorkloadGuest

EVENTS: Final = ("MIGRATION", "MIGRATION_PASS", "RESUME", "STOP")


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


class SetCapabilities(Arguments, frozen=True):
    """A list of {"capability", "state"}."""

    capabilities: list[dict[str, Any]]


class Commands:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess, registry: CommandRegistry) -> None:
        self._process, self._registry = process, registry

    async def query_version(self, _: object) -> object:
        return VERSION

    async def query_commands(self, _: object) -> object:
        return [{"name": name} for name in ("qmp_capabilities", *self._registry.names())]

    async def query_events(self, _: object) -> object:
        return [{"name": name} for name in EVENTS]

    async def query_status(self, _: object) -> object:
        state = self._process.run_state
        return {"running": state is RunState.RUNNING, "status": state.value}

    async def stop(self, _: object) -> None:
        await self._process.stop()

    async def cont(self, _: object) -> None:
        await self._process.cont()

    async def quit(self, _: object) -> None:
        self._process.quit()

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

    async def set_capabilities(self, arguments: SetCapabilities) -> None:
        changes = {}
        for entry in arguments.capabilities:
            for member, type_, word in (("capability", str, "string"), ("state", bool, "boolean")):
                if member not in entry:
                    raise QmpError(f"Parameter '{member}' is missing")
                if not isinstance(entry[member], type_):
                    raise QmpError(f"Invalid parameter type for '{member}', expected: {word}")
            for member in entry:
                if member not in ("capability", "state"):
                    raise QmpError(f"Parameter '{shown(member)}' is unexpected")
            changes[entry["capability"]] = entry["state"]
        self._process.set_capabilities(changes)

    async def query_capabilities(self, _: object) -> object:
        return self._process.capabilities.query()

    async def set_parameters(self, arguments: dict[str, Any]) -> None:
        self._process.store.set(arguments)

    async def query_parameters(self, _: object) -> object:
        return self._process.parameters.as_dict()

    async def query_guest(self, _: object) -> object:
        guest, tracker = self._process.guest, self._process.tracker
        return {
            "kind": guest.kind,
            "pid": guest.pid if isinstance(guest, WorkloadGuest) else None,
            "running": guest.is_running,
            "writes": await guest.writes(),
            "tracker": tracker[0],
            "tracker-reason": tracker[1],
            "blocks": [
                {
                    "name": block.name,
                    "size": block.size,
                    "backing-page-size": block.backing_page_size,
                    "allocated": block.allocated_bytes(),
                }
                for block in guest.blocks
            ],
        }

    async def judge(self, _: object) -> object:
        guest = self._process.guest
        if not isinstance(guest, WorkloadGuest):
            raise QmpError(f"a guest of kind '{guest.kind}' cannot judge its pages; workload can")
        judgement = await self._process.judge(guest)
        return {
            "wrong-pages": judgement.wrong_pages,
            "first-wrong": judgement.first_wrong,
            "page-writes": judgement.page_writes_sum,
            "vcpu-writes": judgement.vcpu_writes_sum,
            "pages": judgement.page_count,
            "counters-path": self._process.path_of(judgement.counters_fd),
        }


def build_registry(process: ControlProcess) -> CommandRegistry:
    """The table of commands; `qmp_capabilities` belongs to the session."""
    registry = CommandRegistry()
    commands = Commands(process, registry)
    registry.add("query-version", commands.query_version)
    registry.add("query-commands", commands.query_commands)
    registry.add("query-events", commands.query_events)
    registry.add("query-status", commands.query_status)
    registry.add("stop", commands.stop)
    registry.add("cont", commands.cont)
    registry.add("quit", commands.quit)
    registry.add("migrate", commands.migrate, Migrate)
    registry.add("migrate-incoming", commands.migrate_incoming, MigrateIncoming)
    registry.add("migrate_cancel", commands.migrate_cancel)
    registry.add("query-migrate", commands.query_migrate)
    registry.add("migrate-set-capabilities", commands.set_capabilities, SetCapabilities)
    registry.add("query-migrate-capabilities", commands.query_capabilities)
    registry.add("migrate-set-parameters", commands.set_parameters, None)
    registry.add("query-migrate-parameters", commands.query_parameters)
    registry.add("x-query-guest", commands.query_guest)
    registry.add("x-judge", commands.judge)
    return registry
