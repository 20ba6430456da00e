"""Lines from the bytes of a client: nc, socat, a script, or telnet with its options."""

from __future__ import annotations

import enum
import re
from typing import Final

LINE_BYTES_MAX: Final = 4095  #: QEMU's READLINE_CMD_BUF_SIZE; what is longer is one refused line

IAC, SE, SB, INTERRUPT = 255, 240, 250, 244
WITH_OPTION: Final = range(251, 255)  #: WILL, WONT, DO, DONT
_SPECIAL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f\xff]")


class Overlong:
    """In place of a line that had more than LINE_BYTES_MAX bytes."""


class _In(enum.Enum):
    TEXT = enum.auto()
    COMMAND = enum.auto()  #: behind IAC
    OPTION = enum.auto()  #: behind IAC WILL and the like
    SUBNEGOTIATION = enum.auto()
    SUBNEGOTIATION_COMMAND = enum.auto()  #: behind an IAC in there


class LineSplitter:
    """Bytes in, whole lines out; holds LINE_BYTES_MAX bytes at most.

    A line ends with LF, CR LF, CR NUL or CR. Telnet's commands and options are dropped: nothing is
    agreed to, so the client stays as it is. Backspace takes a character back, Ctrl-C, Ctrl-U and
    telnet's interrupt take the line back; other control characters are dropped."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._is_overlong = False
        self._state = _In.TEXT
        self._was_return = False

    @property
    def waiting_bytes(self) -> int:
        """Of the line that has not ended; LINE_BYTES_MAX at most."""
        return len(self._line)

    def feed(self, data: bytes) -> list[bytes | Overlong]:
        """The lines that these bytes end."""
        lines: list[bytes | Overlong] = []
        position = 0
        while position < len(data):
            if self._state is _In.TEXT:
                special = _SPECIAL.search(data, position)
                end = special.start() if special else len(data)
                self._add(data[position:end])
                if special:
                    self._take_special(data[end], lines)
                position = end + 1
            else:
                self._take_telnet(data[position])
                position += 1
        return lines

    def _add(self, text: bytes) -> None:
        if text:
            self._was_return = False
        self._is_overlong |= len(self._line) + len(text) > LINE_BYTES_MAX
        if not self._is_overlong:
            self._line += text

    def _take_special(self, byte: int, lines: list[bytes | Overlong]) -> None:
        was_return, self._was_return = self._was_return, byte == ord("\r")
        match byte:
            case 0x0A | 0x0D:
                if byte == 0x0D or not was_return:
                    lines.append(Overlong() if self._is_overlong else bytes(self._line))
                    self._clear()
            case 0x08 | 0x7F:
                self._take_back()
            case 0x03 | 0x15:
                self._clear()
            case 0xFF:
                self._state = _In.COMMAND

    def _take_back(self) -> None:
        """Drop the last character, all its bytes."""
        while self._line and self._line.pop() & 0xC0 == 0x80:
            continue

    def _clear(self) -> None:
        self._line.clear()
        self._is_overlong = False

    def _take_telnet(self, byte: int) -> None:
        match self._state:
            case _In.SUBNEGOTIATION:
                if byte == IAC:
                    self._state = _In.SUBNEGOTIATION_COMMAND
            case _In.SUBNEGOTIATION_COMMAND:
                self._state = _In.TEXT if byte == SE else _In.SUBNEGOTIATION
            case _In.COMMAND if byte in WITH_OPTION:
                self._state = _In.OPTION
            case _In.COMMAND if byte == SB:
                self._state = _In.SUBNEGOTIATION
            case _In.COMMAND if byte == IAC:
                self._state = _In.TEXT
                self._add(b"\xff")
            case _In.COMMAND if byte == INTERRUPT:
                self._state = _In.TEXT
                self._clear()
            case _:
                self._state = _In.TEXT
