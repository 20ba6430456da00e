"""QEMU's form of an id (util/id.c, id_wellformed)."""

from __future__ import annotations

import re
from typing import Final

_FORM: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


def is_well_formed(identity: str) -> bool:
    """A letter, then letters, digits, `-`, `.` and `_`."""
    return _FORM.fullmatch(identity) is not None
