"""The comparing itself: it would see a difference."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

import pytest

import tests.conformance
from tests.conformance.compare import (
    Difference,
    command,
    compare,
    compare_streams,
    stale,
    undocumented,
    unlike,
)
from tests.conformance.peers import Peer, both

#: Modules whose tests compare, but for this one.
MODULES: Final = [
    one.name
    for one in pkgutil.iter_modules(tests.conformance.__path__)
    if one.name.startswith("test_") and one.name != "test_harness"
]
#: Explanations of what the host, chance or another test decides: `shown_by` is empty.
NOT_SHOWN: Final = {
    "QEMU asks the host's kernel and the guest's memory about background-snapshot.",
    "QEMU asks the destination's kernel about postcopy-ram.",
    "`start-time` is when each process began to measure",
    "`calc-time` of a finished measurement is how long it really took",
    "The greeting's `package` is ramferry's name and version.",
}


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"tests.conformance.{name}")


def differences(name: str) -> list[Difference]:
    """Every explanation of a module: of its own, and of its tables."""
    found: dict[Difference, None] = {}
    for value in vars(module_of(name)).values():
        for one in value if isinstance(value, tuple | list) else [value]:
            if isinstance(one, Difference):
                found[one] = None
    return list(found)


def pairs_for(known: list[Difference]) -> Iterator[tuple[Peer, Peer, list[Difference]]]:
    """A pair of sources, or of destinations, with the explanations that it shows."""
    for incoming in (False, True):
        if here := [one for one in known if one.incoming is incoming and one.shown_by]:
            with both(incoming="defer" if incoming else None) as (qemu, ours):
                yield qemu, ours, here


def test_every_kind_of_difference_is_found() -> None:
    one = {"a": 1, "b": [1, {"c": True}], "d": 1}
    other = {"a": 1.0, "b": [1, {"c": False}], "e": 1}
    assert [path for path, _, _ in unlike(one, other)] == ["a", "b[1].c", "d", "e"]
    assert list(unlike(one, one)) == []


def test_an_unexplained_difference_fails(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    version = {"execute": "query-version"}
    with pytest.raises(AssertionError, match=r"return\.package"):
        compare([version], qemu.client, ours.client)
    known = Difference("query-version", r"return\.package", "the package is ramferry's")
    compare([version], qemu.client, ours.client, [known])


def test_an_explanation_of_what_is_alike_is_stale(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = (one.client for one in peers)
    version, status = command("query-version"), command("query-status")
    members = (r"return\.package", r"return\.qemu")
    one, other = (Difference("query-version", path, "why", [status, version]) for path in members)
    assert stale(one, qemu, ours) == []
    assert len(stale(other, qemu, ours)) == 1
    mended = Difference(
        "query", r"(\[0\]\.)?return\.package", "why", [b'{"execute":"query-status"}']
    )
    compare_streams([b'{"execute":"query-version"}'], qemu, ours, [mended])
    assert len(stale(mended, qemu, ours)) == 1


@pytest.mark.parametrize("name", MODULES)
def test_no_explanation_is_stale(name: str) -> None:
    """What is explained still differs: the table of differences is the true one."""
    alike = []
    for qemu, ours, known in pairs_for(differences(name)):
        for one in known:
            alike += stale(one, qemu.client, ours.client)
    assert alike == []


@pytest.mark.parametrize("name", MODULES)
def test_every_explanation_is_documented_and_shown(name: str) -> None:
    module: Any = module_of(name)
    known = differences(name)
    assert undocumented([*(one.reason for one in known), *getattr(module, "REASONS", ())]) == []
    tables = [one for table in ("DIFFERENCES", "SCHEMA_DIFFERENCES")
              for one in getattr(module, table, ())]  # fmt: skip
    assert set(known) <= set(tables), "an explanation that is in no table"
    shown = [one for one in known if one not in getattr(module, "SCHEMA_DIFFERENCES", ())]
    assert {one.reason for one in shown if not one.shown_by} <= NOT_SHOWN
    assert not {one.reason for one in shown if one.shown_by} & NOT_SHOWN


def test_statuses_of_a_paused_guest(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare([{"execute": "query-migrate"}, {"execute": "stop"}], qemu.client, ours.client)
