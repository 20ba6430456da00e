"""Where a person's lines are kept from one session to the next."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

LINES_MAX: Final = 1000
BYTES_MAX: Final = 256 * 1024  #: a longer file is cut to its last LINES_MAX lines


def history_path() -> Path | None:
    """`ramferry/monitor-history` in the user's directory of state; None: the user has none."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        directory = Path(state) if state else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return directory / "ramferry" / "monitor-history"


class HistoryFile:
    """One line a command, oldest first. A file that cannot be used is as an empty one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def load(self) -> list[str]:
        """The last LINES_MAX lines, oldest first."""
        if self._path is None:
            return []
        try:
            data = self._path.read_bytes()
        except OSError:
            return []
        lines = data.decode(errors="replace").splitlines()[-LINES_MAX:]
        if len(data) > BYTES_MAX:
            with contextlib.suppress(OSError):
                self._path.write_text("".join(f"{line}\n" for line in lines))
        return lines

    def append(self, line: str) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError, UnicodeEncodeError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._path, "a", opener=_private) as file:
                file.write(f"{line}\n")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
