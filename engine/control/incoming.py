"""The destination: what its source says, and the promise that lets the token come.

Statuses go none -> setup -> active -> completed | failed, as QEMU's do. Until the token is taken
nothing of the guest runs here; a failure before that gives its memory back and the source goes on.
With postcopy the token comes while pages are missing: a failure after it is a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

from engine import wire
from engine.compress.codecs import CODEC_IDS
from engine.control.fitting import next_fitting
from engine.control.host import Host
from engine.control.mainchannel import ConnectionLost, DestinationEnd
from engine.control.notifiers import Change, Moment, Side
from engine.control.postcopy.completion import Completion
from engine.control.postcopy.destination import PostcopyDestination
from engine.control.receivers import Channels, ReceiverGroup
from engine.control.status import RunState, Status, check_incoming
from engine.control.streams.destination import StreamDestination
from engine.control.streams.opening import Sources
from engine.control.token import has_taken_over
from engine.control.uri import FAULT_CHANNEL, Address, Target, VsockAddress, cannot_listen
from engine.errors import GuestError, MigrationError, PeerRefused, UsageError, WireError, text_of

log = logging.getLogger("ramferry.destination")

CLOSE_WAIT_S: Final = 5.0  #: then a guest that does not say whether it took over is killed
LAST_WORD_WAIT_S: Final = 1.0

Main = DestinationEnd[wire.Hello] | DestinationEnd[wire.Resume] | StreamDestination


class IncomingMigration:
    """One migration to here; owns its listener, receivers and what postcopy needs until it has
    ended."""

    def __init__(self, host: Host, address: Target, sources: Sources | None = None) -> None:
        """:param sources: where a stream's descriptors come from."""
        self.host, self._address, self._sources = host, address, sources or Sources()
        self.status = Status.NONE
        self.error: str | None = None
        self.address: Address | VsockAddress | None = None  #: where it listens; no port is 0
        self._main: Main | None = None
        self._receivers: ReceiverGroup | None = None
        self.postcopy: PostcopyDestination | None = None
        self.session = b""
        self._failure = self._new_failure()
        self._taken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._may_be_cancelled = True
        self._has_state = False
        self._runs: bool | None = None  #: start the guest when it is ours; None: not promised yet
        self._completion: Completion | None = None
        self._inner: set[asyncio.Task[None]] = set()
        self.ended = asyncio.Event()

    @staticmethod
    def _new_failure() -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, and serve the first right source in the background.

        :raise OSError: cannot listen there; the status is failed.
        :raise MigrationError: something else is at the unix path, or a stream cannot be had; the
            status is failed."""
        self.set_status(Status.SETUP)
        try:
            if isinstance(self._address, Address):
                self._main = DestinationEnd(self._address, wire.Hello)
            else:
                self._main = StreamDestination(self._address, self._sources)
        except (OSError, MigrationError) as exc:
            self.error = cannot_listen(self._address, exc)
            self.set_status(Status.FAILED)
            self.ended.set()
            raise
        self.address = self._main.address
        self._task = asyncio.get_running_loop().create_task(self._run(self._main))

    @classmethod
    def paused(cls, host: Host, session: bytes) -> IncomingMigration:
        """A postcopy whose control process was killed: the guest here runs, and lacks pages."""
        migration = cls(host, Address(host="127.0.0.1"))
        migration.session, migration.status = session, Status.POSTCOPY_PAUSED
        migration._taken.set()
        migration._completion = Completion(migration, None)
        migration._task = asyncio.get_running_loop().create_task(migration._go_on_paused())
        return migration

    async def _go_on_paused(self) -> None:
        assert self._completion is not None
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._beside(self._watch_guest())
                self.postcopy = await self._completion.begin_again()
                await self._completion.run_paused()
        except GuestError as exc:
            self.error = f"the paused postcopy cannot go on: {text_of(exc)}"
            log.error("%s", self.error)
            self.set_status(Status.FAILED)
        finally:
            self._may_be_cancelled = False
            await self._give_back(self._completion.main, False)
            self.ended.set()

    async def close(self) -> None:
        """Give up if it still runs; give everything back. Idempotent."""
        if self._task is None:
            return
        if self._completion is not None and self.ended.is_set():
            await self._completion.end_saying()
        if self._may_be_cancelled:
            self._task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), CLOSE_WAIT_S)
        if not (self.ended.is_set() or self._taken.is_set()):
            await self.host.guest.quit()  # it does not say whether it took over; now it says no
        await self.ended.wait()

    def set_status(self, status: Status) -> None:
        check_incoming(self.status, status)
        before, self.status = self.status, status
        self.host.notifiers.tell(Change(Side.DESTINATION, before, status, Moment.BEFORE))
        self.host.emit("MIGRATION", {"status": status.value})
        self.host.notifiers.tell(Change(Side.DESTINATION, before, status, Moment.AFTER))

    async def _run(self, main: Main) -> None:
        failure: Exception | None = None
        try:
            await self._serve(main)
        except asyncio.CancelledError:
            log.info("the incoming migration is closed")  # only `close` cancels, and only here
        except (MigrationError, OSError, TimeoutError) as exc:
            failure = exc
        self._may_be_cancelled = False
        try:
            is_void = not await has_taken_over(self.host.guest, self._taken)
            if is_void:  # else `completed` settles it, with no gap between
                self.host.settle(Side.DESTINATION)
            if failure is not None and is_void:
                await self._fail(main, failure)
            elif not is_void:
                main = await self._complete(main, failure)
            await self._give_back(main, is_void)
        finally:
            self.ended.set()

    async def _complete(self, main: Main, failure: Exception | None) -> Main:
        """The guest is ours. Return the main channel, which a pause may have replaced."""
        if self.postcopy is None:
            self.set_status(Status.COMPLETED)
            await self.last_word(main, wire.TookOver())
            return main
        self._may_be_cancelled = True
        completion = self._completion = Completion(self, main)
        with contextlib.suppress(asyncio.CancelledError):
            await completion.run(self.postcopy, failure)
        self._may_be_cancelled = False
        way: Main = completion.main
        return way

    @staticmethod
    async def last_word(main: Main, message: wire.Message) -> None:
        with contextlib.suppress(ConnectionLost, TimeoutError):
            await asyncio.wait_for(main.send(message), LAST_WORD_WAIT_S)

    async def _serve(self, main: Main) -> None:
        """Until the token was taken."""
        hello = await next_fitting(self.host, main, is_stream=isinstance(main, StreamDestination))
        await self._accept(main, hello)
        self.set_status(Status.ACTIVE)
        self._beside(self._watch_guest())
        await self.converse_until(main, self._taken)

    async def converse_until(self, main: Main, over: asyncio.Event) -> None:
        """Answer the source until `over`, or a failure, which is raised."""
        await self.unless_failed(self._converse(main), over.wait())

    async def unless_failed(self, *works: Coroutine[Any, Any, object]) -> None:
        """Do these until one is done, or the first failure, which is raised; leave the others."""
        tasks: set[asyncio.Future[Any]] = {asyncio.ensure_future(work) for work in works}
        try:
            waiting = {*tasks, self._failure}
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:  # they do nothing any more
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._failure.done():
            self._failure.result()
        for one in done:
            one.result()

    async def _fail(self, main: Main, exc: Exception) -> None:
        self.error = f"load of migration failed: {text_of(exc)}"
        log.error("%s", self.error)
        await self.last_word(main, wire.Failed(wire.cut(text_of(exc))))
        self.set_status(Status.FAILED)

    async def _give_back(self, main: Main | None, is_void: bool) -> None:
        inner = tuple(self._inner)
        for task in inner:
            task.cancel()
        await asyncio.gather(*inner, return_exceptions=True)
        await self.end_channels(main, has_failed=is_void)
        if self._completion is not None:
            self._completion.close()
        if self.postcopy is not None:
            has_all = self.postcopy.service.has_all.is_set()
            with contextlib.suppress(GuestError):
                await self.postcopy.end(is_closing=is_void or has_all)
        with contextlib.suppress(GuestError):
            await self.host.guest.close_handover()
        if is_void:
            for block in self.host.guest.blocks:
                block.discard()

    async def end_channels(self, main: Main | None, *, has_failed: bool) -> None:
        self._main = None
        receivers, self._receivers = self._receivers, None
        channels = 0
        if receivers is not None:
            channels = len(receivers.lanes)
            await receivers.end()
        if main is not None:
            await main.end(has_failed=has_failed)
        if isinstance(self._address, Address):
            self._address.remove_files(channels)

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except (MigrationError, OSError, TimeoutError) as exc:
                self._break_off(exc)

        task = asyncio.get_running_loop().create_task(guarded())
        self._inner.add(task)
        task.add_done_callback(self._inner.discard)

    def _break_off(self, exc: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(exc)
            self._failure.exception()  # asyncio shall not complain where nobody waits any more

    def forget_failure(self) -> None:
        """What broke connections that are given back says nothing of the next ones."""
        if self._failure.done():
            self._failure = self._new_failure()

    def tell(self, message: wire.Message) -> None:
        """Send the source a message, if it can be reached."""
        main = self._main

        async def send() -> None:
            if main is not None:
                with contextlib.suppress(ConnectionLost):  # whoever receives is told
                    await main.send(message)

        self._beside(send())

    def yank(self) -> None:
        """Fail as if the connections had broken, if there are any."""
        if self.status in (Status.ACTIVE, Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER):
            self._break_off(MigrationError("'yank' has cut the migration's connections"))

    def pause(self, reason: str) -> None:
        """`migrate-pause`, in postcopy."""
        self._break_off(MigrationError(reason))

    @property
    def placement(self) -> str:
        return "?" if self._receivers is None else self._receivers.placement

    def worker_pids(self) -> dict[int, int]:
        """Process ids of the receivers at work, by channel."""
        return {} if self._receivers is None else self._receivers.pids()

    @property
    def service_pid(self) -> int | None:
        """Process id of the fault service, if it is at work."""
        return None if self.postcopy is None else self.postcopy.service.pid

    def wire_bytes(self) -> int:
        """What came in on multifd channels so far."""
        return 0 if self._receivers is None else self._receivers.wire_bytes()

    async def _watch_guest(self) -> None:
        reason = await self.host.guest.died()
        raise GuestError(f"the guest died: {reason}")

    # -- agreeing --------------------------------------------------------------------------------

    async def _accept(self, main: Main, hello: wire.Hello) -> None:
        """Make room, start the receivers, tell the source where they listen.

        :raise MigrationError: no memory, port or worker for it."""
        guest = self.host.guest
        self.session = hello.session
        for block in guest.blocks:
            block.discard()
        handover = ""
        if isinstance(self._address, Address):
            handover = await guest.listen_handover(self._address.handover_uri(self._port_base))
        receivers = self.use(main, hello.channels)
        await self.unless_failed(receivers.start())
        if isinstance(main, StreamDestination):
            return  # the source waits for nothing
        codecs, endpoints = tuple(CODEC_IDS.values()), receivers.endpoints
        welcome = wire.Welcome(
            wire.VERSION, self.session, endpoints, handover, receivers.placement, codecs
        )
        await main.send(welcome)

    def use(self, main: Main, count: int) -> ReceiverGroup:
        """Make receivers for so many channels beside this main one; they are the migration's."""
        self._main, host, stream_fd, on_stream_end = main, self.host, -1, lambda: None
        if isinstance(main, StreamDestination):
            stream_fd, on_stream_end = main.fd, main.channel_ended
        self._receivers = ReceiverGroup(
            host.guest.blocks,
            host.receivers,
            Channels(self.session, count, self.bind, stream_fd, host.capability("postcopy-ram")),
            heal_limit=host.parameters.x_heal_limit,
            tell=self.tell,
            fail=self._break_off,
            on_stream_end=on_stream_end,
        )
        return self._receivers

    @property
    def _port_base(self) -> int:
        return int(self.host.parameters.x_multifd_port_base)

    def bind(self, number: int) -> str:
        """Where a channel listens; FAULTS is the fault channel."""
        assert isinstance(self._address, Address)
        return self._address.channel_endpoint(number, self._port_base)

    # -- the conversation ------------------------------------------------------------------------

    async def _converse(self, main: Main) -> None:
        """Answer the source until it goes; a right end is the token, which comes another way."""
        while True:
            message = await main.receive()
            answer = ANSWERS.get(type(message))
            if answer is None:
                raise WireError(f"unexpected {type(message).__name__} from the source")
            await answer(self, main, message)

    async def _reopen(self, _main: Main, message: wire.Reopen) -> None:
        self.receivers.reopen(message.index, message.incarnation)

    async def _load_state(self, main: Main, message: wire.DeviceState) -> None:
        self._check_not_promised()
        if len(message.state) > wire.STATE_BYTES_MAX:
            raise WireError(f"device state of {len(message.state)} bytes")
        if self.postcopy is not None and isinstance(main, DestinationEnd):
            await self.postcopy.load_state(message.state, main.lost())
        else:
            await self.host.guest.load_state(message.state)
        self._has_state = True

    async def _arm(self, main: Main, message: wire.Arm) -> None:
        """Promise that the memory is whole: every channel has placed every round, and what is
        missing would be waited for. A stream's source then says `Take` on it; others pass the token
        from guest to guest."""
        self._check_not_promised()
        self._check_placed(message.rounds)
        if not self._has_state:
            raise WireError("the device state has not come")
        if self.postcopy is not None:
            self.postcopy.arm()
        self._runs = message.runs
        if not isinstance(main, StreamDestination):
            self.host.promise(Side.DESTINATION, self.session if self.postcopy else b"")
            runs = message.runs and self.host.runs_on_arrival
            await self.host.guest.arm(self.session, runs, self._take_over)
        await main.send(wire.Armed())

    def _check_not_promised(self) -> None:
        if self._runs is not None or self._taken.is_set():
            raise WireError("a message of the switchover behind its promise")

    def _check_placed(self, rounds: int) -> None:
        if behind := self.receivers.behind(rounds):
            raise WireError(f"channels {behind} have not placed round {rounds}")

    async def _take_stream(self, _main: Main, _message: wire.Take) -> None:
        """The whole stream has come, and the right to run with it."""
        if self._runs is None:
            raise WireError("the stream ended before all of it was promised")
        self.host.promise(Side.DESTINATION)
        runs = self._runs and self.host.runs_on_arrival
        await self.host.guest.take_over(self.session, runs, self._take_over)
        await self._taken.wait()

    async def _take_over(self, _at_ns: int) -> None:
        """The token is here: this guest is the one. In postcopy QEMU tells so before it runs."""
        if self.postcopy is not None:
            self.host.postcopy_begins(Side.DESTINATION, self.session)
            self.set_status(Status.POSTCOPY_ACTIVE)
        self.host.set_run_state(RunState.RUNNING if self.host.guest.is_running else RunState.PAUSED)
        self._taken.set()

    async def _hear_abort(self, _main: Main, message: wire.Abort) -> None:
        if not await has_taken_over(self.host.guest, self._taken):
            raise PeerRefused(f"the source gave up: {wire.cut(message.reason)}")

    def recover(self, address: Address) -> None:
        """`migrate-recover`: wait there for the source, and nowhere else any more. A source that
        has not heard that every page is here may come as well.

        :raise OSError: cannot listen there.
        :raise UsageError: something else is at the unix path, or no postcopy is paused."""
        if self._completion is None or not self.may_recover:
            raise UsageError("Migrate recover can only be run when postcopy is paused.")
        self._completion.open_way(address)

    @property
    def may_recover(self) -> bool:
        """It is paused; or it has completed, and the source may not have heard it."""
        has_begun = self._completion is not None
        return has_begun and self.status in (Status.POSTCOPY_PAUSED, Status.COMPLETED)

    def moved(self, address: Address | VsockAddress) -> None:
        """The source comes here now."""
        self._address = self.address = address

    @property
    def receivers(self) -> ReceiverGroup:
        assert self._receivers is not None, "a source was accepted first"
        return self._receivers

    # -- postcopy --------------------------------------------------------------------------------

    async def _begin_postcopy(self, main: Main, message: wire.BeginPostcopy) -> None:
        if self.postcopy is not None or isinstance(main, StreamDestination):
            raise WireError("postcopy cannot begin here")
        self._check_placed(message.rounds)
        bind = self.bind(FAULT_CHANNEL)
        self.postcopy = await PostcopyDestination.begin(
            self.host, self.session, self.receivers, bind, self.tell
        )
        await main.send(wire.PostcopyReady(self.postcopy.service.endpoint))

    def _need_postcopy(self) -> PostcopyDestination:
        if self.postcopy is None:
            raise WireError("a message of postcopy before it began")
        return self.postcopy

    async def _take_stale(self, _main: Main, message: wire.Stale) -> None:
        self._need_postcopy().take_stale(message)

    async def _discard(self, main: Main, _message: wire.DiscardStale) -> None:
        await self._need_postcopy().discard()
        await main.send(wire.StaleDiscarded())

    async def _fetch_rest(self, _main: Main, _message: wire.Pushed) -> None:
        self._need_postcopy().fetch_rest()

    async def _go_on(self, main: Main, _message: wire.GoOn) -> None:
        if self.status is not Status.POSTCOPY_RECOVER or self._completion is None:
            raise WireError("a postcopy that goes on without a pause")
        await main.send(wire.GoesOn())
        self._completion.go_on()  # last: from now on the conversation may end


Answer = Callable[[IncomingMigration, Main, Any], Awaitable[None]]
ANSWERS: Final[Mapping[type, Answer]] = {
    wire.Reopen: IncomingMigration._reopen,
    wire.DeviceState: IncomingMigration._load_state,
    wire.Arm: IncomingMigration._arm,
    wire.Take: IncomingMigration._take_stream,
    wire.Abort: IncomingMigration._hear_abort,
    wire.BeginPostcopy: IncomingMigration._begin_postcopy,
    wire.Stale: IncomingMigration._take_stale,
    wire.DiscardStale: IncomingMigration._discard,
    wire.Pushed: IncomingMigration._fetch_rest,
    wire.GoOn: IncomingMigration._go_on,
}
