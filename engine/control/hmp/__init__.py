"""The human monitor: QEMU's HMP as a thin translation to QMP's commands, and a printer of answers.

A line goes reader -> table (which command) -> parser (its arguments) -> a handler, which calls
QMP's command through the registry and prints what it answers. `server` brings lines from sockets,
`qmp` from QMP's human-monitor-command.
"""

from engine.control.hmp.commands import build_monitor
from engine.control.hmp.qmp import register
from engine.control.hmp.server import HmpServer

__all__ = ["HmpServer", "build_monitor", "register"]
