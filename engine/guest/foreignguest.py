"""Guests in processes that others have started: `--guest qemu:...` and `--guest process:...`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import Final

from engine.errors import GuestError, MemoryRefused, MigrationError
from engine.guest import messages
from engine.guest.agentguest import AgentGuest
from engine.guest.base import Handover, Missing, TrackedBlock, TrackerName, Tracking
from engine.guest.link import AgentLink, start_agent
from engine.guest.qmpclient import QmpClient
from engine.guest.throttling import Undoing
from engine.memory.blocks import RamBlock
from engine.wire import STATE_BYTES_MAX

log = logging.getLogger("ramferry.guest")

AGENT: Final = "engine.guest.foreign_agent"
ATTACH_WAIT_S: Final = 30.0  #: QMP, and a look at the mappings of all processes
#: To inject, and to call terabytes clean; a `stop` that waits for disks; QEMU's own migration.
LONG_WAIT_S: Final = 40.0


class ForeignGuest(AgentGuest):
    """A process that others have started and will end; owns the agent's process and the descriptors
    of RAM."""

    def __init__(
        self,
        kind: str,
        proceed: Callable[[], None],
        link: AgentLink,
        started: messages.ForeignStarted,
        fds: list[int],
    ) -> None:
        """Take link and descriptors over.

        :param proceed: has the process run, without an agent."""
        super().__init__(link, running=started.running, stopped=not started.running)
        self._kind, self._proceed, self.pid = kind, proceed, started.pid
        self._undoing: Undoing | None = None  #: of a throttle, if its agent is killed
        self._is_held = False  #: stopped for a migration, and still its own
        self._rescuing: asyncio.Task[None] | None = None
        shapes = zip(started.names, started.sizes, fds, started.page_sizes, strict=True)
        self._blocks = tuple(RamBlock(*shape) for shape in shapes)

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        return self._blocks

    async def writes(self) -> int | None:
        return None

    async def pause(self, *, for_migration: bool) -> int:
        self._is_held = self._is_held or for_migration
        return await super().pause(for_migration=for_migration)

    async def resume(self, *, for_migration: bool) -> None:
        await super().resume(for_migration=for_migration)
        self._is_held = self._is_held and not for_migration

    async def throttle(self, percent: int) -> str:
        if self._undoing is None and percent:
            self._undoing = await asyncio.to_thread(Undoing, self.pid)
        way = await super().throttle(percent)
        log.info("%s (pid %d): throttle of %d percent by %s", self._kind, self.pid, percent, way)
        return way

    async def open_missing(self) -> Missing:
        """Not built yet."""
        raise MemoryRefused(
            f"{self._kind} (pid {self.pid}) cannot run before all of its memory is there, for "
            "postcopy of such a guest is not built yet; postcopy needs a workload guest"
        )

    async def close_missing(self) -> None:
        """Nothing was opened."""

    async def release_ram(self) -> None:
        """RAM is the process's, and stays as long as it lives."""

    async def hand_over(self, wait_ns: int, *, keeps_ram: bool = False) -> Handover:
        """As every guest does; its RAM stays, `keeps_ram` or not."""
        self._is_held = False  # from here on only an answer tells whose it is
        outcome = await super().hand_over(wait_ns)
        self._is_held = outcome is Handover.REFUSED
        return outcome

    async def _change(self, request: messages.Pause | messages.Resume) -> int:
        at, _ = await self._link.ask(request, messages.At, wait_s=LONG_WAIT_S)
        self._is_running, self._is_stopped_by_user = at.running, at.stopped
        return at.at_ns

    async def start_tracking(self, wanted: TrackerName | None) -> Tracking:
        self._close_tracking_fd()
        request = messages.StartTracking(self._link.next_id(), wanted.value if wanted else "")
        tracked, fds = await self._link.ask(request, messages.TrackedBlocks, wait_s=LONG_WAIT_S)
        if len(fds) != 1 or len(tracked.addresses) != len(self._blocks):
            messages.close_all(fds)
            raise GuestError("the agent tracks without telling what")
        self._tracking_fd = fds[0]
        blocks = (TrackedBlock(self._tracking_fd, address) for address in tracked.addresses)
        return Tracking(TrackerName(tracked.name), tuple(blocks), tracked.reason)

    async def save_state(self) -> bytes:
        request = messages.SaveState(self._link.next_id())
        state, fds = await self._link.ask(request, messages.LongState, wait_s=LONG_WAIT_S)
        try:
            if len(fds) != 1:
                raise GuestError("the agent saved a state without giving it")
            content = os.pread(fds[0], STATE_BYTES_MAX, 0)
        finally:
            messages.close_all(fds)
        if len(content) != state.size:
            raise GuestError(f"the agent saved {state.size} bytes and gave {len(content)}")
        return content

    async def load_state(self, state: bytes) -> None:
        fd = os.memfd_create("ramferry-state", os.MFD_CLOEXEC)
        try:
            os.write(fd, state)
            request = messages.LoadLongState(self._link.next_id(), len(state))
            await self._link.ask(request, messages.Done, [fd], wait_s=LONG_WAIT_S)
        finally:
            os.close(fd)

    async def died(self) -> str:
        reason = await self._link.died()
        if self._rescuing is None:
            self._rescuing = asyncio.get_running_loop().create_task(self._rescue())
        await asyncio.shield(self._rescuing)
        return f"{self._kind} (pid {self.pid}) or its agent is gone: {reason}"

    async def _rescue(self) -> None:
        """An agent that was killed leaves what it had slowed down or stopped: undo it in its place.

        Nobody else can have it: the right to run had not been given away."""
        if self._undoing is not None and self._is_running:
            await asyncio.to_thread(self._undoing.undo)
        if not self._is_held or self._is_stopped_by_user or not self._is_open:
            return
        self._is_held = False
        try:
            await asyncio.to_thread(self._proceed)
        except (MigrationError, OSError) as exc:
            log.error("%s (pid %d) stands, and its agent is gone: %s", self._kind, self.pid, exc)

    async def quit(self) -> None:
        """Let go of the process, which lives on."""
        if not self._is_open:
            return
        self._is_open = False
        self._is_running = False
        await self._link.end()
        await self._stop_telling()
        if self._rescuing is not None:
            await self._rescuing
        if self._undoing is not None:
            self._undoing.close()
        self._close_tracking_fd()
        for block in self._blocks:
            os.close(block.fd)


def _continue_qemu(path: str) -> None:
    """:raise GuestError: QEMU is gone, or does not do it."""
    qmp = QmpClient(path)
    try:
        qmp.execute("cont")
    finally:
        qmp.close()


async def attach_qemu(path: str, *, incoming: bool) -> ForeignGuest:
    """Attach to the QEMU whose QMP server listens at `path`; it runs or stands as before.

    :raise MigrationError: one line that says what is missing; the QEMU is as before."""
    where = os.path.abspath(path)
    link = start_agent(AGENT)
    request = messages.StartQemu(link.next_id(), where, incoming)
    return await _attach("qemu", lambda: _continue_qemu(where), link, request)


async def attach_process(pid: int, path: str, *, incoming: bool) -> ForeignGuest:
    """Attach to a process that maps the file; one that takes a memory over stands until then.

    :raise MigrationError: one line that says what is missing; the process is as before."""
    link = start_agent(AGENT)
    request = messages.StartProcess(link.next_id(), pid, os.path.abspath(path), incoming)
    return await _attach("process", lambda: os.kill(pid, signal.SIGCONT), link, request)


async def _attach(
    kind: str,
    proceed: Callable[[], None],
    link: AgentLink,
    request: messages.StartQemu | messages.StartProcess,
) -> ForeignGuest:
    """Take the link over, also on failure."""
    try:
        started, fds = await link.ask(request, messages.ForeignStarted, wait_s=ATTACH_WAIT_S)
    except (MigrationError, asyncio.CancelledError):
        await link.end()
        raise
    if len(fds) != len(started.names):
        messages.close_all(fds)
        await link.end()
        raise GuestError("the agent did not hand RAM over")
    return ForeignGuest(kind, proceed, link, started, fds)
