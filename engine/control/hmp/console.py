"""Where a command prints, and whether its monitor can wait."""

from __future__ import annotations

from typing import Final

#: What one command may print; the longest help has a third of it.
OUTPUT_CHARACTERS_MAX: Final = 64 * 1024


class Console:
    """The output of one command line.

    :ivar can_wait: the monitor may be suspended; what stands for one (QMP) may not.
    :ivar is_error: the command was refused, or did not do what it was told.
    :ivar is_over: nothing more is read from this client.
    """

    def __init__(self, *, can_wait: bool) -> None:
        self.can_wait = can_wait
        self.is_error = False
        self.is_over = False
        self._parts: list[str] = []

    def print(self, *lines: str) -> None:
        """Whole lines."""
        self._parts.extend(f"{line}\n" for line in lines)

    def refuse(self, *lines: str) -> None:
        """Lines that say why something was not done."""
        self.is_error = True
        self.print(*lines)

    def adopt(self, other: Console) -> None:
        """What was printed there is printed here."""
        self._parts.extend(other._parts)
        self.is_error |= other.is_error
        self.is_over |= other.is_over

    @property
    def text(self) -> str:
        """What was printed, with the ends of lines that QEMU's monitor prints."""
        text = "".join(self._parts)
        if len(text) > OUTPUT_CHARACTERS_MAX:
            text = text[:OUTPUT_CHARACTERS_MAX] + "...\n"
        return text.replace("\n", "\r\n")
