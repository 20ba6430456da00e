"""A stream of JSON values, read as QEMU reads it: values, and what is wrong, in their order.

A value ends when as many brackets and braces were closed as opened, or too many. Whatever is wrong
with it is told then, the first mistake alone. A mistake of the lexer, or an exceeded limit, ends
the value at once; what follows is read as a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from engine.control.qmp.lexer import (
    TOKEN_BYTES_MAX,
    JsonError,
    Kind,
    Lexer,
    LimitExceeded,
    Mistake,
)
from engine.control.qmp.literals import value_of

VALUE_BYTES_MAX: Final = TOKEN_BYTES_MAX
TOKENS_MAX: Final = 64 * 1024  #: each is an object of 200 bytes at most, so 13 MB a client
DEPTH_MAX: Final = 1024  #: QEMU's MAX_NESTING

_OPENING: Final = (Kind.OPEN_OBJECT, Kind.OPEN_ARRAY)
_SEPARATORS: Final = (Kind.COLON, Kind.COMMA)
_SCALARS: Final = (Kind.STRING, Kind.INTEGER, Kind.FLOAT, Kind.KEYWORD)


@dataclass(slots=True)
class Open:
    """An object or array that has not been closed.

    :ivar key: of the member whose value comes next; None in arrays, and where a key comes next.
    :ivar awaits_colon: a key has come and its colon has not.
    :ivar awaits_separator: a member or an element has come.
    """

    container: dict[str, Any] | list[Any]
    key: str | None = None
    awaits_colon: bool = False
    awaits_separator: bool = False


class Value:
    """One value in the making."""

    def __init__(self) -> None:
        self.tokens_count = 0
        self.tokens_bytes = 0
        self.braces = 0  #: opened and not closed; negative: too many were closed
        self.brackets = 0
        self.mistake: JsonError | None = None  #: the first one; the rest is only counted
        self.result: Any = None
        self._open: list[Open] = []

    def take(self, kind: Kind, text: bytes) -> bool:
        """Go on by one token; True when the value has ended.

        :raise LimitExceeded: it is larger than allowed."""
        self._count(kind, text)
        if self.mistake is None:
            try:
                self._understand(kind, text)
            except Mistake as exc:
                self.mistake = exc
                self._open.clear()
        goes_on = self.braces >= 0 and self.brackets >= 0 and (self.braces or self.brackets)
        return not goes_on

    def _count(self, kind: Kind, text: bytes) -> None:
        if kind not in _SCALARS and kind not in _SEPARATORS:
            self.braces += (kind is Kind.OPEN_OBJECT) - (kind is Kind.CLOSE_OBJECT)
            self.brackets += (kind is Kind.OPEN_ARRAY) - (kind is Kind.CLOSE_ARRAY)
        self.tokens_bytes += len(text)
        self.tokens_count += 1
        if self.tokens_bytes >= VALUE_BYTES_MAX:
            raise LimitExceeded("token size")
        if self.tokens_count > TOKENS_MAX:
            raise LimitExceeded("token count")
        if self.braces + self.brackets > DEPTH_MAX:
            raise LimitExceeded("nesting depth")

    def _understand(self, kind: Kind, text: bytes) -> None:
        if self._open and self._between_members(self._open[-1], kind):
            return
        if kind in _OPENING:
            self._open.append(Open({} if kind is Kind.OPEN_OBJECT else []))
        elif kind in _SCALARS:
            self._complete(value_of(kind, text))
        else:
            raise Mistake("expecting value")

    def _between_members(self, top: Open, kind: Kind) -> bool:
        """Take what is no value; False if a value must begin here."""
        is_object = isinstance(top.container, dict)
        closing = Kind.CLOSE_OBJECT if is_object else Kind.CLOSE_ARRAY
        if top.awaits_colon:
            if kind is not Kind.COLON:
                raise Mistake("missing : in object pair")
            top.awaits_colon = False
        elif kind is closing and (top.awaits_separator or self._is_empty(top)):
            self._open.pop()
            self._complete(top.container)
        elif top.awaits_separator:
            if kind is not Kind.COMMA:
                raise Mistake(f"expected separator in {'dict' if is_object else 'list'}")
            top.awaits_separator = False
        else:
            return False
        return True

    def _is_empty(self, top: Open) -> bool:
        return not top.container and top.key is None

    def _complete(self, value: Any) -> None:
        """Put a value that has ended where it belongs."""
        if not self._open:
            self.result = value
            return
        top = self._open[-1]
        if isinstance(top.container, list):
            top.container.append(value)
            top.awaits_separator = True
        elif top.key is None:
            if not isinstance(value, str):
                raise Mistake("key is not a string in object")
            top.key = value
            top.awaits_colon = True
        elif top.key in top.container:
            raise Mistake("duplicate key")
        else:
            top.container[top.key] = value
            top.key = None
            top.awaits_separator = True


class JsonStream:
    """Holds one value that has not ended yet, and its last token; both are bounded."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._value = Value()

    @property
    def is_at_rest(self) -> bool:
        """Nothing has been read that has not ended."""
        return self._lexer.is_at_rest and not self._value.tokens_count

    def feed(self, data: bytes) -> Iterator[Any | JsonError]:
        """Take more bytes; yield every value that they end, in order.

        What is wrong is a JsonError in the sequence, and no value is one. Numbers are int if they
        have no fraction, no exponent and 64 bits at most, else float."""
        for token in self._lexer.feed(data):
            if isinstance(token, JsonError):
                self._value = Value()
                yield token
                continue
            try:
                if not self._value.take(*token):
                    continue
                told = self._value.mistake or self._value.result
            except LimitExceeded as exc:
                told = exc
            self._value = Value()
            yield told
