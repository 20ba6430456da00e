"""Every QMP command, a module for each subject; `build_registry` gathers them.

A module has `register(registry, process)`: it adds its commands, and nothing else.
"""

from __future__ import annotations

from engine.control.process import ControlProcess
from engine.control.qmp.commands import (
    absent,
    connections,
    descriptors,
    dirtying,
    extensions,
    general,
    jobs,
    migration,
    objects,
    settings,
)
from engine.control.qmp.registry import CommandRegistry

SUBJECTS = (
    general,
    migration,
    settings,
    dirtying,
    connections,
    descriptors,
    objects,
    jobs,
    absent,
    extensions,
)


def build_registry(process: ControlProcess) -> CommandRegistry:
    """The table of commands; `qmp_capabilities` belongs to the session."""
    registry = CommandRegistry()
    for subject in SUBJECTS:
        subject.register(registry, process)
    return registry


__all__ = ["build_registry"]
