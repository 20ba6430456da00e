"""The human monitor without its connection: a line in, text out."""

from __future__ import annotations

import logging
from typing import Final

from engine.control.hmp.console import Console
from engine.control.hmp.held import Held
from engine.control.hmp.parser import parse_arguments
from engine.control.hmp.reader import Reader, WrongLine
from engine.control.hmp.table import CommandTable
from engine.control.hmp.telnet import LINE_BYTES_MAX
from engine.errors import MigrationError

TOO_LONG: Final = f"Error: a line may have {LINE_BYTES_MAX} bytes"

log = logging.getLogger("ramferry.hmp")


class HumanMonitor:
    """Runs lines; has no state of its own, so any number of clients share it.

    :ivar table: some of its commands look at the table and run lines, so it is filled in later.
    :ivar held: what a suspended client waits for."""

    def __init__(self, held: Held) -> None:
        self.table = CommandTable([])
        self.held = held

    async def run(self, line: str, console: Console) -> None:
        """Run one line; whatever happens is text on the console, and never an exception."""
        if len(line.encode(errors="replace")) > LINE_BYTES_MAX:
            console.refuse(TOO_LONG)
            return
        reader = Reader(line)
        try:
            command = self.table.find(reader)
            if command is None:
                return
            begin = reader.position
            try:
                values = parse_arguments(command.name, command.arguments, reader.rest())
            except WrongLine as exc:
                called = reader.text[:begin].rstrip()
                raise WrongLine(f'{exc}\nTry "help {called}" for more information') from exc
            await command.handler(console, values)
        except WrongLine as exc:
            console.refuse(str(exc))
        except MigrationError as exc:
            console.refuse(f"Error: {exc}")
        except Exception as exc:
            log.exception("internal error in a command of the human monitor")
            console.refuse(f"Error: internal error: {exc!r}")
