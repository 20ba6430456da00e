"""Sizes as people write them: one grammar for guests, parameters and commands."""

from __future__ import annotations

import re
from typing import Final

from engine.errors import UsageError, shown

UNITS: Final = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE: Final = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?([bkmgt]?)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """`200M`, `1.5G`, `4096`: bytes, in units of 1024; what is less than a byte is dropped.

    :raise UsageError: not a size."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"Invalid size '{shown(text)}'; write for example 4096, 200M or 1.5G")
    whole, fraction, unit = match[1], match[2] or "", UNITS[match[3].lower()]
    scale: int = 10 ** len(fraction)
    return int(whole + fraction) * unit // scale
