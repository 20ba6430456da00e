"""Every command of the human monitor, a module for each subject; `build_monitor` gathers them.

A module has `commands(context)` and `items(context)`: its commands, and its items of `info`.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.control.hmp.commands import dirtyrate, general, meta, migration, settings, snapshots
from engine.control.hmp.context import Context
from engine.control.hmp.held import Held
from engine.control.hmp.monitor import HumanMonitor
from engine.control.hmp.table import CommandTable, HmpCommand
from engine.control.qmp.registry import CommandRegistry

SUBJECTS = (general, migration, settings, dirtyrate, snapshots)


def build_monitor(
    registry: CommandRegistry, held: Held, is_only_migratable: Callable[[], bool] = lambda: False
) -> HumanMonitor:
    """The human monitor over QMP's commands; its clients share it."""
    context = Context(registry, held, is_only_migratable)
    commands: list[HmpCommand] = []
    items: list[HmpCommand] = []
    for subject in SUBJECTS:
        commands += subject.commands(context)
        items += subject.items(context)
    monitor = HumanMonitor(held)
    monitor.table = CommandTable([*commands, *meta.commands(monitor, CommandTable(items))])
    return monitor


__all__ = ["build_monitor"]
