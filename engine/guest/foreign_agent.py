"""The agent of a process that knows nothing of us: `python -m engine.guest.foreign_agent FD`.

It is between control, which starts it, and a QEMU or another process. It holds the right to run and
the userfaultfd, so a death of control leaves a source guest that runs untracked. It never ends the
process, and a new control process attaches anew; but in postcopy, where the guest lacks pages or
its RAM is kept, the agent listens to be adopted.

Where pages are missing the process has the userfaultfds itself, too: when all of us are gone, it
waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from engine.errors import GuestError, MemoryRefused, MigrationError, NotHandedOver
from engine.guest import datagrams, messages
from engine.guest.adoption import listen_alone, say, state_of
from engine.guest.agent import Agent
from engine.guest.agentmain import run_agent
from engine.guest.back_ends import BackEnd, BackEndTracker
from engine.guest.base import Role, Standing
from engine.guest.foreign_machine import ForeignMachine
from engine.guest.foreign_missing import block_ranges, end_missing, open_foreign_missing
from engine.guest.foreign_tracking import ForeignTracker, reason_of
from engine.guest.messages import Reply
from engine.guest.process_machine import ProcessMachine
from engine.guest.qemu_machine import QemuMachine
from engine.guest.sharers import family_of
from engine.guest.throttling import Throttle
from engine.memory.tracking import TrackerName

CREDENTIALS: Final = struct.Struct("3i")  #: process, user and group (unix(7))


class ForeignAgent(Agent):
    """One process, one control connection."""

    is_guest = False

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        self._foreign: ForeignMachine | None = None
        self._trackers: list[ForeignTracker] = []
        self._watched: list[int] = []  #: descriptors of theirs
        self._missing: list[int] = []  #: userfaultfds, one a block, while pages are missing
        self._ending: asyncio.Future[None] | None = None  #: of that, begun last
        self._vcpus = 0
        self._pidfd = -1
        self._throttling: Throttle | None = None

    def _do(self, request: messages.AnyRequest, fds: list[int]) -> Awaitable[Reply]:
        handler = FOREIGN_HANDLERS.get(type(request))
        return super()._do(request, fds) if handler is None else handler(self, request, fds)

    def _need_foreign(self) -> ForeignMachine:
        if self._foreign is None:
            raise GuestError("the agent is not attached yet")
        return self._foreign

    # -- life ------------------------------------------------------------------------------------

    async def _start_qemu(self, request: messages.StartQemu, _fds: list[int]) -> Reply:
        path, back_ends, incoming = request.qmp, request.back_ends, request.incoming
        return await self._attach_to(
            request, lambda: QemuMachine(path, back_ends, incoming=incoming)
        )

    async def _start_process(self, request: messages.StartProcess, _fds: list[int]) -> Reply:
        pid, path, incoming = request.pid, request.path, request.incoming
        return await self._attach_to(request, lambda: ProcessMachine(pid, path, incoming=incoming))

    async def _attach_to(
        self,
        request: messages.StartQemu | messages.StartProcess,
        open_machine: Callable[[], ForeignMachine],
    ) -> Reply:
        if self.role is not Role.NEW or self._foreign is not None:
            raise GuestError("the agent is attached already")
        machine: ForeignMachine = await self._threads.run(open_machine)
        self._foreign, self._rundir = machine, request.rundir
        self._watch(machine.pid)
        self.role = Role.INCOMING if request.incoming else Role.OWNER
        self._standing.by_user = not machine.is_running
        return self._started(request.id)

    async def _attach(self, request: messages.Attach, _fds: list[int]) -> Reply:
        return self._started(request.id)

    def _started(self, request_id: int) -> Reply:
        foreign = self._need_foreign()
        blocks = [each.block for each in foreign.blocks]
        started = messages.ForeignStarted(
            request_id,
            foreign.qmp_path,
            foreign.pid,
            [block.name for block in blocks],
            [block.size for block in blocks],
            [block.backing_page_size for block in blocks],
            foreign.is_running,
            self._standing.by_user,
            self._is_unknown,
            bool(self._missing),
            self.role is Role.GONE,
        )
        return Reply(started, [block.fd for block in blocks])

    def _watch(self, pid: int) -> None:
        """Without its process an agent is nothing."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as exc:
            raise GuestError(f"process {pid} has ended") from exc
        asyncio.get_running_loop().add_reader(self._pidfd, self._end.set)

    async def _give_back(self) -> None:
        if self._foreign is not None:
            self._foreign.end()
        is_void = self.role is Role.INCOMING and self._destination.disarm()
        if is_void:
            await self._end_missing()  # first: a thread of QEMU may wait, and we for it
        await super()._give_back()
        if is_void:
            await self._end_missing()  # that were opened meanwhile
        datagrams.close_all(self._missing)  # of an owner: it has its own, and waits
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
        if self._foreign is None:
            return
        self._watch_tracked([])
        self._free()
        with contextlib.suppress(MigrationError):
            self._foreign.confirm()
        self._foreign.close()

    def _free(self) -> None:
        """The engine's reasons to hold the guest have ended with it, and those to slow it down."""
        if self._throttling is not None:
            self._throttling.close()
        if self.role is Role.OWNER and self._standing.by_engine:
            self._standing.by_engine = False
            with contextlib.suppress(MigrationError):
                self._apply()

    async def _go_on_alone(self) -> None:
        await asyncio.gather(*self._requests, return_exceptions=True)
        self._free()
        foreign = self._need_foreign()
        is_kept = self._keeps_ram and self.role in (Role.GONE, Role.HANDING_OVER)
        if self._missing or is_kept:
            self._adoption = listen_alone(
                self._rundir,
                self._serve,
                state_of(self.role, self, is_unknown=self._is_unknown),
                who=foreign.what,
                kind=foreign.kind,
            )
            return
        if self._is_unknown:
            say(
                f"agent[{os.getpid()}]: its control process is gone, and nobody has said whether "
                f"the guest runs at the destination; {foreign.what} stays stopped. Look there "
                "before you continue it"
            )
        self._end.set()

    @property
    def is_running(self) -> bool:
        return self._need_foreign().is_running

    @property
    def is_missing_open(self) -> bool:
        return bool(self._missing)

    # -- running ---------------------------------------------------------------------------------

    def _apply(self) -> None:
        if self._is_free:
            self._need_foreign().resume()

    def _at(self, request_id: int, at_ns: int) -> messages.At:
        running = self._need_foreign().is_running
        return messages.At(request_id, at_ns, running, self._standing.by_user)

    def _taken(self) -> None:
        """Control knows first: if we are killed in between, the process stands, and is not taken
        for one that may not run."""
        self.role = Role.OWNER
        self._standing = Standing(by_user=not self._run_when_taken)
        self._say(messages.Taken(0, time.monotonic_ns(), self._run_when_taken))
        try:
            self._apply()
        except MigrationError as exc:
            say(f"agent[{os.getpid()}]: the guest is here and stands: {exc}")
            return
        task = asyncio.get_running_loop().create_task(self._confirm_taken())
        self._requests.add(task)
        task.add_done_callback(self._answered)

    async def _confirm_taken(self) -> None:
        """The guest is ours, whether it runs or not; but somebody should know."""
        try:
            await self._threads.run(self._need_foreign().confirm)
        except MigrationError as exc:
            say(f"agent[{os.getpid()}]: the guest is here and may stand: {exc}")
            return
        self._say(messages.Obeyed(0))

    async def _pause(self, request: messages.Pause, _fds: list[int]) -> Reply:
        foreign = self._need_foreign()
        async with self._one_at_a_time:
            await self._threads.run(self._lift)
            if not self._standing.by_engine:  # its operator has monitors of his own
                self._standing.by_user = not await self._threads.run(foreign.looks_running)
            before = dataclasses.replace(self._standing)
            self._standing.change(stands=True, for_migration=request.for_migration)
            try:
                at_ns = await self._threads.run(foreign.pause)
            except GuestError:
                if self._is_taken_back:
                    self._standing = before
                    self._apply()
                raise
            return Reply(self._at(request.id, at_ns))

    async def _resume_asked(self, request: messages.Resume, _fds: list[int]) -> Reply:
        reply = await super()._resume_asked(request, _fds)
        await self._threads.run(self._need_foreign().confirm)
        async with self._one_at_a_time:
            if self._throttling is not None and self._is_free:
                await self._threads.run(self._throttling.put_on)
        return reply

    async def _throttle(self, request: messages.Throttle, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            throttle = self._need_throttle()
            throttle.set(request.percent)
            if self._is_free:
                await self._threads.run(throttle.put_on)
            way = throttle.way.value if throttle.way is not None else ""
            return Reply(messages.Throttled(request.id, way))

    def _need_throttle(self) -> Throttle:
        if self._throttling is None:
            foreign = self._need_foreign()
            self._throttling = Throttle(foreign.pid, foreign.vcpus)
        return self._throttling

    def _lift(self) -> None:
        """What is told to stand, and asked whether it does, is not throttled meanwhile."""
        if self._throttling is not None:
            self._throttling.lift()

    @property
    def _is_taken_back(self) -> bool:
        """Whether an order to stand that failed holds no more. Where pages are missing it is obeyed
        when the page has come."""
        return bool(self._missing)

    @property
    def _is_free(self) -> bool:
        return self.role is Role.OWNER and self._standing.may_run

    # -- tracking and device state ---------------------------------------------------------------

    async def _start_tracking(self, request: messages.StartTracking, _fds: list[int]) -> Reply:
        foreign = self._need_foreign()
        if self._missing:
            raise MemoryRefused(
                "what the guest writes cannot be told while pages of it are missing; wait for the "
                "end of its postcopy migration"
            )
        try:
            wanted = TrackerName(request.wanted) if request.wanted else None
        except ValueError as exc:
            raise MemoryRefused(f"dirty tracker '{request.wanted}' is not known") from exc
        async with self._one_at_a_time:
            self._watch_tracked([])
            await self._threads.run(foreign.stop_tracking)  # forks wait where nobody hears them
            trackers = await self._threads.run(lambda: foreign.start_tracking(wanted))
            self._watch_tracked(trackers)
        pieces = [
            piece._replace(process=i) for i, each in enumerate(trackers) for piece in each.pieces
        ]
        tracked = messages.TrackedBlocks(
            request.id,
            TrackerName.UFFD.value,
            pieces,
            reason_of(trackers),
            [each.what for each in trackers],
        )
        return Reply(tracked, [each.pagemap_fd for each in trackers])

    async def _stop_tracking(self, request: messages.StopTracking, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            self._watch_tracked([])
            await self._threads.run(self._need_foreign().stop_tracking)
        return Reply(messages.Done(request.id))

    def _watch_tracked(self, trackers: list[ForeignTracker]) -> None:
        """Hear of the forks of these processes, which wait for that, and of the ends of back ends;
        and of no others any more."""
        loop = asyncio.get_running_loop()
        for fd in self._watched:
            loop.remove_reader(fd)
        self._trackers, self._watched = trackers, []
        for tracker in trackers:
            if tracker.uffd >= 0:
                loop.add_reader(tracker.uffd, tracker.note_forks)
                self._watched.append(tracker.uffd)
            if isinstance(tracker, BackEndTracker):
                pidfd = tracker.back_end.pidfd
                loop.add_reader(pidfd, self._note_end, tracker.back_end)
                self._watched.append(pidfd)

    def _note_end(self, back_end: BackEnd) -> None:
        asyncio.get_running_loop().remove_reader(back_end.pidfd)
        self._say(messages.Untracked(0, back_end.ended))

    async def _save(self, request: messages.SaveState, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            if self.role is not Role.OWNER or not self._standing.by_engine:
                raise GuestError("only a guest that the engine holds is saved")
            fd, size = await self._threads.run(self._need_foreign().save)
        return Reply(messages.LongState(request.id, size), spent=[fd])

    async def _load_long(self, request: messages.LoadLongState, fds: list[int]) -> Reply:
        if self.role is not Role.INCOMING or len(fds) != 1:
            raise GuestError("only a guest that waits for a migration takes a state")
        async with self._one_at_a_time:
            await self._threads.run(lambda: self._need_foreign().load(fds[0], request.size))
        return Reply(messages.Done(request.id))

    # -- missing pages ---------------------------------------------------------------------------

    async def _open_missing(self, request: messages.OpenMissing, _fds: list[int]) -> Reply:
        foreign = self._need_foreign()
        if not self._missing:
            if self.role is not Role.INCOMING:
                raise GuestError("only a guest that waits for a migration can miss pages")
            async with self._one_at_a_time:
                await self._threads.run(foreign.check_all_wait)
                self._vcpus = await self._threads.run(foreign.count_vcpus)
                await self._threads.run(lambda: self._open(foreign))
        addresses = [each.address for each in foreign.blocks]
        return Reply(messages.MissingOpened(request.id, addresses, self._vcpus), self._missing)

    def _open(self, foreign: ForeignMachine) -> None:
        """In a thread, which ends also if nobody waits for it any more."""
        self._missing = open_foreign_missing(foreign.pid, block_ranges(foreign.blocks))

    async def _close_missing(self, request: messages.CloseMissing, _fds: list[int]) -> Reply:
        """Waits for nobody, who may wait for a page."""
        if self.role is Role.INCOMING and not self._destination.disarm():
            raise GuestError("the guest is being taken over; its pages cannot be given up")
        await self._end_missing()
        return Reply(messages.Done(request.id))

    async def _end_missing(self) -> None:
        """Who comes while it is being done waits for it, too."""
        uffds, self._missing = self._missing, []
        if uffds:
            self._ending = asyncio.ensure_future(self._threads.run(lambda: self._end_in_vmm(uffds)))
        if self._ending is not None:
            await asyncio.shield(self._ending)

    def _end_in_vmm(self, uffds: list[int]) -> None:
        """In a thread, to its end, whoever has asked for it; takes the descriptors over."""
        foreign = self._need_foreign()
        try:
            end_missing(foreign.pid, uffds, block_ranges(foreign.blocks))
        finally:
            datagrams.close_all(uffds)

    # -- handover --------------------------------------------------------------------------------

    def _give_up(self) -> None:
        if self._missing:
            raise NotHandedOver("pages of the guest have not come yet; it cannot be handed on")
        super()._give_up()

    async def _check_handover(self, request: messages.CheckHandover, fds: list[int]) -> Reply:
        """Also what is too slow to be looked at while the guest stands."""
        foreign, control = self._need_foreign(), self._control
        await self._check_tracked()
        if control is not None:  # its senders map the memory, and only read it
            peer = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            ours = family_of(CREDENTIALS.unpack(peer)[0])
            await self._threads.run(lambda: foreign.check_sharers(ours))
        return await super()._check_handover(request, fds)

    async def _hand_over(self, request: messages.HandOver, fds: list[int]) -> Reply:
        await self._check_stands()
        return await super()._hand_over(request, fds)

    async def _give_away(self, request: messages.GiveAway, fds: list[int]) -> Reply:
        await self._check_stands()
        return await super()._give_away(request, fds)

    async def _check_stands(self) -> None:
        """:raise NotHandedOver: it may have written what nobody saw; no token has left."""
        try:
            runs = await self._threads.run(self._need_foreign().looks_running)
            await self._check_tracked()  # forks of a process that stands were all noted
        except GuestError as exc:
            raise NotHandedOver(f"nobody can say whether the guest stands: {exc}") from exc
        except MemoryRefused as exc:
            raise NotHandedOver(str(exc)) from exc
        if runs:
            raise NotHandedOver("somebody else continued the guest behind the last round")

    async def _check_tracked(self) -> None:
        """:raise MemoryRefused: not all was seen that was written."""
        async with self._one_at_a_time:  # nor is tracking ended meanwhile
            for tracker in self._trackers:
                tracker.check()  # at most the mappings of one process are read

    async def _refuse(self, request: messages.Request, _fds: list[int]) -> Reply:
        raise GuestError(f"{type(request).__name__} is not for {self._need_foreign().what}")


FOREIGN_HANDLERS: Final[
    Mapping[type, Callable[[ForeignAgent, Any, list[int]], Awaitable[Reply]]]
] = {
    messages.StartQemu: ForeignAgent._start_qemu,
    messages.StartProcess: ForeignAgent._start_process,
    messages.Attach: ForeignAgent._attach,
    messages.Pause: ForeignAgent._pause,
    messages.Resume: ForeignAgent._resume_asked,
    messages.Throttle: ForeignAgent._throttle,
    messages.StartTracking: ForeignAgent._start_tracking,
    messages.StopTracking: ForeignAgent._stop_tracking,
    messages.SaveState: ForeignAgent._save,
    messages.LoadLongState: ForeignAgent._load_long,
    messages.OpenMissing: ForeignAgent._open_missing,
    messages.CloseMissing: ForeignAgent._close_missing,
    messages.CheckHandover: ForeignAgent._check_handover,
    messages.HandOver: ForeignAgent._hand_over,
    messages.GiveAway: ForeignAgent._give_away,
    **dict.fromkeys(
        (
            messages.Start,
            messages.Writes,
            messages.ClearSoftDirty,
            messages.StartCounting,
            messages.CountWritten,
            messages.CountDirty,
            messages.LimitDirty,
            messages.ReadDirtied,
            messages.LoadState,
            messages.Judge,
        ),
        ForeignAgent._refuse,
    ),
}


if __name__ == "__main__":
    run_agent(ForeignAgent)
