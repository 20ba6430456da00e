"""The workload guest's own process: `python -m engine.guest.agent FD`, started by control.

It serves one control process at a time, over a socket pair and later, when that one has died, over
a socket in its run directory. What it does when control is gone depends on who may run:

    incoming, not taken over   voids the session and ends
    owner                      goes on as before the migration, and listens to be adopted; where
                               pages are missing, it keeps the userfaultfd, and its vCPUs wait
    handing over               finishes the exchange by itself, then one of the other three
    outcome unknown            stays stopped, and listens to be adopted
    handed over                ends; in postcopy it keeps its RAM, and listens to be adopted

SIGTERM ends it in any state; SIGINT is for control. A token that comes in makes it the owner and
starts the vCPUs in one step of its event loop, which never touches RAM: a page may be missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from engine.errors import ChannelError, GuestError, MigrationError, NotHandedOver, WireError
from engine.guest import datagrams, dirtying, messages
from engine.guest.adoption import Adoption, listen_alone, state_of
from engine.guest.agentmain import run_agent
from engine.guest.base import Handover, Role, Standing
from engine.guest.handover import ARRIVED_JUST_NOW, DestinationEnd, SourceEnd
from engine.guest.messages import Reply
from engine.guest.rundir import remove_file
from engine.guest.threads import Threads
from engine.guest.vcpus import Ended, Machine
from engine.wire import cut

REQUESTS_MAX: Final = 64  #: unanswered at once; a control process that wants more is broken


class Agent:
    """The process: one machine, one control connection or a listener for the next one."""

    is_guest = True  #: the guest lives in this very process

    def __init__(self, control: socket.socket) -> None:
        self.role = Role.NEW
        self._control: socket.socket | None = None
        self._first = control
        self._adoption: Adoption | None = None
        self._created_path = self._rundir = ""
        self._backing_page_size = 0
        self._machine: Machine | None = None
        self._standing = Standing(by_user=True)
        self._run_when_taken = False
        self._keeps_ram = False  #: handed over in postcopy: RAM is read until it is released
        self._destination = DestinationEnd(self._taken)
        self._source: SourceEnd | None = None
        self._one_at_a_time = asyncio.Lock()
        self._requests: set[asyncio.Task[None]] = set()
        self._threads = Threads()
        self._alone: asyncio.Task[None] | None = None
        self._end = asyncio.Event()
        self._decoder = messages.request_decoder()

    async def run(self) -> None:
        """Serve until told to end; give everything back."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end.set)
        self._serve(self._first)
        try:
            await self._end.wait()
        finally:
            await self._give_back()

    async def _give_back(self) -> None:
        if self._machine is not None:
            self._machine.end()
        tasks = [*self._requests, *([self._alone] if self._alone else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._threads.wait()
        await self._destination.end()
        self._forget_source()
        if self._adoption is not None:
            self._adoption.close()
        self._hang_up()
        if self._machine is not None:
            if self._created_path:
                remove_file(self._created_path, self._machine.ram_fd)
            self._machine.close()

    def _need_machine(self) -> Machine:
        if self._machine is None:
            raise GuestError("the guest was not started yet")
        return self._machine

    # -- control ---------------------------------------------------------------------------------

    def _serve(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        asyncio.get_running_loop().add_reader(control, self._read)

    def _hang_up(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None

    def _read(self) -> None:
        assert self._control is not None
        try:
            data, fds = datagrams.receive(self._control)
        except BlockingIOError:
            return
        except (OSError, WireError):
            self._lose_control()
            return
        try:
            if not data or len(self._requests) >= REQUESTS_MAX:
                raise WireError("control is gone or floods")
            request = self._decoder.decode(data)
        except WireError:
            datagrams.close_all(fds)
            self._lose_control()
            return
        task = asyncio.get_running_loop().create_task(self._answer(request, fds))
        self._requests.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        """A bug in one request costs the connection, not the guest."""
        self._requests.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            with contextlib.suppress(OSError):
                traceback.print_exception(bug)
            self._lose_control()

    async def _answer(self, request: messages.AnyRequest, fds: list[int]) -> None:
        """Do what is asked and say how it went; descriptors that nobody took are closed."""
        control = self._control
        try:
            reply = await self._do(request, fds)
        except MigrationError as exc:
            doing = exc.doing if isinstance(exc, ChannelError) else str(exc)
            reason = f"{doing}: {exc.__cause__}" if exc.__cause__ else doing
            reply = Reply(messages.Failed(request.id, type(exc).__name__, cut(reason)))
        except Ended:
            return
        finally:
            datagrams.close_all(fds)
        if control is self._control:
            self._say(reply.answer, [*reply.lent, *reply.spent])
        datagrams.close_all(reply.spent)

    def _do(self, request: messages.AnyRequest, fds: list[int]) -> Awaitable[Reply]:
        """What an agent of another kind of guest does otherwise."""
        return HANDLERS[type(request)](self, request, fds)

    def _say(self, answer: messages.Answer, fds: Sequence[int] = ()) -> None:
        if self._control is None:
            return
        try:
            datagrams.send(self._control, answer, fds)
        except OSError:
            self._lose_control()

    def _lose_control(self) -> None:
        """Control is gone. An owner first finishes what was begun; an incoming guest ends."""
        self._hang_up()
        self._threads.give_up_judging()  # nobody hears it, and it may wait for a page for ever
        if self.role in (Role.NEW, Role.INCOMING):
            self._destination.disarm()
            self._end.set()
        elif self._alone is None or self._alone.done():
            self._alone = asyncio.get_running_loop().create_task(self._go_on_alone())

    async def _go_on_alone(self) -> None:
        await asyncio.gather(*self._requests, return_exceptions=True)
        machine = self._need_machine()
        if self.role is Role.GONE and not self._keeps_ram:
            self._end.set()
            return
        if self.role is not Role.HANDING_OVER:
            machine.go_free()
            self._forget_source()
        if self.role is Role.OWNER:
            self._standing.by_engine = False
            self._apply()
        self._listen_alone(machine)

    def _forget_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def _listen_alone(self, machine: Machine) -> None:
        """Wait to be adopted; say where on stderr."""
        state = state_of(self.role, machine, is_unknown=self._is_unknown)
        self._adoption = listen_alone(self._rundir, self._serve, state)

    # -- requests: each returns the answer and the descriptors beside it -------------------------

    async def _start(self, request: messages.Start, fds: list[int]) -> Reply:
        if self.role is not Role.NEW or self._machine is not None or len(fds) != 1:
            raise GuestError("the guest is started already, or came without RAM")
        self._created_path, self._rundir = request.created_path, request.rundir
        self._backing_page_size = request.backing_page_size
        self._machine = Machine(fds.pop(), request.size, request.options)
        if request.fill:
            await self._threads.run(self._machine.fill)
        self.role = Role.INCOMING if request.incoming else Role.OWNER
        self._standing.by_user = not request.run
        self._apply()
        return Reply(messages.Done(request.id))

    async def _attach(self, request: messages.Attach, _fds: list[int]) -> Reply:
        machine = self._need_machine()
        attached = messages.Attached(
            request.id,
            machine.size,
            self._backing_page_size,
            machine.is_running,
            self._standing.by_user,
            self._is_unknown,
            self._created_path,
            machine.is_missing_open,
            self.role is Role.GONE,
            machine.is_asleep,
        )
        return Reply(attached, [machine.ram_fd])

    async def _pause(self, request: messages.Pause, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            before = dataclasses.replace(self._standing)
            self._standing.change(stands=True, for_migration=request.for_migration)
            try:
                at_ns = await self._stand(self._need_machine())
            except GuestError:
                self._standing = before
                raise
            return Reply(self._at(request.id, at_ns))

    async def _stand(self, machine: Machine) -> int:
        """Stop the vCPUs; return when all stood.

        :raise GuestError: one waits for a missing page; they run on."""
        if machine.is_missing_open:
            return await self._threads.run(machine.pause)
        return machine.pause()

    async def _resume_asked(self, request: messages.Resume, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            if self.role in (Role.NEW, Role.INCOMING):
                raise GuestError("the guest waits for an incoming migration")
            if self._is_handing_over():
                raise GuestError("the guest is being handed over")
            if self.role is Role.HANDING_OVER:
                await self._decide_unknown()
            if self.role is Role.GONE:
                raise GuestError("the guest runs at the destination now")
            self._standing.change(stands=False, for_migration=request.for_migration)
            self._apply()
            return Reply(self._at(request.id, time.monotonic_ns()))

    async def _decide_unknown(self) -> None:
        """Ask once more who has the right to run; without an answer it is the operator's word."""
        outcome = Handover.REFUSED if self._source is None else await self._source.ask()
        self.role = Role.GONE if outcome is Handover.TAKEN else Role.OWNER
        self._standing.by_engine = False
        self._forget_source()

    def _apply(self) -> None:
        """Run if nothing holds the guest and it is ours."""
        if self.role is Role.OWNER and self._standing.may_run:
            self._need_machine().resume()

    def _at(self, request_id: int, at_ns: int) -> messages.At:
        machine = self._need_machine()
        by_user = self._standing.by_user
        return messages.At(request_id, at_ns, machine.is_running, by_user, machine.is_asleep)

    def _is_handing_over(self) -> bool:
        return self._source is not None and self._source.is_busy

    @property
    def _is_unknown(self) -> bool:
        """The token was sent, and nobody has said who has it."""
        return self.role is Role.HANDING_OVER and not self._is_handing_over()

    async def _sleep(self, request: messages.Sleep, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            self._need_machine().sleep(request.asleep)
            return Reply(self._at(request.id, time.monotonic_ns()))

    async def _throttle(self, request: messages.Throttle, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            self._need_machine().throttle(request.percent)
            return Reply(messages.Throttled(request.id, "vCPUs that sleep"))

    async def _writes(self, request: messages.Writes, _fds: list[int]) -> Reply:
        return Reply(messages.Count(request.id, self._need_machine().writes()))

    async def _times(self, request: messages.ReadTimes, _fds: list[int]) -> Reply:
        return Reply(messages.Times(request.id, *self._need_machine().times()))

    async def _dirtying(self, request: messages.Dirtying, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            machine = self._need_machine()
            if isinstance(request, dirtying.LONG):
                return await self._threads.run(lambda: dirtying.answer(machine, request))
            return dirtying.answer(machine, request)

    async def _save(self, request: messages.SaveState, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            return Reply(messages.State(request.id, self._need_machine().save()))

    async def _load(self, request: messages.LoadState, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            if self.role is not Role.INCOMING:
                raise GuestError("only a guest that waits for a migration takes a state")
            self._need_machine().load(request.state)
            return Reply(messages.Done(request.id))

    async def _judge(self, request: messages.Judge, _fds: list[int]) -> Reply:
        """The guest stands meanwhile."""
        async with self._one_at_a_time:
            machine = self._need_machine()
            await self._stand(machine)
            try:
                vcpu_writes = machine.writes()
                judgement = await self._threads.judge(machine)
            finally:
                if not self._end.is_set():
                    self._apply()
        judged = messages.Judged(
            request.id,
            judgement.wrong_pages,
            judgement.first_wrong,
            judgement.page_writes_sum,
            vcpu_writes,
        )
        return Reply(judged, spent=[judgement.counters_fd])

    # -- missing pages; neither waits for others, who may wait for a page ------------------------

    async def _open_missing(self, request: messages.OpenMissing, _fds: list[int]) -> Reply:
        machine = self._need_machine()
        if self.role is not Role.INCOMING and not machine.is_missing_open:
            raise GuestError("only a guest that waits for a migration can miss pages")
        lent = [machine.open_missing()]
        vcpus = machine.options.vcpus
        return Reply(messages.MissingOpened(request.id, [machine.address], vcpus), lent)

    async def _close_missing(self, request: messages.CloseMissing, _fds: list[int]) -> Reply:
        self._need_machine().close_missing()
        return Reply(messages.Done(request.id))

    # -- handover --------------------------------------------------------------------------------

    async def _listen(self, request: messages.ListenHandover, _fds: list[int]) -> Reply:
        if self.role is not Role.INCOMING:
            raise GuestError("only a guest that waits for a migration can take over")
        return Reply(messages.Listening(request.id, await self._destination.listen(request.uri)))

    async def _arm(self, request: messages.Arm, _fds: list[int]) -> Reply:
        if self.role is not Role.INCOMING:
            raise GuestError("only a guest that waits for a migration can take over")
        self._destination.arm(request.session)
        self._run_when_taken = request.run
        return Reply(messages.Done(request.id))

    def _taken(self) -> None:
        """The token is here. No step of the event loop lies between owning and running."""
        self.role = Role.OWNER
        self._standing = Standing(by_user=not self._run_when_taken)
        self._apply()
        asleep = self._need_machine().is_asleep
        self._say(messages.Taken(0, time.monotonic_ns(), self._run_when_taken, asleep))

    async def _disarm(self, request: messages.Disarm, _fds: list[int]) -> Reply:
        return Reply(messages.Count(request.id, int(self._destination.disarm())))

    async def _connect(self, request: messages.ConnectHandover, _fds: list[int]) -> Reply:
        if self._is_handing_over():
            raise GuestError("the guest is being handed over")
        if self.role is not Role.OWNER:
            raise NotHandedOver(f"the guest ({self.role.value}) cannot be handed over")
        source = SourceEnd(request.session, dies_with_taker=self.is_guest)
        await source.connect(request.endpoint)
        self._forget_source()
        self._source = source
        return Reply(messages.Done(request.id))

    async def _check_handover(self, request: messages.CheckHandover, _fds: list[int]) -> Reply:
        if self._source is None:
            raise NotHandedOver("the guest is not connected to hand over")
        if not self._destination.is_settled:
            raise NotHandedOver(ARRIVED_JUST_NOW)
        await self._source.check()
        return Reply(messages.Done(request.id))

    async def _hand_over(self, request: messages.HandOver, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:  # a judge that stands it for a while is not a pause
            if (source := self._source) is None:
                raise NotHandedOver(f"the guest ({self.role.value}) is not connected to hand over")
            self._give_up()
            self._keeps_ram = request.keeps_ram
            source.is_busy = True
        outcome = await source.hand_over(request.wait_ns)
        known = {Handover.TAKEN: Role.GONE, Handover.REFUSED: Role.OWNER}
        self.role = known.get(outcome, self.role)
        return Reply(messages.HandedOver(request.id, outcome.value))

    def _give_up(self) -> None:
        if self.role is not Role.OWNER or not self._destination.is_settled:
            raise NotHandedOver(f"the guest ({self.role.value}) cannot be handed over")
        if not self._standing.by_engine:
            raise NotHandedOver("the guest is not held; pause it before it is handed over")
        if self._machine is not None and self._machine.is_missing_open:
            raise NotHandedOver("pages of the guest have not come yet; it cannot be handed on")
        self.role = Role.HANDING_OVER

    async def _release_ram(self, request: messages.ReleaseRam, _fds: list[int]) -> Reply:
        self._keeps_ram = False
        return Reply(messages.Done(request.id))

    async def _give_away(self, request: messages.GiveAway, _fds: list[int]) -> Reply:
        async with self._one_at_a_time:
            self._give_up()
            self._keeps_ram = False
            self._forget_source()
            return Reply(messages.Done(request.id))

    async def _settle(self, request: messages.Settle, _fds: list[int]) -> Reply:
        if self._is_unknown:
            self.role = Role.GONE if request.taken else Role.OWNER
            self._forget_source()
        return Reply(messages.Done(request.id))

    async def _take_over(self, request: messages.TakeOver, _fds: list[int]) -> Reply:
        if self.role is not Role.INCOMING:
            raise GuestError("only a guest that waits for a migration can take over")
        self._run_when_taken = request.run
        self._destination.take_over(request.session)
        return Reply(messages.Done(request.id))

    async def _close_handover(self, request: messages.CloseHandover, _fds: list[int]) -> Reply:
        if self.role is not Role.HANDING_OVER:  # who does not know yet will want to ask
            self._forget_source()
        await self._destination.close()
        return Reply(messages.Done(request.id))

    async def _quit(self, _request: messages.Quit, _fds: list[int]) -> Reply:
        self._end.set()
        raise Ended


HANDLERS: Final[Mapping[type, Callable[[Agent, Any, list[int]], Awaitable[Reply]]]] = {
    messages.Start: Agent._start,
    messages.Attach: Agent._attach,
    messages.Pause: Agent._pause,
    messages.Resume: Agent._resume_asked,
    messages.Sleep: Agent._sleep,
    messages.Throttle: Agent._throttle,
    messages.Writes: Agent._writes,
    messages.ReadTimes: Agent._times,
    **dict.fromkeys(dirtying.REQUESTS, Agent._dirtying),
    messages.SaveState: Agent._save,
    messages.LoadState: Agent._load,
    messages.Judge: Agent._judge,
    messages.OpenMissing: Agent._open_missing,
    messages.CloseMissing: Agent._close_missing,
    messages.ListenHandover: Agent._listen,
    messages.Arm: Agent._arm,
    messages.Disarm: Agent._disarm,
    messages.ConnectHandover: Agent._connect,
    messages.CheckHandover: Agent._check_handover,
    messages.HandOver: Agent._hand_over,
    messages.ReleaseRam: Agent._release_ram,
    messages.GiveAway: Agent._give_away,
    messages.Settle: Agent._settle,
    messages.TakeOver: Agent._take_over,
    messages.CloseHandover: Agent._close_handover,
    messages.Quit: Agent._quit,
}


if __name__ == "__main__":
    run_agent(Agent)
