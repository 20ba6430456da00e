"""ramferry: live migration of RAM, outside the VMM.

    import engine
    async with engine.Control.start("workload:size=256M") as source: ...

The names below are imported on first use: worker processes need none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import Control, Migration, MigrationFailed, Statistics, verify
    from engine.control.status import Status
    from engine.errors import MigrationError, OutcomeUnknown, UsageError
    from engine.guest.judgement import Verdict

__all__ = [
    "Control",
    "Migration",
    "MigrationError",
    "MigrationFailed",
    "OutcomeUnknown",
    "Statistics",
    "Status",
    "UsageError",
    "Verdict",
    "verify",
]

_HOMES = {
    "MigrationError": "engine.errors",
    "OutcomeUnknown": "engine.errors",
    "UsageError": "engine.errors",
    "Status": "engine.control.status",
    "Verdict": "engine.guest.judgement",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "engine.api")), name)
