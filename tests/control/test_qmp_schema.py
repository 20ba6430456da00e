"""Introspection is of what is there: every command, and every event that anybody emits."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Annotated, Any

import pytest

import engine
from engine.control.qmp.answers import EVENTS
from engine.control.qmp.commands.settings import SetCapabilities
from engine.control.qmp.registry import Arguments, CommandRegistry
from engine.control.qmp.schema import build_schema
from engine.control.qmp.visitor import QmpError, Union, parse_arguments
from tests.conformance.schemas import Schema


class Colour(enum.Enum):
    RED = "red"


class Point(Arguments, frozen=True):
    id: str
    at_x: int
    note: str | None = None


class Circle(Point, frozen=True):
    radius: float = 1.0
    colours: list[Colour] | None = None


SHAPE = Union("shape", {"point": Point, "circle": Circle})


class Drawing(Arguments, frozen=True):
    shapes: list[Annotated[dict[str, Any], SHAPE]]
    is_large: bool = False


async def nothing(_: object) -> None:
    """A command that does nothing."""


def schema_of(registry: CommandRegistry) -> Schema:
    registry.add("migrate-set-capabilities", nothing, SetCapabilities)
    schema = Schema(build_schema(registry))
    schema.check()
    return schema


def test_types_become_qapis() -> None:
    registry = CommandRegistry()
    registry.add("draw", nothing, Drawing, oob=True, features=("unstable",), returns=list[Point])
    registry.add("add", nothing, SHAPE)
    registry.add("rest", nothing)
    schema = schema_of(registry)
    shape = {
        "shape": {"enum": ["circle", "point"]},
        "id": "str",
        "at-x": "int",
        "note?": "str",
        "(tag)": "shape",
        "(cases)": {"point": {}, "circle": {"radius?": "number", "colours?": [{"enum": ["red"]}]}},
    }
    assert schema.arguments("draw") == {"shapes": [shape], "is-large?": "bool"}
    assert schema.arguments("add") == shape
    assert schema.answer("draw") == [{"id": "str", "at-x": "int", "note?": "str"}]
    assert schema.arguments("rest") == schema.answer("rest") == {}
    assert schema.find("draw")["allow-oob"] is True
    assert schema.find("draw")["features"] == ["unstable"]
    assert "allow-oob" not in schema.find("rest")


def test_names_of_types_are_numbers() -> None:
    schema = schema_of(CommandRegistry())
    for meta_type in ("object", "enum"):
        assert all(name.isdigit() for name in schema.names(meta_type))
    assert {"str", "int", "bool"} <= schema.names("builtin")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Parameter 'shape' is missing"),
        ({"shape": 3}, "Invalid parameter type for 'shape', expected: string"),
        ({"shape": "square"}, "Parameter 'shape' does not accept value 'square'"),
        ({"shape": "point"}, "Parameter 'id' is missing"),
        ({"shape": "point", "id": "a", "at-x": 1, "radius": 2}, "Parameter 'radius' is unexpected"),
    ],
)
def test_a_union_as_the_arguments_themselves(given: dict[str, Any], said: str) -> None:
    with pytest.raises(QmpError) as refused:
        parse_arguments(SHAPE, given)
    assert str(refused.value) == said


def test_every_event_that_is_emitted_is_declared() -> None:
    emitted = set()
    for path in Path(engine.__file__).parent.rglob("*.py"):
        emitted |= set(re.findall(r"emit\(\s*\"([A-Z_]+)\"", path.read_text()))
    assert emitted == set(EVENTS)
