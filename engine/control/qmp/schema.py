"""`query-qmp-schema`: what the registry declares, in the shape of QEMU's introspection
(qapi/introspect.json). Names of types are numbers, as QEMU masks them.
"""

from __future__ import annotations

import enum
import typing
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from engine.control.capabilities import CAPABILITIES, Capability
from engine.control.parameter_table import PARAMETERS, Kind, Parameter
from engine.control.qmp.answers import EVENTS, MigrationInfo, Negotiation
from engine.control.qmp.registry import Command, CommandRegistry
from engine.control.qmp.visitor import (
    UINT64,
    Alternate,
    Arguments,
    NoArguments,
    Union,
    plain,
)

Json = dict[str, Any]

_BUILTINS: Final = {
    str: ("str", "string"),
    int: ("int", "int"),
    bool: ("bool", "boolean"),
    float: ("number", "number"),
    type(None): ("null", "null"),
    Any: ("any", "value"),
}
_PARAMETER_NUMBERS: Final = frozenset(
    {Kind.SIZE, Kind.UINT64, Kind.UINT32, Kind.UINT16, Kind.UINT8}
)
#: Commands that check their arguments themselves, and those whose answer is declared here.
_PARAMETERS_IN: Final = "migrate-set-parameters"
_PARAMETERS_OUT: Final = "query-migrate-parameters"
_CAPABILITIES: Final = ("migrate-set-capabilities", "query-migrate-capabilities")
_RETURNS: Final[dict[str, Any]] = {"query-migrate": MigrationInfo, "query-migrate-cache-size": int}


class BitmapTransform(Arguments, frozen=True):
    """QAPI BitmapMigrationBitmapAliasTransform."""

    persistent: bool | None = None


class BitmapAlias(Arguments, frozen=True):
    """QAPI BitmapMigrationBitmapAlias."""

    name: str
    alias: str
    transform: BitmapTransform | None = None


class NodeAlias(Arguments, frozen=True):
    """QAPI BitmapMigrationNodeAlias."""

    node_name: str
    alias: str
    bitmaps: list[BitmapAlias]


def build_schema(registry: CommandRegistry) -> list[Json]:
    """All commands and events, and every type that they mention."""
    return _Builder().build(registry)


class _Builder:
    """One walk; each type is described once."""

    def __init__(self) -> None:
        self._entities: list[Json] = []  #: of types; commands and events come before them
        self._names: dict[Any, str] = {}
        self._next_number = 0
        self._nothing = self._type(NoArguments)
        self._capabilities: Any = None  #: a list of what `migrate-set-capabilities` takes

    def build(self, registry: CommandRegistry) -> list[Json]:
        negotiation = Command("qmp_capabilities", Negotiation, _nobody)
        setting = registry.find(_CAPABILITIES[0]).arguments
        self._capabilities = typing.get_type_hints(setting)["capabilities"]
        commands = [self._command(one) for one in (negotiation, *registry)]
        events = [
            {"name": name, "meta-type": "event", "arg-type": self._type(data or NoArguments)}
            for name, data in EVENTS.items()
        ]
        return [*commands, *events, *self._entities]

    def _command(self, command: Command) -> Json:
        entity: Json = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": self._argument(command),
            "ret-type": self._answer(command),
        }
        if command.oob:
            entity["allow-oob"] = True
        return entity | _features(command.features)

    def _argument(self, command: Command) -> str:
        if command.name == _PARAMETERS_IN:
            return self._parameters(is_read=False)
        return self._type(Any if command.arguments is None else command.arguments)

    def _answer(self, command: Command) -> str:
        if command.name == _PARAMETERS_OUT:
            return self._parameters(is_read=True)
        if command.name == _CAPABILITIES[1]:
            return self._type(self._capabilities)
        returns = command.returns or _RETURNS.get(command.name)
        if returns is None and "query-" in command.name:
            returns = Any
        return self._nothing if returns is None else self._type(returns)

    # -- types -----------------------------------------------------------------------------------

    def _type(self, type_: Any) -> str:
        """The name of a type; it is described if it was not yet."""
        type_ = plain(type_)
        if typing.get_origin(type_) is typing.Annotated:
            note = typing.get_args(type_)[1]
            if isinstance(note, Alternate):
                return self._alternate(str, note.object)
            return self._type(int if note == UINT64 else note)
        if typing.get_origin(type_) is list:
            return self._array(self._type(typing.get_args(type_)[0]))
        if typing.get_origin(type_) is dict:
            type_ = Any
        if isinstance(type_, Union):
            return self._once(id(type_), lambda: self._union(type_))
        if type_ in _BUILTINS:
            return self._builtin(type_)
        if issubclass(type_, enum.Enum):
            return self._enum(tuple(one.value for one in type_))
        return self._once(type_, lambda: {"members": self._members(type_)})

    def _once(self, key: Any, describe: Callable[[], Json], meta_type: str = "object") -> str:
        if key not in self._names:
            name = self._names[key] = str(self._next_number)
            self._next_number += 1
            self._entities.append({"name": name, "meta-type": meta_type} | describe())
        return self._names[key]

    def _builtin(self, type_: Any) -> str:
        name, json_type = _BUILTINS[type_]
        if name not in self._names:
            self._names[name] = name
            self._entities.append({"name": name, "meta-type": "builtin", "json-type": json_type})
        return name

    def _array(self, element: str) -> str:
        name = f"[{element}]"
        if name not in self._names:
            self._names[name] = name
            self._entities.append({"name": name, "meta-type": "array", "element-type": element})
        return name

    def _enum(self, values: tuple[str, ...]) -> str:
        marked = _CAPABILITY_FEATURES if values == tuple(_CAPABILITY_FEATURES) else {}
        members = [{"name": value} | _features(marked.get(value, ())) for value in values]
        return self._once(values, lambda: {"members": members, "values": list(values)}, "enum")

    def _alternate(self, *types: Any) -> str:
        members = [{"type": self._type(one)} for one in types]
        return self._once(("alternate", *types), lambda: {"members": members}, "alternate")

    def _members(self, type_: type[Arguments], besides: Iterable[str] = ()) -> list[Json]:
        hints = typing.get_type_hints(type_, include_extras=True)
        return [
            _member(field.encode_name, self._type(hints[field.name]), not field.required)
            for field in msgspec.structs.fields(type_)
            if field.encode_name not in besides
        ]

    def _union(self, union: Union) -> Json:
        """What all branches have belongs to the union itself."""
        common = _common(union)
        tag = _member(union.discriminator, self._enum(tuple(union.branches)), False)
        first = next(iter(union.branches.values()))
        shared = [] if isinstance(first, Union) else self._members(first)
        return {
            "members": [tag, *(one for one in shared if one["name"] in common)],
            "tag": union.discriminator,
            "variants": [
                {"case": case, "type": self._branch(branch, common)}
                for case, branch in union.branches.items()
            ],
        }

    def _branch(self, branch: type[Arguments] | Union, common: frozenset[str]) -> str:
        if isinstance(branch, Union) or not common:
            return self._type(branch)
        return self._once(
            (branch, common), lambda: {"members": self._members(branch, besides=common)}
        )

    # -- parameters of a migration ---------------------------------------------------------------

    def _parameters(self, *, is_read: bool) -> str:
        """All may be left out when they are set, and some are when they are read."""

        def describe() -> Json:
            return {
                "members": [
                    _member(one.name, self._parameter(one, is_read=is_read), True)
                    | _features(_member_features(one))
                    for one in PARAMETERS
                ]
            }

        return self._once(("parameters", is_read), describe)

    def _parameter(self, parameter: Parameter, *, is_read: bool) -> str:
        if parameter.kind in _PARAMETER_NUMBERS:
            return self._type(int)
        if is_read and parameter.kind is Kind.STRING_OR_NULL:
            return self._type(str)
        match parameter.kind:
            case Kind.BOOL:
                return self._type(bool)
            case Kind.ENUM:
                return self._enum((*parameter.values, *parameter.lacks))
            case Kind.STRINGS:
                return self._type(list[str])
            case Kind.MAPPING:
                return self._type(list[NodeAlias])
        return self._alternate(str, type(None))


def _member(name: str, type_: str, is_optional: bool) -> Json:
    """Without a default it must be given; QEMU tells no other default than null."""
    return {"name": name, "type": type_} | ({"default": None} if is_optional else {})


def _features(names: tuple[str, ...]) -> Json:
    return {"features": list(names)} if names else {}


def _member_features(one: Parameter | Capability) -> tuple[str, ...]:
    deprecated = ("deprecated",) if one.deprecated else ()
    return (*deprecated, "unstable") if one.name.startswith("x-") else deprecated


#: QEMU marks the values of its MigrationCapability, too.
_CAPABILITY_FEATURES: Final = {one.name: _member_features(one) for one in CAPABILITIES}


def _common(union: Union) -> frozenset[str]:
    """Names of the members that every branch has."""
    names = []
    for branch in union.branches.values():
        if isinstance(branch, Union):
            return frozenset()
        names.append({field.encode_name for field in msgspec.structs.fields(branch)})
    return frozenset(set.intersection(*names))


async def _nobody(_: object) -> None:
    """The session negotiates by itself."""
