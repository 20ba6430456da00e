"""What every monitor has: version, introspection, run state."""

from __future__ import annotations

from typing import Final

from engine.control.process import ControlProcess
from engine.control.qmp.registry import CommandRegistry
from engine.control.qmp.server import VERSION
from engine.control.status import RunState

EVENTS: Final = ("MIGRATION", "MIGRATION_PASS", "RESUME", "STOP")


class General:
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


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = General(process, registry)
    registry.add("query-version", commands.query_version)
    registry.add("query-commands", commands.query_commands)
    registry.add("query-events", commands.query_events)
    registry.add("query-status", commands.query_status)
    registry.add("stop", commands.stop)
    registry.add("cont", commands.cont)
    registry.add("quit", commands.quit)
