"""QMP's human-monitor-command: a line of the human monitor from a client of QMP."""

from __future__ import annotations

from engine.control.hmp.commands import build_monitor
from engine.control.hmp.console import Console
from engine.control.hmp.held import Held
from engine.control.hmp.monitor import HumanMonitor
from engine.control.process import ControlProcess
from engine.control.qmp.registry import Arguments, CommandRegistry, QmpError


class HumanMonitorCommand(Arguments, frozen=True):
    """`cpu-index`: QEMU's commands about one CPU; none here looks at it."""

    command_line: str
    cpu_index: int | None = None


def register(registry: CommandRegistry, process: ControlProcess) -> HumanMonitor:
    """Add human-monitor-command; return the monitor, so that other clients can share it."""
    monitor = build_monitor(
        registry, Held(lambda: process.outgoing), lambda: process.blockers.only_migratable
    )

    async def human_monitor_command(arguments: HumanMonitorCommand) -> object:
        if arguments.cpu_index not in (None, 0):
            raise QmpError("Parameter 'cpu-index' expects a CPU number")
        console = Console(can_wait=False)
        await monitor.run(arguments.command_line, console)
        return console.text

    registry.add("human-monitor-command", human_monitor_command, HumanMonitorCommand, returns=str)
    return monitor
