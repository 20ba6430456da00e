"""What the commands of the human monitor have in hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.control.hmp.held import Held
from engine.control.qmp.registry import CommandRegistry


@dataclass(frozen=True, slots=True)
class Context:
    """Commands of QMP, which do everything, and what to wait with.

    :ivar is_only_migratable: `--only-migratable`, which no command of QMP tells."""

    registry: CommandRegistry
    held: Held
    is_only_migratable: Callable[[], bool]

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command of QMP; `_` in argument names stands for `-`, and None for an absent one.

        :raise MigrationError: what the command says; one that is not there says so too."""
        given = {
            name.replace("_", "-"): value for name, value in arguments.items() if value is not None
        }
        return await self.registry.call(command, given)
