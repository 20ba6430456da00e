"""Messages: what an answer looks like, and which ids it can repeat."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.control.qmp.messages import ID_DEPTH_MAX, line
from tests.control.qmp_rig import client, error, registry, serving


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (1.0, b"1"),
        (0.0, b"0"),
        (-3.0, b"-3"),
        (0.5, b"0.5"),
        (1e16, b"10000000000000000"),
        (1e17, b"1e17"),
        (True, b"true"),
        ("é😀", b'"\\u00e9\\ud83d\\ude00"'),
        ([{"a": (2.0,)}], b'[{"a":[2]}]'),
    ],
)
def test_an_answer_is_ascii_and_whole_numbers_have_no_fraction(value: Any, printed: bytes) -> None:
    assert line({"return": value}) == b'{"return":' + printed + b"}\r\n"


def test_an_id_that_is_too_deep_is_refused_before_the_command_is_executed(tmp_path: Path) -> None:
    executed: list[None] = []

    async def note(_: object) -> None:
        executed.append(None)

    def nested(depth: int) -> bytes:
        return b'{"execute":"note","id":' + b"[" * depth + b"]" * depth + b"}"

    async def scenario() -> tuple[list[Any], int, list[Any]]:
        commands = registry()
        commands.add("note", note)
        async with serving(tmp_path / "qmp", commands), client(tmp_path / "qmp") as one:
            refused = await one.ask(nested(ID_DEPTH_MAX + 1), nested(1000))
            return refused, len(executed), await one.ask(nested(ID_DEPTH_MAX))

    refused, executed_count, (echoed,) = asyncio.run(scenario())
    assert refused == [error("QMP input member 'id' nests deeper than 128")] * 2
    assert executed_count == 0
    assert echoed["return"] == {}
    assert len(executed) == 1
