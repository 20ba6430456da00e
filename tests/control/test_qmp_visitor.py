"""What a client gave, against what was declared: QAPI's order and texts."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.control.qmp.commands.channels import Channel
from engine.control.qmp.visitor import Arguments, QmpError, Union, parse_arguments


class Colour(enum.Enum):
    RED = "red"


class Leaf(Arguments, frozen=True):
    size_bytes: int
    on: bool = False


class Tree(Arguments, frozen=True):
    name: str
    leaves: list[Leaf] | None = None
    ratio: float = 0.5
    colour: Colour | None = None
    either: Annotated[dict[str, Any], Union("kind", {"leaf": Leaf})] | None = None


def test_right_members_become_typed_values() -> None:
    tree = parse_arguments(
        Tree, {"name": "n", "leaves": [{"size-bytes": 5}], "ratio": 1, "colour": "red"}
    )

    assert tree == Tree("n", [Leaf(5)], 1.0, Colour.RED)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "Parameter 'name' is missing"),
        ({"name": None}, "Invalid parameter type for 'name', expected: string"),
        ({"name": 1, "x": 1}, "Invalid parameter type for 'name', expected: string"),
        ({"name": "n", "x": 1, "y": 1}, "Parameter 'x' is unexpected"),
        ({"name": "n", "leaves": 1}, "Invalid parameter type for 'leaves', expected: array"),
        (
            {"name": "n", "leaves": [{"size-bytes": 1}, 2]},
            "Invalid parameter type for 'leaves[1]', expected: object",
        ),
        ({"name": "n", "leaves": [{}]}, "Parameter 'leaves[0].size-bytes' is missing"),
        (
            {"name": "n", "leaves": [{"size-bytes": True}]},
            "Invalid parameter type for 'leaves[0].size-bytes', expected: integer",
        ),
        (
            {"name": "n", "leaves": [{"size-bytes": 2**63}]},
            "Invalid parameter type for 'leaves[0].size-bytes', expected: integer",
        ),
        (
            {"name": "n", "leaves": [{"size-bytes": 1, "of": 1}]},
            "Parameter 'leaves[0].of' is unexpected",
        ),
        ({"name": "n", "ratio": True}, "Invalid parameter type for 'ratio', expected: number"),
        ({"name": "n", "colour": "blue"}, "Parameter 'colour' does not accept value 'blue'"),
        ({"name": "n", "colour": 5}, "Invalid parameter type for 'colour', expected: string"),
    ],
)
def test_the_first_wrong_member_decides(given: dict[str, Any], text: str) -> None:
    with pytest.raises(QmpError) as refused:
        parse_arguments(Tree, given)
    assert str(refused.value) == text


INET = {"transport": "socket", "type": "inet", "host": "h", "port": "5"}


@pytest.mark.parametrize(
    ("addr", "text"),
    [
        (5, "Invalid parameter type for 'addr', expected: object"),
        ({}, "Parameter 'addr.transport' is missing"),
        ({"transport": "nope"}, "Parameter 'transport' does not accept value 'nope'"),
        ({"transport": "socket"}, "Parameter 'addr.type' is missing"),
        (INET | {"port": 5}, "Invalid parameter type for 'addr.port', expected: string"),
        (INET | {"path": "/p"}, "Parameter 'addr.path' is unexpected"),
        ({"transport": "exec", "args": [1]}, "Invalid parameter type for 'addr.args[0]', "
         "expected: string"),
    ],
)  # fmt: skip
def test_a_union_has_the_members_of_its_branch(addr: object, text: str) -> None:
    with pytest.raises(QmpError) as refused:
        parse_arguments(Channel, {"channel-type": "main", "addr": addr})
    assert str(refused.value) == text


def test_a_union_within_a_union_is_flat() -> None:
    channel = parse_arguments(Channel, {"channel-type": "main", "addr": INET})

    assert channel.addr == INET


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "leaves", "addr", "transport", "type", "size-bytes", "x"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["channel-type", "addr", "x"]), json_values))
def test_anything_is_taken_or_refused_in_one_line(anything: dict[str, Any]) -> None:
    try:
        said = repr(parse_arguments(Channel, anything))
    except QmpError as exc:
        said = str(exc)
    assert "\n" not in said
