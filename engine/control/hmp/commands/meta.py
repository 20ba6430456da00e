"""Commands about commands: help, completion, and a line that must not wait."""

from __future__ import annotations

from engine.control.hmp.completion import complete
from engine.control.hmp.console import Console
from engine.control.hmp.monitor import HumanMonitor
from engine.control.hmp.parser import Argument, Kind, Values
from engine.control.hmp.reader import SPACES, Reader
from engine.control.hmp.table import CommandTable, HmpCommand
from engine.errors import UsageError

ONCE = "x_once"


class Meta:
    """Handlers."""

    def __init__(self, monitor: HumanMonitor) -> None:
        self._monitor = monitor

    async def help(self, console: Console, values: Values) -> None:
        reader = Reader(str(values.get("name", "")))
        words = []
        while (word := reader.word()) is not None:
            words.append(word)
        console.print(*self._monitor.table.help(words))

    async def info(self, console: Console, values: Values) -> None:
        console.print(*self._monitor.table.help(["info"]))

    async def complete(self, console: Console, values: Values) -> None:
        console.print(*complete(self._monitor.table, str(values.get("line", ""))))

    async def once(self, console: Console, values: Values) -> None:
        """`ok` or `error` in the first line, then what the line prints."""
        line = str(values["line"])
        if Reader(line).until(SPACES + "/") == ONCE:
            raise UsageError(f"{ONCE} takes another command")
        inner = Console(can_wait=False)
        await self._monitor.run(line, inner)
        console.print("error" if inner.is_error else "ok")
        console.adopt(inner)


def commands(monitor: HumanMonitor, items: CommandTable) -> list[HmpCommand]:
    """This subject's commands; two of them are ours."""
    does = Meta(monitor)
    return [
        HmpCommand(
            "help|?", does.help, (Argument("name", Kind.REST, True),), "[cmd]", "show the help"
        ),
        HmpCommand(
            "info", does.info, (), "[subcommand]",
            "show various information about the system state", items,
        ),
        HmpCommand(
            "x_complete", does.complete, (Argument("line", Kind.REST, True),), "[line]",
            "what may stand for the last word of line; a space at its end begins a new word",
        ),
        HmpCommand(
            ONCE, does.once, (Argument("line", Kind.REST),), "line",
            "'ok' or 'error', then what the line prints; it never waits for a migration",
        ),
    ]  # fmt: skip
