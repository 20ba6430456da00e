"""A line of the human monitor, taken apart by the rules of QEMU's monitor/hmp.c."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.control.hmp.expression import Expression
from engine.control.hmp.quantities import read_seconds, read_size
from engine.control.hmp.reader import SPACES, Reader, WrongLine
from engine.errors import shown

INT32_BITS: Final = 32

Value = str | int | float | bool
Values = dict[str, Value]


class Kind(enum.Enum):
    """How an argument is written; values are the letters of QEMU's `args_type`."""

    TEXT = "s"  #: one word, or a string in double quotes
    REST = "S"  #: all that is left of the line
    FLAG = "-"  #: `-x`, or nothing
    SWITCH = "b"  #: `on` or `off`
    INTEGER = "l"  #: an expression of 64 bits
    INTEGER32 = "i"
    SIZE = "o"  #: bytes; without a suffix MiB
    SECONDS = "T"  #: a number, with `ms`, `us` or `ns` behind it or nothing


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command.

    :ivar letter: of a flag."""

    name: str
    kind: Kind = Kind.TEXT
    is_optional: bool = False
    letter: str = ""


def flag(name: str, letter: str) -> Argument:
    """An argument that is `-letter`, and false where that is not given."""
    return Argument(name, Kind.FLAG, True, letter)


def parse_arguments(command: str, declared: Sequence[Argument], text: str) -> Values:
    """Values by name; flags that were not given are false, optional ones that were not are absent.

    :param command: the names of the command as QEMU writes them, such as `stop|s`.
    :raise WrongLine: with QEMU's text."""
    reader = Reader(text)
    values: Values = {}
    for index, argument in enumerate(declared):
        reader.skip_spaces()
        if argument.kind is Kind.FLAG:
            later = [other.letter for other in declared[index + 1 :] if other.letter]
            values[argument.name] = _read_flag(command, argument.letter, later, reader)
        elif not (argument.is_optional and reader.is_at_end):
            values[argument.name] = _read_value(command, argument, reader)
    reader.skip_spaces()
    if not reader.is_at_end:
        raise WrongLine(f"{command}: extraneous characters at the end of line")
    return values


def _read_flag(command: str, letter: str, later: Sequence[str], reader: Reader) -> bool:
    """Whether this flag stands here; one that a later argument takes is left to it."""
    if reader.here != "-":
        return False
    found = reader.text[reader.position + 1 : reader.position + 2]
    if found == letter:
        reader.position += 2
        return True
    if found in later or (not found and later):
        return False
    raise WrongLine(f"{command}: unsupported option -{shown(found)}")


def _read_value(command: str, argument: Argument, reader: Reader) -> Value:
    match argument.kind:
        case Kind.TEXT:
            return _read_word(command, reader)
        case Kind.REST:
            if reader.is_at_end:
                raise WrongLine(f"{command}: string expected")
            return reader.rest()
        case Kind.SWITCH:
            return _read_switch(reader)
        case Kind.SIZE:
            return read_size(reader)
        case Kind.SECONDS:
            return read_seconds(reader)
    value = Expression(reader).value()
    if argument.kind is Kind.INTEGER32 and value >> INT32_BITS:
        raise WrongLine(f"'{command}' has failed: integer is for 32-bit values")
    return value


def _read_word(command: str, reader: Reader) -> str:
    expected = f"{command}: string expected"
    try:
        word = reader.word()
    except WrongLine as exc:  # QEMU prints this reason on its stdout
        raise WrongLine(f"{exc}\n{expected}") from exc
    if word is None:
        raise WrongLine(expected)
    return word


def _read_switch(reader: Reader) -> bool:
    word = reader.until(SPACES)
    if word not in ("on", "off"):
        raise WrongLine("Expected 'on' or 'off'")
    return word == "on"
