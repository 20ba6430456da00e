"""The two ways to use a monitor: single commands, and a conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final, TextIO

import click

from engine.control.uri import Address
from engine.errors import MigrationError, UsageError
from engine.monitor.connection import PROMPT, Answer, Connection, parse_address

COMPLETE_WAIT_S: Final = 2.0
LEAVING: Final = ("quit", "q")
NO_EDITOR: Final = (
    "prompt_toolkit is not installed: no history and no completion here; "
    "pip install 'ramferry[monitor]'"
)

#: The next line that the user gives. EOFError: no more; KeyboardInterrupt: not this one.
ReadLine = Callable[[], str]


def run_commands(where: str, commands: Sequence[str]) -> int:
    """Run each and print its output; 1 at the first that is refused, else 0.

    No command waits for a migration.

    :raise UsageError: nobody to connect to, or a command that is not one line.
    :raise MigrationError: the server went away before it answered."""
    connection = Connection(parse_address(where))
    try:
        for command in commands:
            if not command.strip():
                continue
            answer = connection.ask(f"x_once {command}")
            verdict, _, text = answer.text.partition("\n")
            _show(text if verdict in ("ok", "error") else answer.text)
            if answer.is_last and (verdict != "ok" or command.strip() not in LEAVING):
                raise MigrationError("the monitor closed the connection")
            if verdict != "ok":
                return 1
            if answer.is_last:
                break
    finally:
        connection.close()
    return 0


def run_interactive(where: str) -> int:
    """Talk until the user leaves or quits the server; return the exit code.

    On a terminal with completion and history, else line by line from stdin.

    :raise UsageError: nobody to connect to.
    :raise MigrationError: the server went away."""
    is_terminal = _is_terminal(sys.stdin)
    conversation = Conversation(parse_address(where), is_terminal=is_terminal)
    try:
        return conversation.run(_reader(conversation))
    finally:
        conversation.close()


def _is_terminal(stream: TextIO | None) -> bool:
    """None, where the shell has closed it, is none."""
    return stream is not None and stream.isatty()


def _reader(conversation: Conversation) -> ReadLine:
    if not (_is_terminal(sys.stdin) and _is_terminal(sys.stdout)):
        return _piped
    try:
        from engine.monitor.editor import editor
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "prompt_toolkit":
            raise
        _say(NO_EDITOR)
        return lambda: input(PROMPT.decode())
    return editor(PROMPT.decode(), conversation.complete)


def _piped() -> str:
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    if not line:
        raise EOFError
    return line.decode(errors="surrogateescape").rstrip("\r\n")


class Conversation:
    """A connection that is made anew when the user does not want to wait for an answer."""

    def __init__(self, address: Address, *, is_terminal: bool) -> None:
        """:raise UsageError: nobody to connect to."""
        self._address, self._is_terminal = address, is_terminal
        self._connection: Connection | None = Connection(address)

    def run(self, read_line: ReadLine) -> int:
        """Lines out and answers in, until the user leaves (0) or quits the server (0)."""
        while True:
            try:
                line = read_line()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                continue
            answer = self._ask(line)
            if answer is None:
                continue
            _show(answer.text)
            if answer.is_last:
                if line.strip() in LEAVING:
                    return 0
                raise MigrationError("the monitor closed the connection")

    def _ask(self, line: str) -> Answer | None:
        """None: the user did not want to wait.

        :raise MigrationError: the server is gone."""
        if self._connection is None:
            try:
                self._connection = Connection(self._address)
            except UsageError as exc:  # it was there at first
                raise MigrationError(f"the monitor is gone: {exc}") from exc
        try:
            return self._connection.ask(line)
        except KeyboardInterrupt:
            self.close()
            if not self._is_terminal:
                raise
            if line.split()[:1] == ["migrate"]:
                _say(
                    "\ndetached: the migration goes on; 'info migrate' shows it, "
                    "'migrate_cancel' ends it"
                )
            else:
                _say("\ndetached: the command goes on")
            return None

    def complete(self, line: str) -> list[str]:
        """What may stand for the last word; nothing where the server does not say."""
        if self._connection is None:
            return []
        try:
            answer = self._connection.ask(f"x_once x_complete {line}", COMPLETE_WAIT_S)
        except MigrationError:
            self.close()  # an answer that comes later would be taken for another line's
            return []
        verdict, _, candidates = answer.text.partition("\n")
        return candidates.splitlines() if verdict == "ok" else []

    def close(self) -> None:
        """Idempotent; the next line connects again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _show(text: str) -> None:
    click.echo(text.encode(errors="backslashreplace"), nl=False)


def _say(text: str) -> None:
    """A line of the client itself, apart from what the server prints."""
    click.echo(text, err=True)
