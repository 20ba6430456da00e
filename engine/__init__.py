"""ramferry: live migration of RAM, outside the VMM.

    import engine
    async with engine.Control.start("workload:size=256M") as source: ...

The names below are imported on first use: worker processes need none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import Control, Migration, MigrationFailed, Statistics, verify
    from engine.control.notifiers import Change, Moment, Side
    from engine.control.status import Status
    from engine.control.uri import parse_uri
    from engine.errors import MigrationError, OutcomeUnknown, UsageError
    from engine.guest.judgement import Verdict
    from engine.hosting import hosted

__all__ = [
    "Change",
    "Control",
    "Migration",
    "MigrationError",
    "MigrationFailed",
    "Moment",
    "OutcomeUnknown",
    "Side",
    "Statistics",
    "Status",
    "UsageError",
    "Verdict",
    "hosted",
    "parse_uri",
    "verify",
]

_HOMES = {
    "Change": "engine.control.notifiers",
    "Moment": "engine.control.notifiers",
    "Side": "engine.control.notifiers",
    "hosted": "engine.hosting",
    "parse_uri": "engine.control.uri",
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
