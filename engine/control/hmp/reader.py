"""A position in a line, and QEMU's words there."""

from __future__ import annotations

from typing import Final

from engine.errors import UsageError

SPACES: Final = " \t\n\v\f\r"  #: C's isspace
_ESCAPES: Final = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


class WrongLine(UsageError):
    """A line that is no command with its arguments; printed as it is, without `Error:`."""


class Reader:
    """Text and a position in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    @property
    def is_at_end(self) -> bool:
        return self.position >= len(self.text)

    @property
    def here(self) -> str:
        """The character at the position; empty at the end."""
        return self.text[self.position : self.position + 1]

    def skip_spaces(self) -> None:
        while not self.is_at_end and self.here in SPACES:
            self.position += 1

    def until(self, ends: str) -> str:
        """All before the next of `ends`, or before the end; the position is there then."""
        begin = self.position
        while not self.is_at_end and self.here not in ends:
            self.position += 1
        return self.text[begin : self.position]

    def rest(self) -> str:
        """All that is left."""
        begin, self.position = self.position, len(self.text)
        return self.text[begin:]

    def word(self) -> str | None:
        """A word, or a string in double quotes with C's escapes; None at the end.

        :raise WrongLine: the string has no end, or an escape that nobody knows."""
        self.skip_spaces()
        if self.is_at_end:
            return None
        if self.here != '"':
            return self.until(SPACES)
        self.position += 1
        parts = []
        while (part := self._in_quotes()) is not None:
            parts.append(part)
        return "".join(parts)

    def _in_quotes(self) -> str | None:
        """The next piece of a string; None behind its closing quote."""
        if piece := self.until('"\\'):
            return piece
        if self.is_at_end:
            raise WrongLine("unterminated string")
        mark = self.here
        self.position += 1
        if mark == '"':
            return None
        if self.is_at_end:
            raise WrongLine("unterminated string")
        escape = self.here
        self.position += 1
        if escape not in _ESCAPES:
            raise WrongLine(f"unsupported escape code: '\\{escape}'")
        return _ESCAPES[escape]
