"""Plots in a process of their own: matplotlib keeps its fonts open for as long as it lives."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

DRAW = "import pickle, sys; draw, arguments = pickle.load(sys.stdin.buffer); draw(*arguments)"


def draw(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module with arguments that can be pickled."""
    given = pickle.dumps((function, arguments))
    subprocess.run([sys.executable, "-W", "error", "-c", DRAW], input=given, check=True, timeout=60)
