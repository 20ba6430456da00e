"""Whole numbers as QEMU's human monitor reads them: C's numbers, signs, brackets, operators."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from engine.control.hmp.reader import Reader, WrongLine
from engine.errors import shown

UINT64_MAX: Final = 2**64 - 1
SIGN_BIT: Final = 2**63
DEPTH_MAX: Final = 32  #: brackets and signs inside each other; QEMU has no limit
OPERATORS_MAX: Final = 64  #: signs and brackets too: one expression must not keep the engine
DIGITS_MAX: Final = len(str(UINT64_MAX))
_NUMBER: Final = re.compile(r"0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*)", re.ASCII)
_REGISTER: Final = re.compile(r"[A-Za-z0-9_.]*")


def signed(value: int) -> int:
    """What 64 bits hold of it, as C's int64_t."""
    value &= UINT64_MAX
    return value - 2**64 if value & SIGN_BIT else value


def _divide(one: int, other: int) -> int:
    """C's division: towards zero.

    :raise WrongLine: by zero."""
    if other == 0:
        raise WrongLine("division by zero")
    quotient = abs(one) // abs(other)
    return quotient if (one < 0) == (other < 0) else -quotient


_PRODUCTS: Final[dict[str, Callable[[int, int], int]]] = {
    "*": lambda one, other: one * other,
    "/": _divide,
    "%": lambda one, other: one - _divide(one, other) * other,
}
_LOGIC: Final[dict[str, Callable[[int, int], int]]] = {
    "&": lambda one, other: one & other,
    "|": lambda one, other: one | other,
    "^": lambda one, other: one ^ other,
}
_SUMS: Final[dict[str, Callable[[int, int], int]]] = {
    "+": lambda one, other: one + other,
    "-": lambda one, other: one - other,
}
#: QEMU's order, weakest first; it differs from C's: `&` binds tighter than `+`.
_LEVELS: Final = (_SUMS, _LOGIC, _PRODUCTS)


class Expression:
    """One expression at a reader's position; ends where it ends."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._depth = 0
        self._operators = 0

    def value(self) -> int:
        """A signed number of 64 bits.

        :raise WrongLine: with QEMU's text."""
        self._reader.skip_spaces()
        return self._level(0)

    def _level(self, level: int) -> int:
        if level == len(_LEVELS):
            return self._unary()
        value = self._level(level + 1)
        while (operator := self._reader.here) and operator in _LEVELS[level]:
            self._operator()
            value = signed(_LEVELS[level][operator](value, self._level(level + 1)))
        return value

    def _operator(self) -> None:
        self._operators += 1
        if self._operators > OPERATORS_MAX:
            raise WrongLine(f"an expression may have {OPERATORS_MAX} operators")
        self._next()

    def _next(self) -> None:
        self._reader.position += 1
        self._reader.skip_spaces()

    def _unary(self) -> int:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise WrongLine(f"an expression may have {DEPTH_MAX} brackets inside each other")
        try:
            match self._reader.here:
                case "":
                    raise WrongLine("unexpected end of expression")
                case "+":
                    self._operator()
                    return self._unary()
                case "-":
                    self._operator()
                    return signed(-self._unary())
                case "~":
                    self._operator()
                    return ~self._unary()
                case "(":
                    return self._brackets()
                case "'":
                    return self._character()
                case "$":
                    self._reader.position += 1
                    _take(_REGISTER, self._reader)
                    raise WrongLine("unknown register")  # a guest here shows none
            return self._number()
        finally:
            self._depth -= 1

    def _brackets(self) -> int:
        self._operator()
        value = self._level(0)
        if self._reader.here != ")":
            raise WrongLine("')' expected")
        self._next()
        return value

    def _character(self) -> int:
        self._reader.position += 1
        character = self._reader.here
        if not character:
            raise WrongLine("character constant expected")
        self._reader.position += 1
        if self._reader.here != "'":
            raise WrongLine("missing terminating ' character")
        self._next()
        return ord(character)

    def _number(self) -> int:
        match = _take(_NUMBER, self._reader)
        if match is None:
            raise WrongLine(f"invalid char '{shown(self._reader.here)}' in expression")
        digits, base = next(
            (group, base) for group, base in zip(match.groups(), (16, 8, 10), strict=True)
            if group is not None
        )  # fmt: skip
        is_long = base == 10 and len(digits) > DIGITS_MAX  # what int() refuses to read
        value = UINT64_MAX + 1 if is_long else int(digits or "0", base)
        if value > UINT64_MAX:
            raise WrongLine("number too large")
        self._reader.skip_spaces()
        return signed(value)


def _take(pattern: re.Pattern[str], reader: Reader) -> re.Match[str] | None:
    match = pattern.match(reader.text, reader.position)
    if match is not None:
        reader.position = match.end()
    return match
