"""Commands: name, arguments, handler. Arguments are checked here, with QEMU's texts."""

from __future__ import annotations

import types
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from engine.errors import MigrationError, shown


class QmpError(MigrationError):
    """An answer of the shape {"error": {"class", "desc"}}."""

    def __init__(self, description: str, class_: str = "GenericError") -> None:
        super().__init__(description, class_)
        self.class_ = class_

    def __str__(self) -> str:
        return str(self.args[0])


class Arguments(msgspec.Struct, frozen=True, rename=lambda name: name.replace("_", "-")):
    """Base of a command's arguments: fields without default are required, others may be absent."""


class NoArguments(Arguments, frozen=True):
    """For commands that take none."""


Handler = Callable[[Any], Awaitable[object]]
_WORDS: Final = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    :ivar arguments: None: the handler gets the object as it came, and checks it.
    :ivar oob: it may overtake others with exec-oob.
    :ivar is_asynchronous: the client's next command does not wait for the end of this one."""

    name: str
    arguments: type[Arguments] | None
    handler: Handler
    oob: bool = False
    is_asynchronous: bool = False


class CommandRegistry:
    """All commands by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def add(
        self,
        name: str,
        handler: Handler,
        arguments: type[Arguments] | None = NoArguments,
        *,
        oob: bool = False,
        is_asynchronous: bool = False,
    ) -> None:
        assert name not in self._commands, name
        self._commands[name] = Command(name, arguments, handler, oob, is_asynchronous)

    def names(self) -> list[str]:
        return list(self._commands)

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
        command = self.find(name)
        answer = await command.handler(parse_arguments(command.arguments, given))
        return {} if answer is None else answer


def parse_arguments(type_: type[Arguments] | None, given: Mapping[str, Any]) -> Any:
    """Check and convert.

    :raise QmpError: missing, unexpected, or of a wrong type, with QEMU's text."""
    if type_ is None:
        return given
    values: dict[str, Any] = {}
    fields = {field.encode_name: field for field in msgspec.structs.fields(type_)}
    for name, field in fields.items():
        if name not in given:
            if field.required:
                raise QmpError(f"Parameter '{name}' is missing")
            continue
        try:
            values[field.name] = msgspec.convert(given[name], field.type)
        except msgspec.ValidationError as exc:
            raise QmpError(
                f"Invalid parameter type for '{name}', expected: {_word(field.type)}"
            ) from exc
    for name in given:
        if name not in fields:
            raise QmpError(f"Parameter '{shown(name)}' is unexpected")
    return type_(**values)


def _word(type_: Any) -> str:
    """QAPI's word for a JSON type."""
    if isinstance(type_, types.UnionType):
        type_ = next(part for part in typing.get_args(type_) if part is not type(None))
    return _WORDS.get(typing.get_origin(type_) or type_, "object")
