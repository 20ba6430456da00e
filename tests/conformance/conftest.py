"""Fixtures: both peers, fresh for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.peers import Peer, both


@pytest.fixture
def peers() -> Iterator[tuple[Peer, Peer]]:
    """QEMU and ramferry as sources, guests paused."""
    with both() as pair:
        yield pair


@pytest.fixture
def destinations() -> Iterator[tuple[Peer, Peer]]:
    """QEMU and ramferry that wait for `migrate-incoming`."""
    with both(incoming="defer") as pair:
        yield pair
