"""Sizes and times, for the commands that QEMU had until 6.0: `migrate_set_downtime 30ms`."""

from __future__ import annotations

import re
from typing import Final

from engine.control.hmp.reader import SPACES, Reader, WrongLine
from engine.errors import UsageError
from engine.sizes import parse_size

INT64_MAX: Final = 2**63 - 1
_SECONDS: Final = re.compile(r"([+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}))", re.ASCII)
_UNITS: Final = {"": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def read_size(reader: Reader) -> int:
    """Bytes; a number without a suffix counts MiB.

    :raise WrongLine: not a size, or 2^63 bytes and more."""
    word = reader.until(SPACES)
    try:
        size = parse_size(word + "M" if word[-1:].isdigit() else word)
    except UsageError as exc:
        raise WrongLine("invalid size") from exc
    if size > INT64_MAX:
        raise WrongLine("invalid size")
    return size


def read_seconds(reader: Reader) -> float:
    """Seconds, from a number with `ms`, `us`, `ns` or nothing behind it.

    :raise WrongLine: not a number, or another unit."""
    word = reader.until(SPACES)
    match = _SECONDS.match(word)
    if match is None:
        raise WrongLine("number expected")
    unit = word[match.end() :]
    if unit not in _UNITS:
        raise WrongLine("Unknown unit suffix")
    return float(match[0]) * _UNITS[unit]
