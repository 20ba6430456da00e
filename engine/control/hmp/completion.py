"""What may stand next in a line; for clients that complete with the tabulator key."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from engine.control.capabilities import CAPABILITIES
from engine.control.hmp.reader import SPACES
from engine.control.hmp.table import CommandTable
from engine.control.parameter_table import PARAMETERS, Kind
from engine.control.status import Status

SWITCH: Final = ("off", "on")
BEFORE_A_LINE: Final = ("help", "?", "x_once")  #: words whose argument is another line


def complete(table: CommandTable, line: str) -> list[str]:
    """Whole words that may stand for the last one of `line`, sorted.

    A line that ends with a space asks for the next word; what is free text has no candidates."""
    words = line.split()
    if not words or line[-1] in SPACES:
        words.append("")
    *before, begun = words
    return sorted(word for word in _candidates(table, before) if word.startswith(begun))


def _candidates(table: CommandTable, before: Sequence[str]) -> Iterable[str]:
    inner = list(itertools.dropwhile(BEFORE_A_LINE.__contains__, before))
    if not inner:
        return table.names()
    name, *given = inner
    command = table.get(name)
    if command is not None and command.items is not None:
        return command.items.names() if not given else ()
    choose = _CHOICES.get(name)
    return choose(given) if choose is not None else ()


def _capability(given: Sequence[str]) -> Iterable[str]:
    if not given:
        return (capability.name for capability in CAPABILITIES)
    return SWITCH if len(given) == 1 else ()


def _parameter(given: Sequence[str]) -> Iterable[str]:
    if not given:
        return (parameter.name for parameter in PARAMETERS)
    if len(given) > 1:
        return ()
    known = next((one for one in PARAMETERS if one.name == given[0]), None)
    if known is None:
        return ()
    return SWITCH if known.kind is Kind.BOOL else known.values


def _state(given: Sequence[str]) -> Iterable[str]:
    return () if given else (status.value for status in Status)


_CHOICES: Final[Mapping[str, Callable[[Sequence[str]], Iterable[str]]]] = {
    "migrate_set_capability": _capability,
    "migrate_set_parameter": _parameter,
    "migrate_continue": _state,
}
