"""What every monitor has: version, introspection, run state."""

from __future__ import annotations

from typing import Final

from engine.control.process import ControlProcess
from engine.control.qmp.answers import (
    EVENTS,
    NamedInfo,
    NameInfo,
    StatusInfo,
    UuidInfo,
    VersionInfo,
)
from engine.control.qmp.registry import CommandRegistry
from engine.control.qmp.schema import build_schema
from engine.control.qmp.server import VERSION
from engine.control.status import RunState

NO_UUID: Final = "00000000-0000-0000-0000-000000000000"  #: QEMU's without -uuid


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

    async def query_qmp_schema(self, _: object) -> object:
        return build_schema(self._registry)

    async def query_name(self, _: object) -> object:
        """A guest here has no name, as a QEMU without -name has none."""
        return {}

    async def query_uuid(self, _: object) -> object:
        return {"UUID": self._process.uuid or NO_UUID}

    async def query_status(self, _: object) -> object:
        state = self._process.run_state
        return {"running": state is RunState.RUNNING, "status": state.value}

    async def stop(self, _: object) -> None:
        await self._process.stop()

    async def cont(self, _: object) -> None:
        await self._process.cont()

    async def system_wakeup(self, _: object) -> None:
        await self._process.sleep(False)

    async def quit(self, _: object) -> None:
        self._process.quit()


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = General(process, registry)
    registry.add("query-version", commands.query_version, is_immediate=True, returns=VersionInfo)
    registry.add(
        "query-commands", commands.query_commands, is_immediate=True, returns=list[NamedInfo]
    )
    registry.add("query-events", commands.query_events, is_immediate=True, returns=list[NamedInfo])
    registry.add("query-qmp-schema", commands.query_qmp_schema)
    registry.add("query-name", commands.query_name, is_immediate=True, returns=NameInfo)
    registry.add("query-uuid", commands.query_uuid, is_immediate=True, returns=UuidInfo)
    registry.add("query-status", commands.query_status, is_immediate=True, returns=StatusInfo)
    registry.add("stop", commands.stop)
    registry.add("cont", commands.cont)
    registry.add("system_wakeup", commands.system_wakeup)
    registry.add("quit", commands.quit)
