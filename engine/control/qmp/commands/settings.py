"""Parameters and capabilities."""

from __future__ import annotations

from typing import Any

from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.errors import shown


class SetCapabilities(Arguments, frozen=True):
    """A list of {"capability", "state"}."""

    capabilities: list[dict[str, Any]]


class Settings:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

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


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Settings(process)
    registry.add("migrate-set-capabilities", commands.set_capabilities, SetCapabilities)
    registry.add("query-migrate-capabilities", commands.query_capabilities)
    registry.add("migrate-set-parameters", commands.set_parameters, None)
    registry.add("query-migrate-parameters", commands.query_parameters)
