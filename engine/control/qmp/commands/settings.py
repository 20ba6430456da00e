"""Parameters and capabilities, and the old commands for single parameters."""

from __future__ import annotations

import enum
import logging
from typing import Any, Final

from engine.control.capabilities import CAPABILITIES
from engine.control.parameter_table import BY_NAME, OLD_COMMANDS, OldCommand
from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, Handler, NoArguments
from engine.errors import UsageError

log = logging.getLogger("ramferry.control")

DOWNTIME_MAX_S: Final = BY_NAME["downtime-limit"].high // 1000


class CapabilityName(enum.Enum):
    """QAPI MigrationCapability; the members are the table's."""

    vars().update({one.name: one.name for one in CAPABILITIES})


class CapabilityStatus(Arguments, frozen=True):
    """QAPI MigrationCapabilityStatus."""

    capability: CapabilityName
    state: bool


class SetCapabilities(Arguments, frozen=True):
    """`migrate-set-capabilities`."""

    capabilities: list[CapabilityStatus]


class SetInteger(Arguments, frozen=True):
    """`migrate_set_speed` (bytes/second), `migrate-set-cache-size` (bytes)."""

    value: int


class SetSeconds(Arguments, frozen=True):
    """`migrate_set_downtime`."""

    value: float


class Settings:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

    async def set_capabilities(self, arguments: SetCapabilities) -> None:
        """Of two entries for one capability the later counts, as in QEMU."""
        self._process.set_capabilities(
            {one.capability.value: one.state for one in arguments.capabilities}
        )

    async def query_capabilities(self, _: object) -> object:
        return self._process.capabilities.query()

    async def set_parameters(self, arguments: dict[str, Any]) -> None:
        self._process.store.set(arguments)

    async def query_parameters(self, _: object) -> object:
        return self._process.parameters.as_dict()

    async def set_speed(self, arguments: SetInteger) -> None:
        self._process.store.set({"max-bandwidth": arguments.value})

    async def set_downtime(self, arguments: SetSeconds) -> None:
        """Seconds, cut to whole milliseconds as QEMU 5.2 did.

        :raise UsageError: its text for what is out of range; nothing was changed."""
        if not 0 <= arguments.value <= DOWNTIME_MAX_S:
            raise UsageError(
                "Parameter 'downtime_limit' expects an integer in the range of "
                f"0 to {DOWNTIME_MAX_S} seconds"
            )
        self._process.store.set({"downtime-limit": int(arguments.value * 1000)})

    async def set_cache_size(self, arguments: SetInteger) -> None:
        self._process.store.set({"xbzrle-cache-size": arguments.value})

    async def query_cache_size(self, _: object) -> object:
        return self._process.parameters.xbzrle_cache_size


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Settings(process)
    registry.add("migrate-set-capabilities", commands.set_capabilities, SetCapabilities)
    registry.add("query-migrate-capabilities", commands.query_capabilities, is_immediate=True)
    registry.add("migrate-set-parameters", commands.set_parameters, None)
    registry.add("query-migrate-parameters", commands.query_parameters, is_immediate=True)
    old: dict[str, tuple[Handler, type[Arguments]]] = {
        "migrate_set_speed": (commands.set_speed, SetInteger),
        "migrate_set_downtime": (commands.set_downtime, SetSeconds),
        "migrate-set-cache-size": (commands.set_cache_size, SetInteger),
        "query-migrate-cache-size": (commands.query_cache_size, NoArguments),
    }
    for command in OLD_COMMANDS:
        handler, arguments = old[command.name]
        registry.add(command.name, _warning(command, handler), arguments, features=("deprecated",))


def _warning(command: OldCommand, handler: Handler) -> Handler:
    """The handler, after a line in the log."""

    async def warn(arguments: Any) -> object:
        log.warning("%s is deprecated; instead: %s", command.name, command.deprecated)
        return await handler(arguments)

    return warn
