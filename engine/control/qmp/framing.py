"""Cut a byte stream into JSON values, however its writer has split or joined them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from engine.errors import WireError

VALUE_BYTES_MAX: Final = 1024 * 1024
DEPTH_MAX: Final = 1024  #: QEMU's MAX_NESTING

_MARKS: Final = re.compile(rb'[{}\[\]"\\\s]')
_SPACES: Final = b" \t\r\n"


class JsonSplitter:
    """Holds the bytes of a value that has not ended yet; at most VALUE_BYTES_MAX.

    A value too long or too deep, or a word that stands where a value should begin, is one WireError
    in the sequence; what follows is read as if nothing had been."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0  #: everything before it was looked at
        self._depth = 0
        self._in_string = False
        self._skips = False  #: inside a value that was refused already

    def feed(self, data: bytes) -> Iterator[bytes | WireError]:
        """Take more bytes; yield every value that they end, in order."""
        self._buffer += data
        while True:
            mark = _MARKS.search(self._buffer, self._position)
            if mark is None:
                self._position = len(self._buffer)
                break
            if not self._depth and not self._in_string:
                yield from self._outside(mark.start())
                continue
            if self._buffer[mark.start()] == ord("\\"):
                if self._in_string and mark.start() + 1 == len(self._buffer):
                    self._position = mark.start()  # what it escapes has not come yet
                    break
                self._position = mark.start() + (2 if self._in_string else 1)
                continue
            self._position = mark.end()
            if self._inside(self._buffer[mark.start()]):
                value = bytes(self._buffer[: self._position])
                del self._buffer[: self._position]
                self._position = 0
                skipped, self._skips = self._skips, False
                if not skipped:
                    yield value
            elif self._depth > DEPTH_MAX and not self._skips:
                self._skips = True
                yield WireError("JSON nesting depth limit exceeded")
        if len(self._buffer) > VALUE_BYTES_MAX:
            yield from self._too_long()

    def _outside(self, position: int) -> Iterator[WireError]:
        """Between values: spaces are dropped, an opening begins a value, the rest is a mistake."""
        word = bytes(self._buffer[:position]).strip(_SPACES)
        mark = self._buffer[position]
        opens = mark in b"{["
        del self._buffer[: position if opens else position + 1]
        self._position = 1 if opens else 0
        self._depth = int(opens)
        if word:
            yield WireError(f"invalid keyword '{word[:40].decode(errors='replace')}'")
        if not opens and mark not in _SPACES:
            yield WireError(f"stray '{chr(mark)}'")

    def _inside(self, mark: int) -> bool:
        """Follow one mark inside a value; True when the value ends with it."""
        if mark == ord('"'):
            self._in_string = not self._in_string
        elif not self._in_string:
            if mark in b"{[":
                self._depth += 1
            elif mark in b"}]":
                self._depth -= 1
        return self._depth == 0

    def _too_long(self) -> Iterator[WireError]:
        if not self._skips:
            yield WireError(f"token size limit exceeded: {VALUE_BYTES_MAX} bytes are allowed")
        self._skips = self._depth > 0
        self._buffer.clear()
        self._position = 0
