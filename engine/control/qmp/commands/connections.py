"""The migration's connections and workers, seen and cut from outside: `yank` and the like."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final

from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError
from engine.control.qmp.visitor import Union

MIGRATION: Final = {"type": "migration"}


class YankInstanceType(enum.Enum):
    """QAPI YankInstanceType; only a migration can be yanked here."""

    BLOCK_NODE = "block-node"
    CHARDEV = "chardev"
    MIGRATION = "migration"


class BlockNode(Arguments, frozen=True):
    """QAPI YankInstanceBlockNode; there are none here."""

    node_name: str


class Chardev(Arguments, frozen=True):
    """QAPI YankInstanceChardev; there are none here."""

    id: str


class Nothing(Arguments, frozen=True):
    """The migration needs no further name."""


YANK_INSTANCE: Final = Union(
    "type", {"block-node": BlockNode, "chardev": Chardev, "migration": Nothing}
)
YankInstance = Annotated[dict[str, Any], YANK_INSTANCE]


class Yank(Arguments, frozen=True):
    """All of them, or none."""

    instances: list[YankInstance]


class AnnounceSelf(Arguments, frozen=True):
    """Milliseconds and a count; which interfaces, and an id to change a running announcement."""

    initial: int
    max: int
    rounds: int
    step: int
    interfaces: list[str] | None = None
    id: str | None = None


class MigrationThreadInfo(Arguments, frozen=True):
    """One worker; `thread-id` is that of its process's first thread."""

    name: str
    thread_id: int


class Connections:
    """Handlers; the control process does the work."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

    async def yank(self, asked: Yank) -> None:
        for instance in asked.instances:
            if instance != MIGRATION or not self._process.can_be_yanked:
                raise QmpError("Instance not found", "DeviceNotFound")
        if asked.instances:
            self._process.yank()

    async def query_yank(self, _: object) -> object:
        return [MIGRATION] if self._process.can_be_yanked else []

    async def query_migrationthreads(self, _: object) -> object:
        return [{"name": name, "thread-id": pid} for name, pid in self._process.migration_workers()]

    async def announce_self(self, _: AnnounceSelf) -> None:
        """No network interface belongs to a guest here, so nothing has to be announced."""


def register(registry: CommandRegistry, process: ControlProcess) -> None:
    """Add this subject's commands."""
    commands = Connections(process)
    registry.add("yank", commands.yank, Yank, oob=True)
    registry.add("query-yank", commands.query_yank, oob=True, returns=list[YankInstance])
    registry.add(
        "query-migrationthreads",
        commands.query_migrationthreads,
        returns=list[MigrationThreadInfo],
        features=("deprecated",),
    )
    registry.add("announce-self", commands.announce_self, AnnounceSelf)
