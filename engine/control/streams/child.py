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
    """Owns the process: it is waited for, and nothing of its group outlives `kill`.

    It stays a zombie until then: its number, and its group's, are nobody else's meanwhile."""

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
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        loop.add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        found = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT)
        os.close(self._pidfd)
        assert found is not None, "it is readable because the process has ended"
        is_exit = found.si_code == os.CLD_EXITED
        self._status.set_result(found.si_status if is_exit else -found.si_status)

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

    async def end(self, wait_s: float) -> None:
        """After a success: wait for its own end for so long, and kill it if it does not come. What
        it has left behind by itself may still be carrying the stream, and is let be. Idempotent."""
        try:
            async with asyncio.timeout(wait_s):
                await self.wait()
        except TimeoutError:
            await self.kill()
        self._process.wait()

    async def kill(self) -> None:
        """Kill all that is left of its group. Idempotent."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self.wait()
            self._process.wait()
