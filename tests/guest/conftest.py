"""Run directories of guest tests; what is left there fails the test (tests/conftest.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def rundir() -> Path:
    """A run directory whose path is short enough for sockets."""
    path = Path(os.environ["XDG_RUNTIME_DIR"]) / "guest"
    path.mkdir(mode=0o700)
    return path
