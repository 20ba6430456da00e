"""Commands: name, arguments, handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.control.qmp.visitor import Arguments, NoArguments, QmpError, Union, parse_arguments
from engine.errors import shown

__all__ = ["Arguments", "Command", "CommandRegistry", "NoArguments", "QmpError", "parse_arguments"]

Handler = Callable[[Any], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    :ivar arguments: None: the handler gets the object as it came, and checks it.
    :ivar oob: it may overtake others with exec-oob.
    :ivar is_immediate: its handler never waits: it is run where it was read, without a task.
    :ivar is_asynchronous: the client's next command does not wait for the end of this one.
    :ivar is_cancellable: an asynchronous one whose handler is cancelled (CancelledError where it
        awaits) when its client leaves: nobody would hear what it has to say.
    :ivar returns: what it answers, for introspection: a type as arguments have them, or None.
    :ivar features: `deprecated` or `unstable`, for introspection."""

    name: str
    arguments: type[Arguments] | Union | None
    handler: Handler
    oob: bool = False
    is_immediate: bool = False
    is_asynchronous: bool = False
    is_cancellable: bool = False
    returns: Any = None
    features: tuple[str, ...] = ()

    async def run(self, given: Mapping[str, Any]) -> object:
        """Check the arguments and execute; an asynchronous one is waited for.

        :raise QmpError: wrong arguments.
        :raise MigrationError: what the command itself says."""
        answer = await self.handler(parse_arguments(self.arguments, given))
        return {} if answer is None else answer


class CommandRegistry:
    """All commands by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def add(
        self,
        name: str,
        handler: Handler,
        arguments: type[Arguments] | Union | None = NoArguments,
        *,
        oob: bool = False,
        is_immediate: bool = False,
        is_asynchronous: bool = False,
        is_cancellable: bool = False,
        returns: Any = None,
        features: tuple[str, ...] = (),
    ) -> None:
        assert name not in self._commands, name
        assert is_asynchronous or not is_cancellable, name
        assert not (is_immediate and is_asynchronous), name
        self._commands[name] = Command(
            name,
            arguments,
            handler,
            oob,
            is_immediate,
            is_asynchronous,
            is_cancellable,
            returns,
            features,
        )

    def names(self) -> list[str]:
        return list(self._commands)

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands.values())

    def find(self, name: str) -> Command:
        """:raise QmpError: CommandNotFound."""
        try:
            return self._commands[name]
        except KeyError:
            raise QmpError(
                f"The command {shown(name)} has not been found", "CommandNotFound"
            ) from None

    async def call(self, name: str, given: Mapping[str, Any]) -> object:
        """Run a command as a client of QMP would; an asynchronous one is waited for.

        :raise QmpError: not found, or wrong arguments.
        :raise MigrationError: what the command itself says."""
        return await self.find(name).run(given)
