"""The comparing itself: it would see a difference."""

from __future__ import annotations

import pytest

from tests.conformance.compare import Difference, compare, unlike
from tests.conformance.peers import Peer


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


def test_statuses_of_a_paused_guest(peers: tuple[Peer, Peer]) -> None:
    qemu, ours = peers
    compare([{"execute": "query-migrate"}, {"execute": "stop"}], qemu.client, ours.client)
