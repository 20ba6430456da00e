"""A codec as a benchmark names it, like `zstd:1`, and the migration parameters that choose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engine.errors import UsageError

#: The parameter that takes the level; `none` and `auto` take none.
LEVELS: Final = {
    "none": None,
    "lz4": "multifd-lz4-acceleration",
    "zstd": "multifd-zstd-level",
    "zlib": "multifd-zlib-level",
    "auto": None,
}


@dataclass(frozen=True, slots=True)
class Codec:
    """One setting of `multifd-compression`; the level is 1 where nothing is said, as QEMU's is."""

    name: str
    level: int | None

    def __str__(self) -> str:
        return self.name if self.level is None else f"{self.name}:{self.level}"

    @property
    def is_qemus(self) -> bool:
        """QEMU has it, too."""
        return self.name in ("none", "zlib", "zstd")

    def parameters(self) -> dict[str, str | int]:
        """For migrate-set-parameters."""
        chosen: dict[str, str | int] = {"multifd-compression": self.name}
        parameter = LEVELS[self.name]
        if parameter is not None and self.level is not None:
            chosen[parameter] = self.level
        return chosen


NONE: Final = Codec("none", None)


def parse_codec(text: str) -> Codec:
    """`zstd`, `zstd:3`, `lz4`, ...; whether an engine has it, and the level, only it can say.

    :raise UsageError: no codec of these names, or the level is no number."""
    name, colon, level = text.strip().partition(":")
    if name not in LEVELS:
        raise UsageError(f"codec '{text[:100]}': one of {', '.join(LEVELS)}, like zstd:1")
    if LEVELS[name] is None:
        if colon:
            raise UsageError(f"codec '{text[:100]}': {name} has no level")
        return Codec(name, None)
    try:
        return Codec(name, int(level) if colon else 1)
    except ValueError as exc:
        raise UsageError(f"codec '{text[:100]}': a level is a whole number") from exc
