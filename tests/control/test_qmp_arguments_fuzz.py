"""Thousands of requests to the real commands, with arguments that are nearly what they declare."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any, Final

import pytest

from engine.control.process import ControlProcess
from engine.control.qmp.commands import build_registry
from engine.control.qmp.messages import answer_line
from engine.control.qmp.registry import CommandRegistry
from engine.control.qmp.schema import build_schema
from engine.errors import MigrationError
from engine.guest.spec import open_guest, parse_guest_spec
from tests.conformance.schemas import Schema
from tests.support import open_descriptors

pytestmark = pytest.mark.process

REQUESTS: Final = 10_000
SEED: Final = 3
WAIT_S: Final = 20.0
TEXT_MAX: Final = 2000  #: characters of a refusal: what was given is repeated in part only
#: It ends the process; the others may be refused, but not by a bug.
LEFT_OUT: Final = ("quit",)
#: Nothing here reaches another host, runs a program or leaves a file.
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 127, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 1.5,
    1e300, "", "x", "on", "normal", "active", "migration", "\0", "é" * 50, "a" * 5000, "1", "-1",
    "fd:nope", "file:/nonexistent/x", "unix:/nonexistent/x", "rdma:x:1", "defer", ":", "tcp:",
    [], [[]], [{}], ["x"], [1], {}, {"a": 1}, {"": None},
)  # fmt: skip
LIKELY: Final = {
    "str": tuple(one for one in VALUES if isinstance(one, str)),
    "int": tuple(one for one in VALUES if type(one) is int),
    "bool": (True, False),
    "number": (0, 1.5, -3, 1e300),
}
#: A program is run by no request.
PROGRAMS: Final = ("exec:", '"exec"')


class Inventor:
    """Invents arguments for what `query-qmp-schema` declares."""

    def __init__(self, luck: random.Random, schema: Schema) -> None:
        self._luck = luck
        self._names = sorted(schema.names("command") - {"qmp_capabilities", *LEFT_OUT})
        self._kinds = {name: schema.arguments(name) for name in self._names}

    def request(self) -> tuple[str, dict[str, Any]]:
        while True:
            name = self._luck.choice(self._names)
            given = self._value(self._kinds[name], wrong=0.0)
            if isinstance(given, dict) and not any(one in json.dumps(given) for one in PROGRAMS):
                return name, given

    def _value(self, kind: Any, wrong: float = 0.2) -> Any:
        """Of the kind that `Schema.kind` tells, or with that chance of any other."""
        if self._luck.random() < wrong:
            return self._luck.choice(VALUES)
        if isinstance(kind, list):
            return [self._value(kind[0]) for _ in range(self._luck.randrange(4))]
        if isinstance(kind, str):
            return self._luck.choice(LIKELY.get(kind, VALUES))
        if "enum" in kind:
            return self._luck.choice(kind["enum"])
        return self._luck.choice(VALUES) if "alternate" in kind else self._object(kind)

    def _object(self, kind: dict[str, Any]) -> dict[str, Any]:
        members = {name: one for name, one in kind.items() if not name.startswith("(")}
        given: dict[str, Any] = {}
        if "(tag)" in kind:
            case = given[kind["(tag)"]] = self._luck.choice(sorted(kind["(cases)"]))
            branch = kind["(cases)"][case]
            given |= self._object(branch) if isinstance(branch, dict) else {}
        for name, one in members.items():
            if self._luck.random() < (0.3 if name.endswith("?") else 0.95):
                given.setdefault(name.rstrip("?"), self._value(one))
        if self._luck.random() < 0.03:
            given["nobody-has-this"] = 1
        return given


async def is_taken(registry: CommandRegistry, name: str, given: dict[str, Any]) -> bool:
    """Or refused, in words; an exception that is none of ours is a bug of the command."""
    try:
        async with asyncio.timeout(WAIT_S):
            answer_line(await registry.call(name, given), {})
    except MigrationError as exc:
        text = str(exc)
    else:
        return True
    assert 0 < len(text) <= TEXT_MAX, (name, given)
    return False


def test_no_arguments_break_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def scenario() -> dict[str, set[bool]]:
        guest = await open_guest(parse_guest_spec("ram:size=1M"), incoming=False)
        process = ControlProcess(guest, incoming=False)
        registry = build_registry(process)
        went: dict[str, set[bool]] = {}
        try:
            before = open_descriptors()
            inventor = Inventor(random.Random(SEED), Schema(build_schema(registry)))
            for _ in range(REQUESTS):
                name, given = inventor.request()
                went.setdefault(name, set()).add(await is_taken(registry, name, given))
            assert len(open_descriptors()) <= len(before) + 8
        finally:
            await process.close()
        return went

    went = asyncio.run(scenario())
    assert len(went) > 60
    assert sum(ways == {True, False} for ways in went.values()) > 25
    assert list(tmp_path.iterdir()) == []
