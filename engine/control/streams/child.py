"""The program of `exec:`: a child of ours in a process group of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Sequence

from engine.errors import MigrationError, shown

log = logging.getLogger("ramferry.stream")


class Child:
    """Owns the process: it is waited for, and nothing of its group outlives `end`."""

    def __init__(self, args: Sequence[str], stdin: int, stdout: int) -> None:
        """Start it; both descriptors stay the caller's, stderr is ours.

        :raise MigrationError: QEMU's text, when it cannot be started."""
        try:
            self._process = subprocess.Popen(
                list(args), stdin=stdin, stdout=stdout, process_group=0
            )
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            program = shown(args[0])
            raise MigrationError(
                f"Failed to execute child process \u201c{program}\u201d ({reason})"
            ) from None
        loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] = loop.create_future()
        self._pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._status.set_result(self._process.wait())

    async def wait(self) -> int:
        """Its exit status, negative for a signal; any number may wait."""
        return await asyncio.shield(self._status)

    @staticmethod
    def describe(status: int) -> str:
        """For people."""
        if status >= 0:
            return f"the command ended with exit status {status}"
        with contextlib.suppress(ValueError):
            return f"the command was ended by {signal.Signals(-status).name}"
        return f"the command was ended by signal {-status}"

    async def end(self, wait_s: float = 0.0) -> None:
        """Wait for its own end for so long, then kill what is left of its group. Idempotent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self.wait()
