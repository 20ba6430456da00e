"""Editing of lines with completion and history; needs prompt_toolkit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History

from engine.monitor.history import HistoryFile, history_path

Complete = Callable[[str], list[str]]


class ServerCompleter(Completer):
    """Candidates are the server's: it knows its commands, parameters and values."""

    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        line = document.text_before_cursor
        begun = "" if not line or line[-1].isspace() else line.split()[-1]
        for candidate in self._complete(line):
            yield Completion(candidate, start_position=-len(begun))


class FileHistory(History):
    """A HistoryFile as prompt_toolkit wants it."""

    def __init__(self, file: HistoryFile) -> None:
        super().__init__()
        self._file = file

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._file.load())

    def store_string(self, string: str) -> None:
        self._file.append(string)


def editor(prompt: str, complete: Complete) -> Callable[[], str]:
    """What reads a line from the terminal; Ctrl-C raises KeyboardInterrupt, Ctrl-D EOFError."""
    session: PromptSession[str] = PromptSession(
        prompt,
        history=FileHistory(HistoryFile(history_path())),
        completer=ServerCompleter(complete),
        complete_while_typing=False,
    )
    return session.prompt
