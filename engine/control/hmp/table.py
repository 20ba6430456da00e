"""The commands of the human monitor: names, arguments, help, and how a line finds its command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from engine.control.hmp.console import Console
from engine.control.hmp.parser import Argument, Values
from engine.control.hmp.reader import SPACES, Reader, WrongLine
from engine.errors import shown

HELP_WORDS_MAX: Final = 16  #: words of `help a b c` that are looked at, as in QEMU

Handler = Callable[[Console, Values], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class HmpCommand:
    """One command, or one item of a command such as `info`.

    :ivar name: all names with `|` between them, as QEMU writes them.
    :ivar parameters: how help shows the arguments.
    :ivar items: commands of the second level."""

    name: str
    handler: Handler
    arguments: tuple[Argument, ...] = ()
    parameters: str = ""
    help: str = ""
    items: CommandTable | None = field(default=None, repr=False)

    @property
    def names(self) -> list[str]:
        return self.name.split("|")


class CommandTable:
    """Commands by name; in QEMU's order, which is that of the alphabet."""

    def __init__(self, commands: Sequence[HmpCommand]) -> None:
        self._commands = sorted(commands, key=lambda command: command.name)
        self._by_name = {name: command for command in commands for name in command.names}
        assert len(self._by_name) == sum(len(command.names) for command in commands)

    def names(self) -> list[str]:
        """Every name, aliases too, sorted."""
        return sorted(self._by_name)

    def get(self, name: str) -> HmpCommand | None:
        return self._by_name.get(name)

    def find(self, reader: Reader) -> HmpCommand | None:
        """The command at the reader's position, down to the item; the reader is behind it then.

        None: there is nothing but spaces.

        :raise WrongLine: unknown."""
        reader.skip_spaces()
        if reader.is_at_end:
            return None
        name = reader.until(SPACES + "/")
        command = self._by_name.get(name)
        if command is None:
            raise WrongLine(f"unknown command: '{shown(reader.text[: reader.position])}'")
        reader.skip_spaces()
        if command.items is not None and not reader.is_at_end:
            return command.items.find(reader)
        return command

    def help(self, words: Sequence[str]) -> list[str]:
        """The lines of `help`, of `help info`, or of one command.

        :raise WrongLine: unknown."""
        return self._help(list(words[:HELP_WORDS_MAX]), 0)

    def _help(self, words: list[str], index: int) -> list[str]:
        prefix = "".join(f"{word} " for word in words[:index])
        if index >= len(words):
            return [prefix + _line(command) for command in self._commands]
        command = self._by_name.get(words[index])
        if command is None:
            raise WrongLine(f"unknown command: '{shown(' '.join(words[: index + 1]))}'")
        if command.items is None:
            return [prefix + _line(command)]
        return command.items._help(words, index + 1)


def _line(command: HmpCommand) -> str:
    return f"{command.name} {command.parameters} -- {command.help}"
