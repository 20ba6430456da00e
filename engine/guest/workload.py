"""The built-in guest that keeps writing, as its control process sees it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final

from engine.errors import GuestError, MigrationError, UsageError
from engine.guest import messages
from engine.guest.backing import BLOCK_NAME, OwnedRam
from engine.guest.base import (
    Handover,
    Missing,
    TrackedBlock,
    TrackerName,
    Tracking,
    VcpuDirtied,
)
from engine.guest.judgement import Judgement
from engine.guest.link import ANSWER_WAIT_S, AgentLink, start_agent
from engine.memory.blocks import RamBlock

log = logging.getLogger("ramferry.guest")

#: Filling and judging read or write all of RAM; a slow and busy machine does 100 MB/s.
BYTES_PER_S_MIN: Final = 100_000_000
FAULTED_BYTES_PER_S_MIN: Final = 10_000_000  #: one page after the other comes from the source
ADOPT_WAIT_S: Final = 5.0


class WorkloadGuest:
    """A guest in a process of its own; owns that process, RAM's descriptor and the tracker's."""

    def __init__(
        self,
        link: AgentLink,
        ram: OwnedRam,
        tracker: TrackerName | None,
        *,
        running: bool,
        stopped: bool,
    ) -> None:
        """Take link and RAM over."""
        self._link, self._ram, self._tracker = link, ram, tracker
        self._is_running = running
        self._is_stopped_by_user = stopped
        self._is_open = True
        self.is_outcome_unknown = False  #: it was adopted, and does not know who has the token
        self.is_missing_open = False  #: its pages are missing until `close_missing`
        self.is_gone = False  #: it runs at the destination, and keeps its RAM until `release_ram`
        self._missing: Missing | None = None
        self._tracking_fd = -1
        self._when_taken: Callable[[int], Awaitable[None]] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        link.on_taken = self._taken

    @property
    def kind(self) -> str:
        return "workload"

    @property
    def pid(self) -> int:
        return self._link.pid

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        return (self._ram.block,)

    @property
    def is_running(self) -> bool:
        return self._is_running

    @property
    def is_stopped_by_user(self) -> bool:
        return self._is_stopped_by_user

    @property
    def is_alive(self) -> bool:
        return self._is_open and self._link.is_alive

    async def _do(self, request: messages.Request) -> None:
        await self._link.ask(request, messages.Done)

    # -- running ---------------------------------------------------------------------------------

    async def pause(self, *, for_migration: bool) -> int:
        return await self._change(messages.Pause(self._link.next_id(), for_migration))

    async def resume(self, *, for_migration: bool) -> None:
        await self._change(messages.Resume(self._link.next_id(), for_migration))

    async def _change(self, request: messages.Pause | messages.Resume) -> int:
        at, _ = await self._link.ask(request, messages.At)
        self._is_running, self._is_stopped_by_user = at.running, at.stopped
        return at.at_ns

    async def throttle(self, percent: int) -> None:
        await self._do(messages.Throttle(self._link.next_id(), percent))

    async def writes(self) -> int | None:
        count, _ = await self._link.ask(messages.Writes(self._link.next_id()), messages.Count)
        return count.value

    async def times(self) -> messages.Times:
        """How long page writes took here; empty unless the guest is timed."""
        request = messages.ReadTimes(self._link.next_id())
        times, _ = await self._link.ask(request, messages.Times)
        return times

    # -- tracking --------------------------------------------------------------------------------

    async def start_tracking(self, wanted: TrackerName | None) -> Tracking:
        self._close_tracking_fd()
        chosen = wanted or self._tracker
        request = messages.StartTracking(self._link.next_id(), chosen.value if chosen else "")
        tracked, fds = await self._link.ask(request, messages.Tracked)
        name = TrackerName(tracked.name)
        self._tracking_fd = fds[0] if fds else -1
        if name is TrackerName.BITMAP:
            block = TrackedBlock(bitmap_fd=self._tracking_fd)
        else:
            block = TrackedBlock(pagemap_fd=self._tracking_fd, address=tracked.address)
        return Tracking(name, (block,), tracked.reason)

    async def stop_tracking(self) -> None:
        self._close_tracking_fd()
        await self._do(messages.StopTracking(self._link.next_id()))

    def _close_tracking_fd(self) -> None:
        if self._tracking_fd >= 0:
            os.close(self._tracking_fd)
            self._tracking_fd = -1

    async def clear_soft_dirty(self) -> None:
        """Call every page clean from now on; only when SOFT_DIRTY tracks.

        :raise MemoryRefused: another tracker is in use."""
        await self._do(messages.ClearSoftDirty(self._link.next_id()))

    # -- what the vCPUs dirty, beside a migration ------------------------------------------------

    async def start_counting(self) -> None:
        await self._do(messages.StartCounting(self._link.next_id()))

    async def count_written(self) -> int:
        request = messages.CountWritten(self._link.next_id())
        count, _ = await self._link.ask(request, messages.Count)
        return count.value

    async def count_dirty(self, is_counting: bool) -> None:
        await self._do(messages.CountDirty(self._link.next_id(), is_counting))

    async def limit_dirty(self, vcpu: int | None, bytes_per_s: int) -> None:
        await self._do(messages.LimitDirty(self._link.next_id(), vcpu, bytes_per_s))

    async def dirtied(self) -> list[VcpuDirtied]:
        request = messages.ReadDirtied(self._link.next_id())
        read, _ = await self._link.ask(request, messages.Dirtied)
        return [VcpuDirtied(*pair) for pair in zip(read.pages, read.slept_ns, strict=True)]

    # -- device state and contents ---------------------------------------------------------------

    async def save_state(self) -> bytes:
        state, _ = await self._link.ask(messages.SaveState(self._link.next_id()), messages.State)
        return state.state

    async def load_state(self, state: bytes) -> None:
        if len(state) > messages.STATE_BYTES_MAX:
            raise GuestError(
                f"device state of {len(state)} bytes is not that of a workload guest, which has at "
                f"most {messages.STATE_BYTES_MAX}"
            )
        await self._do(messages.LoadState(self._link.next_id(), state))

    async def judge(self) -> Judgement:
        """Judge every page, also after a handover; a running guest stands meanwhile. Each missing
        page is waited for.

        :return: to be `close`d by the caller."""
        judged, fds = await self._link.ask(
            messages.Judge(self._link.next_id()), messages.Judged, wait_s=self._pass_wait_s()
        )
        if len(fds) != 1:
            messages.close_all(fds)
            raise GuestError("the guest judged its memory without telling the counters")
        return Judgement(
            judged.wrong_pages, judged.first_wrong, judged.page_writes, judged.vcpu_writes, fds[0]
        )

    def _pass_wait_s(self) -> float:
        rate = FAULTED_BYTES_PER_S_MIN if self.is_missing_open else BYTES_PER_S_MIN
        return ANSWER_WAIT_S + self._ram.block.size / rate

    # -- missing pages ---------------------------------------------------------------------------

    async def open_missing(self) -> Missing:
        if self._missing is None:
            request = messages.OpenMissing(self._link.next_id())
            opened, fds = await self._link.ask(request, messages.MissingOpened)
            if len(fds) != 1:
                messages.close_all(fds)
                raise GuestError("the guest waits for missing pages without a userfaultfd")
            self._missing = Missing((fds[0],), (opened.address,), opened.vcpus)
            self.is_missing_open = True
        return self._missing

    async def close_missing(self) -> None:
        self._close_lent()
        await self._do(messages.CloseMissing(self._link.next_id()))
        self.is_missing_open = False

    def _close_lent(self) -> None:
        if self._missing is not None:
            messages.close_all(self._missing.uffds)
            self._missing = None

    # -- handover --------------------------------------------------------------------------------

    async def listen_handover(self, host_uri: str) -> str:
        request = messages.ListenHandover(self._link.next_id(), host_uri)
        listening, _ = await self._link.ask(request, messages.Listening)
        return listening.endpoint

    async def arm(self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]) -> None:
        self._when_taken = taken
        await self._do(messages.Arm(self._link.next_id(), session, run))

    def _taken(self, event: messages.Taken) -> None:
        self._is_running, self._is_stopped_by_user = event.running, not event.running
        when_taken = self._when_taken

        async def tell() -> None:
            if when_taken is not None:
                await when_taken(event.at_ns)

        task = asyncio.get_running_loop().create_task(tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def disarm(self) -> bool:
        count, _ = await self._link.ask(messages.Disarm(self._link.next_id()), messages.Count)
        return bool(count.value)

    async def connect_handover(self, endpoint: str, session: bytes) -> None:
        request = messages.ConnectHandover(self._link.next_id(), endpoint, session)
        await self._link.ask(request, messages.Done, wait_s=2 * ANSWER_WAIT_S)

    async def check_handover(self) -> None:
        await self._link.ask(
            messages.CheckHandover(self._link.next_id()), messages.Done, wait_s=2 * ANSWER_WAIT_S
        )

    async def hand_over(self, wait_ns: int, *, keeps_ram: bool = False) -> Handover:
        request = messages.HandOver(self._link.next_id(), wait_ns, keeps_ram)
        wait_s = wait_ns / 1e9 + ANSWER_WAIT_S
        outcome, _ = await self._link.ask(request, messages.HandedOver, wait_s=wait_s)
        self.is_gone = Handover(outcome.outcome) is Handover.TAKEN
        return Handover(outcome.outcome)

    async def release_ram(self) -> None:
        await self._do(messages.ReleaseRam(self._link.next_id()))

    async def give_away(self) -> None:
        await self._do(messages.GiveAway(self._link.next_id()))

    async def settle(self, *, taken: bool) -> None:
        await self._do(messages.Settle(self._link.next_id(), taken))

    async def take_over(
        self, session: bytes, run: bool, taken: Callable[[int], Awaitable[None]]
    ) -> None:
        self._when_taken = taken
        await self._do(messages.TakeOver(self._link.next_id(), session, run))

    async def close_handover(self) -> None:
        await self._do(messages.CloseHandover(self._link.next_id()))

    # -- the end ---------------------------------------------------------------------------------

    async def died(self) -> str:
        return await self._link.died()

    async def quit(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._is_running = False
        await self._link.end()
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
        self._close_tracking_fd()
        self._close_lent()
        self._ram.close()

    async def leave(self) -> None:
        """Give everything of ours back; the guest's process goes on, and listens to be adopted.
        Idempotent, and then `quit` does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
        self._link.leave()
        self._close_tracking_fd()
        self._close_lent()
        os.close(self._ram.block.fd)

    async def start(self, request: messages.Start) -> None:
        """First request; RAM is filled when this returns."""
        await self._link.ask(
            request, messages.Done, [self._ram.block.fd], wait_s=self._pass_wait_s()
        )
        self._is_running = request.run and not request.incoming
        self._is_stopped_by_user = not request.run


async def start_workload(
    ram: OwnedRam,
    options: messages.Options,
    *,
    incoming: bool,
    fill: bool,
    run: bool,
    rundir: str,
    tracker: TrackerName | None,
) -> WorkloadGuest:
    """Start the guest's process over `ram`, which is taken over, also on failure.

    :raise MigrationError: it failed; the process is gone."""
    try:
        link = start_agent()
    except MigrationError:
        ram.close()
        raise
    guest = WorkloadGuest(link, ram, tracker, running=False, stopped=not run)
    request = messages.Start(
        link.next_id(),
        ram.block.size,
        ram.block.backing_page_size,
        options,
        incoming,
        fill,
        run,
        ram.created_path,
        rundir,
    )
    try:
        await guest.start(request)
    except (MigrationError, asyncio.CancelledError):
        await guest.quit()
        raise
    return guest


async def adopt_workload(path: str, tracker: TrackerName | None) -> WorkloadGuest:
    """Take over a guest whose control process died; it goes on as it is.

    :raise UsageError: there is none.
    :raise GuestError: it does not answer; it is left alone."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
    except OSError as exc:
        connection.close()
        raise UsageError(f"no guest waits at '{path}': {exc.strerror}") from exc
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    link = AgentLink(connection, struct.unpack("3i", credentials)[0], None)
    try:
        attached, fds = await link.ask(
            messages.Attach(link.next_id()), messages.Attached, wait_s=ADOPT_WAIT_S
        )
        ram = _adopted_ram(attached, fds)
    except (MigrationError, asyncio.CancelledError):
        link.leave()
        raise
    guest = WorkloadGuest(link, ram, tracker, running=attached.running, stopped=attached.stopped)
    guest.is_outcome_unknown = attached.unknown
    guest.is_missing_open, guest.is_gone = attached.missing, attached.gone
    if attached.unknown:
        log.warning(
            "nobody has said whether this guest runs at the destination of its last migration; "
            "look there first: 'cont' asks once more, and then runs it here"
        )
    return guest


def _adopted_ram(attached: messages.Attached, fds: list[int]) -> OwnedRam:
    if len(fds) != 1 or os.fstat(fds[0]).st_size != attached.size:
        messages.close_all(fds)
        raise GuestError("the guest did not hand its RAM over")
    block = RamBlock(BLOCK_NAME, attached.size, fds[0], attached.backing_page_size)
    return OwnedRam(block, attached.created_path)
