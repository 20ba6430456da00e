"""The built-in guest that keeps writing, as its control process sees it."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Final

from engine.errors import GuestError, MigrationError
from engine.guest import datagrams, messages
from engine.guest.agentguest import AgentGuest
from engine.guest.backing import BLOCK_NAME, OwnedRam
from engine.guest.base import TrackerName, Tracking, VcpuDirtied
from engine.guest.judgement import Judgement
from engine.guest.link import ADOPT_WAIT_S, ANSWER_WAIT_S, AgentLink, adopt_agent, start_agent
from engine.memory.blocks import RamBlock
from engine.memory.pieces import whole_piece

log = logging.getLogger("ramferry.guest")

#: Filling and judging read or write all of RAM; a slow and busy machine does 100 MB/s.
BYTES_PER_S_MIN: Final = 100_000_000
FAULTED_BYTES_PER_S_MIN: Final = 10_000_000  #: one page after the other comes from the source


class WorkloadGuest(AgentGuest):
    """A guest in a process of its own; owns that process, and RAM's descriptor."""

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
        super().__init__(link, running=running, stopped=stopped)
        self._ram, self._tracker = ram, tracker

    @property
    def kind(self) -> str:
        return "workload"

    @property
    def pid(self) -> int:
        return self._link.pid

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        return (self._ram.block,)

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
        self._close_tracking_fds()
        chosen = wanted or self._tracker
        request = messages.StartTracking(self._link.next_id(), chosen.value if chosen else "")
        tracked, fds = await self._link.ask(request, messages.Tracked)
        name = TrackerName(tracked.name)
        self._tracking_fds = fds
        is_in_pieces = name in (TrackerName.UFFD, TrackerName.SOFT_DIRTY)
        pieces = (whole_piece(0, tracked.address, self.blocks[0].size),) if is_in_pieces else ()
        return Tracking(name, tracked.reason, tuple(fds), pieces)

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
            datagrams.close_all(fds)
            raise GuestError("the guest judged its memory without telling the counters")
        return Judgement(
            judged.wrong_pages, judged.first_wrong, judged.page_writes, judged.vcpu_writes, fds[0]
        )

    def _pass_wait_s(self) -> float:
        rate = FAULTED_BYTES_PER_S_MIN if self.is_missing_open else BYTES_PER_S_MIN
        return ANSWER_WAIT_S + self._ram.block.size / rate

    # -- the end ---------------------------------------------------------------------------------

    async def quit(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._is_running = False
        await self._link.end()
        await self._stop_telling()
        self._close_tracking_fds()
        self._close_lent()
        self._ram.close()

    async def leave(self) -> None:
        """Give everything of ours back; the guest's process goes on, and listens to be adopted.
        Idempotent, and then `quit` does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        await self._stop_telling()
        self._link.leave()
        self._close_tracking_fds()
        self._close_lent()
        os.close(self._ram.block.fd)

    async def sleep(self, asleep: bool) -> None:
        """Fall asleep, as a guest of QEMU does by itself (ACPI S3), or be woken. The state goes
        with a migration.

        :raise GuestError: it does not run."""
        await self._change(messages.Sleep(self._link.next_id(), asleep))

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
    link = adopt_agent(path)
    try:
        attached, fds = await link.ask(
            messages.Attach(link.next_id()), messages.Attached, wait_s=ADOPT_WAIT_S
        )
        ram = _adopted_ram(attached, fds)
    except (MigrationError, asyncio.CancelledError):
        link.leave()
        raise
    guest = WorkloadGuest(link, ram, tracker, running=attached.running, stopped=attached.stopped)
    guest.is_outcome_unknown, guest.is_asleep = attached.unknown, attached.asleep
    guest.is_missing_open, guest.is_gone = attached.missing, attached.gone
    if attached.unknown:
        log.warning(
            "nobody has said whether this guest runs at the destination of its last migration; "
            "look there first: 'cont' asks once more, and then runs it here"
        )
    return guest


def _adopted_ram(attached: messages.Attached, fds: list[int]) -> OwnedRam:
    if len(fds) != 1 or os.fstat(fds[0]).st_size != attached.size:
        datagrams.close_all(fds)
        raise GuestError("the guest did not hand its RAM over")
    block = RamBlock(BLOCK_NAME, attached.size, fds[0], attached.backing_page_size)
    return OwnedRam(block, attached.created_path)
