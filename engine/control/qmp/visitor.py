"""Checks what a client gave against declared types, in QAPI's order and with its texts.

QAPI's input visitor takes the members of an object in the order of their declaration, the first
wrong one decides, and only then it looks for members that nobody declared.
"""

from __future__ import annotations

import enum
import functools
import types
import typing
from collections.abc import Mapping
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
    """Base of a command's arguments and of the objects in them: fields without default are
    required, others may be absent; null is no value."""


class NoArguments(Arguments, frozen=True):
    """For commands that take none."""


@dataclass(frozen=True, slots=True, eq=False)
class Union:
    """A flat union of QAPI, for `Annotated[dict[str, Any], Union(...)]`; its value is a dict.

    :ivar discriminator: the member whose value picks the branch.
    :ivar branches: the further members of each; a branch may itself be a Union.
    """

    discriminator: str
    branches: Mapping[str, type[Arguments] | Union]


@dataclass(frozen=True, slots=True, eq=False)
class Alternate:
    """An alternate of QAPI between a string and an object, for `Annotated[Any, Alternate(...)]`.

    :ivar name: QAPI's, which its text says.
    :ivar object: the members of the object.
    """

    name: str
    object: type[Arguments]


INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
UINT64: Final = "uint64"
UInt64 = typing.Annotated[int, UINT64]


def parse_arguments(type_: type[Arguments] | Union | None, given: Mapping[str, Any]) -> Any:
    """Check and convert; None takes everything as it came.

    :raise QmpError: missing, unexpected, or of a wrong type, with QEMU's text."""
    if type_ is None:
        return given
    if isinstance(type_, Union):
        return _visit_union(type_, given, "")
    return _visit_object(type_, given, "")


def _visit_object(type_: type[Arguments], given: Mapping[str, Any], path: str) -> Any:
    values = _visit_members(type_, given, path)
    _refuse_others(given, {member.name for member in _members(type_)}, path)
    return type_(**values)


def _visit_members(type_: type[Arguments], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The declared members that were given, under the names of their fields."""
    values = {}
    for member in _members(type_):
        name = member.name
        if name in given:
            values[member.field] = visit(member.type, given[name], path + name)
        elif member.is_required:
            raise QmpError(f"Parameter '{path}{name}' is missing")
    return values


@dataclass(frozen=True, slots=True)
class _Member:
    """A declared member: its name for clients, its field here."""

    name: str
    field: str
    type: Any
    is_required: bool


@functools.cache
def _members(type_: type[Arguments]) -> tuple[_Member, ...]:
    """In the order of their declaration. Looked up once: it costs more than all the rest."""
    hints = typing.get_type_hints(type_, include_extras=True)
    return tuple(
        _Member(field.encode_name, field.name, hints[field.name], field.required)
        for field in msgspec.structs.fields(type_)
    )


def _refuse_others(given: Mapping[str, Any], known: set[str], path: str) -> None:
    for name in given:
        if name not in known:
            raise QmpError(f"Parameter '{path}{shown(name)}' is unexpected")


def visit(type_: Any, value: Any, path: str) -> Any:
    """One value.

    :param path: how a text names it, `channels[0].addr`.
    :raise QmpError: it is of a wrong type, or a member of it is."""
    type_ = plain(type_)
    if typing.get_origin(type_) is typing.Annotated:
        note = typing.get_args(type_)[1]
        if note == UINT64:
            return _visit_uint64(value, path)
        if isinstance(note, Alternate):
            return _visit_alternate(note, value, path)
        assert isinstance(note, Union), note
        return _visit_union(note, _of_type(dict, value, path, "object"), f"{path}.")
    if type_ is Any:
        return value
    if typing.get_origin(type_) is list:
        (item,) = typing.get_args(type_)
        items = _of_type(list, value, path, "array")
        return [visit(item, one, f"{path}[{index}]") for index, one in enumerate(items)]
    if isinstance(type_, type) and issubclass(type_, Arguments):
        return _visit_object(type_, _of_type(dict, value, path, "object"), f"{path}.")
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return _visit_enum(type_, _of_type(str, value, path, "string"), path)
    if type_ is int:
        return _visit_integer(value, path)
    if type_ is float:
        number = (int, float) if not isinstance(value, bool) else ()
        return float(_of_type(number, value, path, "number"))
    if type_ is bool:
        return _of_type(bool, value, path, "boolean")
    if type_ is str:
        return _of_type(str, value, path, "string")
    return _of_type(dict, value, path, "object")


def plain(type_: Any) -> Any:
    """The type of a value that is there."""
    if isinstance(type_, types.UnionType) or typing.get_origin(type_) is typing.Union:
        return next(part for part in typing.get_args(type_) if part is not type(None))
    return type_


def _of_type(type_: Any, value: Any, path: str, word: str) -> Any:
    if not isinstance(value, type_):
        raise QmpError(f"Invalid parameter type for '{path}', expected: {word}")
    return value


def _visit_integer(value: Any, path: str) -> int:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not INT64_MIN <= value <= INT64_MAX:
        raise QmpError(f"Invalid parameter type for '{path}', expected: integer")
    return int(value)


def _visit_uint64(value: Any, path: str) -> int:
    """QEMU takes a negative number as its two's complement."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise QmpError(f"Parameter '{path}' expects {UINT64}")
    return value % 2**64


def _visit_enum(type_: type[enum.Enum], value: str, path: str) -> enum.Enum:
    try:
        return type_(value)
    except ValueError:
        raise QmpError(
            f"Parameter '{_member_name(path)}' does not accept value '{shown(value)}'"
        ) from None


def _member_name(path: str) -> str:
    """QAPI names the member alone, without its path, and has no name for an element of a list."""
    return "null" if path.endswith("]") else path.rpartition(".")[2]


def _visit_alternate(alternate: Alternate, value: Any, path: str) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return _visit_object(alternate.object, value, f"{path}.")
    raise QmpError(f"Invalid parameter type for '{_member_name(path)}', expected: {alternate.name}")


def _visit_union(union: Union, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    known: set[str] = set()
    branch: type[Arguments] | Union = union
    while isinstance(branch, Union):
        name = branch.discriminator
        if name not in given:
            raise QmpError(f"Parameter '{path}{name}' is missing")
        chosen = _of_type(str, given[name], path + name, "string")
        if chosen not in branch.branches:
            raise QmpError(f"Parameter '{name}' does not accept value '{shown(chosen)}'")
        values[name] = chosen
        known.add(name)
        branch = branch.branches[chosen]
    fields = {field.name: field.encode_name for field in msgspec.structs.fields(branch)}
    members = _visit_members(branch, given, path)
    _refuse_others(given, known | set(fields.values()), path)
    return values | {fields[name]: value for name, value in members.items()}
