"""Guests in processes that others have started: `--guest qemu:...` and `--guest process:...`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Final

from engine.errors import GuestError, MigrationError, NotHandedOver
from engine.guest import datagrams, messages
from engine.guest.agentguest import AgentGuest
from engine.guest.base import Handover, TrackerName, Tracking
from engine.guest.foreign_missing import Range, end_missing
from engine.guest.link import ADOPT_WAIT_S, DEATH_WAIT_S, AgentLink, adopt_agent, start_agent
from engine.guest.qmpclient import QmpClient
from engine.guest.rundir import default_rundir
from engine.guest.throttling import Undoing, Way
from engine.memory.blocks import RamBlock
from engine.memory.pieces import check_pieces
from engine.wire import STATE_BYTES_MAX

log = logging.getLogger("ramferry.guest")

AGENT: Final = "engine.guest.foreign_agent"
ATTACH_WAIT_S: Final = 30.0  #: QMP, and a look at the mappings of all processes
#: To inject, and to call terabytes clean; a `stop` that waits for disks; QEMU's own migration.
LONG_WAIT_S: Final = 40.0


class ForeignGuest(AgentGuest):
    """A process that others have started and will end; owns the agent's process and the descriptors
    of RAM."""

    _missing_wait_s = LONG_WAIT_S

    def __init__(
        self, link: AgentLink, started: messages.ForeignStarted, fds: list[int], pidfd: int
    ) -> None:
        """Take link and descriptors over.

        :param fds: one a block.
        :param pidfd: of the process."""
        super().__init__(link, running=started.running, stopped=started.stopped)
        self._qmp_path, self.pid = started.qmp_path, started.pid
        self.is_outcome_unknown = started.unknown
        self.is_missing_open, self.is_gone = started.missing, started.gone
        #: The token came while pages were missing: until the last one the process needs no agent.
        self._is_taken_in_part = started.missing
        self._undoing: Undoing | None = None  #: of a throttle, if its agent is killed
        self._percent = 0  #: of that throttle
        self._may_be_stopped = False  #: for a moment, by that throttle
        #: Stopped for a migration, and still its own; or just taken over, and told to run.
        self._is_held = False
        self._is_given = False  #: its agent was told to give it up, and it did not stay its own
        self._rescuing: asyncio.Task[None] | None = None
        shapes = zip(started.names, started.sizes, fds, started.page_sizes, strict=True)
        self._blocks = tuple(RamBlock(*shape) for shape in shapes)
        self._pidfd, self._has_ended = pidfd, asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._process_ended)

    def _process_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._has_ended.set()

    @property
    def kind(self) -> str:
        return "qemu" if self._qmp_path else "process"

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        return self._blocks

    async def writes(self) -> int | None:
        return None

    async def pause(self, *, for_migration: bool) -> int:
        self._is_held = self._is_held or for_migration
        return await super().pause(for_migration=for_migration)

    async def resume(self, *, for_migration: bool) -> None:
        self._may_be_stopped = self._percent > 0  # it is throttled anew, perhaps in another way
        await super().resume(for_migration=for_migration)
        self._is_held, self._is_given = self._is_held and not for_migration, False

    async def throttle(self, percent: int) -> str:
        if self._undoing is None and percent:
            self._undoing = await asyncio.to_thread(Undoing, self.pid)
        self._percent, self._may_be_stopped = percent, self._may_be_stopped or percent > 0
        way = await super().throttle(percent)
        self._may_be_stopped = percent > 0 and way == Way.STOPS.value
        log.info("%s (pid %d): throttle of %d percent by %s", self.kind, self.pid, percent, way)
        return way

    async def close_missing(self) -> None:
        """As every guest does. Its agent may have been killed: then the process has taken over, and
        we were told, or it does not run."""
        try:
            await self._do(messages.CloseMissing(self._link.next_id()), self._missing_wait_s)
            self._is_taken_in_part = False
        except GuestError:
            if not await self._has_lost_agent():
                raise
            if self._missing is None:
                return
            places = list(zip(self._blocks, self._missing.addresses, strict=True))
            uffds = self._missing.uffds
            await asyncio.to_thread(self._end_missing_alone, uffds, places)
        self.is_missing_open = False
        self._close_lent()

    def _end_missing_alone(self, uffds: Sequence[int], places: Sequence[Range]) -> None:
        """What the agent would have done."""
        end_missing(self.pid, uffds, places)

    def _hear(self, event: messages.Event) -> None:
        if isinstance(event, messages.Obeyed):
            self._is_held = False
        super()._hear(event)

    def _taken(self, event: messages.Taken) -> None:
        """Until its agent says that it runs, who is told to stands still: QEMU forgets an order
        when its client is killed."""
        self._is_taken_in_part, self._is_held = self._missing is not None, event.running
        super()._taken(event)

    @property
    def is_alive(self) -> bool:
        return self._is_open and (self._link.is_alive or self._lives_alone)

    @property
    def _lives_alone(self) -> bool:
        return self._is_taken_in_part and not self._has_ended.is_set()

    async def hand_over(self, wait_ns: int, *, keeps_ram: bool = False) -> Handover:
        with self._given_up():
            outcome = await super().hand_over(wait_ns, keeps_ram=keeps_ram)
        self._is_held = outcome is Handover.REFUSED
        self._is_given = not self._is_held
        return outcome

    async def give_away(self) -> None:
        with self._given_up():
            await super().give_away()

    @contextlib.contextmanager
    def _given_up(self) -> Iterator[None]:
        """From here on only an answer tells whose it is."""
        was_held, self._is_held, self._is_given = self._is_held, False, True
        try:
            yield
        except NotHandedOver:
            self._is_held, self._is_given = was_held, False
            raise

    async def settle(self, *, taken: bool) -> None:
        """As every guest does, also when its agent was killed with the token on its way."""
        self._is_held, self._is_given = not taken, taken
        try:
            await super().settle(taken=taken)
        except GuestError:
            if not await self._has_lost_agent():
                raise
            await self._let_run()

    async def _has_lost_agent(self) -> bool:
        """After it did not answer. Its connection ends before it does."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._link.died(), DEATH_WAIT_S)
        return not self._link.is_alive

    async def _change(self, request: messages.Pause | messages.Resume | messages.Sleep) -> int:
        at, _ = await self._link.ask(request, messages.At, wait_s=LONG_WAIT_S)
        self._is_running, self._is_stopped_by_user = at.running, at.stopped
        return at.at_ns

    async def start_tracking(self, wanted: TrackerName | None) -> Tracking:
        self._close_tracking_fds()
        self._untracked = asyncio.get_running_loop().create_future()
        request = messages.StartTracking(self._link.next_id(), wanted.value if wanted else "")
        tracked, fds = await self._link.ask(request, messages.TrackedBlocks, wait_s=LONG_WAIT_S)
        self._tracking_fds = fds
        check_pieces(tracked.pieces, self._blocks, len(fds))
        return Tracking(
            TrackerName(tracked.name),
            tracked.reason,
            tuple(fds),
            tuple(tracked.pieces),
            ends_with_pause=len(fds) > 1,  # back ends map the memory anew when QEMU goes on
            processes=tuple(tracked.processes),
        )

    async def save_state(self) -> bytes:
        request = messages.SaveState(self._link.next_id())
        state, fds = await self._link.ask(request, messages.LongState, wait_s=LONG_WAIT_S)
        try:
            if len(fds) != 1:
                raise GuestError("the agent saved a state without giving it")
            content = os.pread(fds[0], STATE_BYTES_MAX, 0)
        finally:
            datagrams.close_all(fds)
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
        if self._lives_alone:
            log.error(
                "%s (pid %d) goes on without its agent (%s), and gets its pages; only a new "
                "control process can stop or migrate it",
                self.kind, self.pid, reason,
            )  # fmt: skip
            await self._let_run()
            await self._has_ended.wait()
        if self._rescuing is None:
            self._rescuing = asyncio.get_running_loop().create_task(self._rescue())
        await asyncio.shield(self._rescuing)
        return f"{self.kind} (pid {self.pid}) or its agent is gone: {reason}"

    async def _rescue(self) -> None:
        if self._is_open:
            await self._put_right(is_running=self._is_running)

    async def _put_right(self, *, is_running: bool) -> None:
        """An agent that was killed leaves what it had slowed down or stopped: undo it in its place.

        Nobody else can have it: the right to run had not been given away."""
        if self._undoing is not None:
            stops, self._may_be_stopped = is_running and self._may_be_stopped, False
            await asyncio.to_thread(self._undoing.undo, stops=stops)
        await self._let_run()

    async def _let_run(self) -> None:
        """What stands for a migration alone."""
        if not self._is_held or self._is_stopped_by_user:
            return
        self._is_held = False
        try:
            await asyncio.to_thread(self._proceed)
        except (MigrationError, OSError) as exc:
            log.error("%s (pid %d) stands, and its agent is gone: %s", self.kind, self.pid, exc)

    def _proceed(self) -> None:
        """Have the process run, without an agent.

        :raise GuestError: QEMU is gone, or does not do it.
        :raise OSError: the process is gone."""
        if not self._qmp_path:
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
            return
        qmp = QmpClient(self._qmp_path)
        try:
            qmp.execute("cont")
        finally:
            qmp.close()

    async def quit(self) -> None:
        """Let go of the process, which lives on."""
        if not self._is_open:
            return
        is_running, self._is_open, self._is_running = self._is_running, False, False
        if self._is_taken_in_part and self.is_missing_open and not self._has_ended.is_set():
            log.warning(
                "%s (pid %d) waits for ever where it touches memory that has not come",
                self.kind, self.pid,
            )  # fmt: skip
        if not await self._link.end():
            await self._put_right(is_running=is_running)
        await self._give_back()

    async def leave(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._link.leave()
        await self._give_back()

    async def _give_back(self) -> None:
        await self._stop_telling()
        if self._rescuing is not None:
            await self._rescuing
        if self._undoing is not None:
            self._undoing.close()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._close_tracking_fds()
        self._close_lent()
        for block in self._blocks:
            os.close(block.fd)


async def attach_qemu(path: str, back_ends: Sequence[int] = (), *, incoming: bool) -> ForeignGuest:
    """Attach to the QEMU whose QMP server listens at `path`; it runs or stands as before.

    :param back_ends: pids of its vhost-user back ends.
    :raise MigrationError: one line that says what is missing; the QEMU is as before."""
    link, where = start_agent(AGENT), os.path.abspath(path)
    request = messages.StartQemu(link.next_id(), where, incoming, default_rundir(), list(back_ends))
    return await attach_foreign(link, request)


async def attach_process(pid: int, path: str, *, incoming: bool) -> ForeignGuest:
    """Attach to a process that maps the file; one that takes a memory over stands until then.

    :raise MigrationError: one line that says what is missing; the process is as before."""
    link, where = start_agent(AGENT), os.path.abspath(path)
    request = messages.StartProcess(link.next_id(), pid, where, incoming, default_rundir())
    return await attach_foreign(link, request)


async def adopt_foreign(path: str, kind: type[ForeignGuest] = ForeignGuest) -> ForeignGuest:
    """Take over a process in postcopy whose control process died; it goes on as it is.

    :raise UsageError: no agent waits there.
    :raise GuestError: it does not answer; it is left alone."""
    link = adopt_agent(path)
    try:
        return await _started(link, messages.Attach(link.next_id()), ADOPT_WAIT_S, kind)
    except (MigrationError, asyncio.CancelledError):
        link.leave()
        raise


async def attach_foreign(
    link: AgentLink,
    request: messages.Request,
    wait_s: float = ATTACH_WAIT_S,
    kind: type[ForeignGuest] = ForeignGuest,
) -> ForeignGuest:
    """Ask a new agent for its first attachment; take the link over, also on failure.

    :raise MigrationError: one line that says what is missing."""
    try:
        return await _started(link, request, wait_s, kind)
    except (MigrationError, asyncio.CancelledError):
        await link.end()
        raise


async def _started(
    link: AgentLink, request: messages.Request, wait_s: float, kind: type[ForeignGuest]
) -> ForeignGuest:
    """The link stays the caller's on failure."""
    started, fds = await link.ask(request, messages.ForeignStarted, wait_s=wait_s)
    try:
        if len(fds) != len(started.names) + started.has_connection:
            raise GuestError("the agent did not hand RAM over")
        pidfd = os.pidfd_open(started.pid)
    except OSError as exc:
        datagrams.close_all(fds)
        raise GuestError(f"process {started.pid} has ended") from exc
    except GuestError:
        datagrams.close_all(fds)
        raise
    return kind(link, started, fds, pidfd)
