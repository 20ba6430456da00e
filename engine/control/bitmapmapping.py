"""The parameter `block-bitmap-mapping`: its shape and QEMU's rules for names and aliases.

There are no block devices here: a mapping is checked, kept and shown, as QEMU does
(qapi/migration.json, BitmapMigrationNodeAlias; migration/block-dirty-bitmap.c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from engine.control.identifiers import is_well_formed
from engine.errors import UsageError, shown

ALIAS_BYTES_MAX: Final = 255  #: one byte of QEMU's stream holds the length
NODE_NAME_BYTES_MAX: Final = 31
BITMAP_NAME_BYTES_MAX: Final = 1023

Read: TypeAlias = Callable[[object, str], Any]
#: A member's name: how it is read, and whether it must be there; in QAPI's order.
Members: TypeAlias = Mapping[str, tuple[Read, bool]]


def read_text(value: object, path: str) -> str:
    """:raise UsageError: no string."""
    return str(_typed(value, path, str, "string"))


def read_list(value: object, path: str, read: Read) -> list[Any]:
    """A list of its own, each item read.

    :raise UsageError: no list, or what `read` raises."""
    items = _typed(value, path, list, "array")
    return [read(item, f"{path}[{index}]") for index, item in enumerate(items)]


def read_mapping(value: object, path: str) -> list[dict[str, Any]]:
    """The mapping as a copy of its own; only its shape is checked.

    :raise UsageError: a missing, unexpected or wrong member, in QEMU's words."""
    return read_list(value, path, lambda item, at: _read_object(item, at, _NODE))


def check_mapping(mapping: list[dict[str, Any]]) -> None:
    """Every name maps to one alias, and back.

    :raise UsageError: QEMU's text; first names are looked at, then aliases."""
    for by_name in (True, False):
        nodes: set[str] = set()
        for node in mapping:
            _check_node(node, nodes, by_name)
            bitmaps: set[str] = set()
            for bitmap in node["bitmaps"]:
                _check_bitmap(node, bitmap, bitmaps, by_name)


def _check_node(node: dict[str, Any], seen: set[str], by_name: bool) -> None:
    name, alias = node["node-name"], node["alias"]
    if not is_well_formed(alias):
        raise _invalid(f"The node alias '{shown(alias)}' is not well-formed")
    _check_length("node alias", alias, ALIAS_BYTES_MAX)
    _check_length("node name", name, NODE_NAME_BYTES_MAX)
    if by_name and name in seen:
        raise _invalid(f"The node name '{shown(name)}' is mapped twice")
    if not by_name and alias in seen:
        raise _invalid(f"The node alias '{shown(alias)}' is used twice")
    seen.add(name if by_name else alias)


def _check_bitmap(
    node: dict[str, Any], bitmap: dict[str, Any], seen: set[str], by_name: bool
) -> None:
    name, alias = bitmap["name"], bitmap["alias"]
    _check_length("bitmap alias", alias, ALIAS_BYTES_MAX)
    _check_length("bitmap name", name, BITMAP_NAME_BYTES_MAX)
    if by_name and name in seen:
        raise _invalid(f"The bitmap '{shown(node['node-name'])}'/'{shown(name)}' is mapped twice")
    if not by_name and alias in seen:
        raise _invalid(f"The bitmap alias '{shown(node['alias'])}'/'{shown(alias)}' is used twice")
    seen.add(name if by_name else alias)


def _check_length(what: str, text: str, bytes_max: int) -> None:
    if len(text.encode()) > bytes_max:
        raise _invalid(f"The {what} '{shown(text)}' is longer than {bytes_max} bytes")


def _invalid(detail: str) -> UsageError:
    return UsageError(f"Invalid mapping given for block-bitmap-mapping: {detail}")


def _read_object(value: object, path: str, members: Members) -> dict[str, Any]:
    given = _typed(value, path, dict, "object")
    read = {}
    for name, (reader, is_required) in members.items():
        if name in given:
            read[name] = reader(given[name], f"{path}.{name}")
        elif is_required:
            raise UsageError(f"Parameter '{path}.{name}' is missing")
    for name in given:
        if name not in members:
            raise UsageError(f"Parameter '{path}.{shown(name)}' is unexpected")
    return read


def _typed(value: object, path: str, type_: type, word: str) -> Any:
    if not isinstance(value, type_):
        raise UsageError(f"Invalid parameter type for '{path}', expected: {word}")
    return value


_TRANSFORM: Final[Members] = {
    "persistent": (lambda value, path: _typed(value, path, bool, "boolean"), False),
}
_BITMAP: Final[Members] = {
    "name": (read_text, True),
    "alias": (read_text, True),
    "transform": (lambda value, path: _read_object(value, path, _TRANSFORM), False),
}
_NODE: Final[Members] = {
    "node-name": (read_text, True),
    "alias": (read_text, True),
    "bitmaps": (
        lambda value, path: read_list(
            value, path, lambda item, at: _read_object(item, at, _BITMAP)
        ),
        True,
    ),
}
