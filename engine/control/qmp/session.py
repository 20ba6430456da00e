"""One client's session: it reads requests, has them executed, and writes answers and events.

What is read, what waits to be executed and what waits to be written is bounded. A command that has
begun runs to its end even if the client leaves, and only its answer is dropped then; a cancellable
one (see `Command`) is cancelled as soon as the client says no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.control.qmp.answers import Negotiation
from engine.control.qmp.connection import Connection
from engine.control.qmp.events import Event, EventQueue
from engine.control.qmp.framing import JsonStream
from engine.control.qmp.lexer import JsonError
from engine.control.qmp.messages import (
    Json,
    Order,
    answer_line,
    error_line,
    greeting,
    identity_of,
    is_out_of_band,
    understand,
)
from engine.control.qmp.monitor import Monitor, current_monitor
from engine.control.qmp.registry import Command, CommandRegistry
from engine.control.qmp.visitor import QmpError
from engine.control.qmp.works import Works, when_all_ended
from engine.errors import MigrationError

log = logging.getLogger("ramferry.qmp")

#: QEMU's QMP_REQ_QUEUE_LEN_MAX: so many, out-of-band and asynchronous ones too, wait for their
#: answer; then nothing more is read from the client.
REQUESTS_MAX: Final = 8
FLUSH_WAIT_S: Final = 1.0  #: a client that does not read for so long loses what waits for it
POLLS_MAX: Final = 4  #: reads that a session keeps with what they were, of
POLL_BYTES_MAX: Final = 256  #: bytes at most


@dataclass(frozen=True, slots=True)
class Poll:
    """One request, all that was read at once, whose command never waits."""

    order: Order
    identity: Json


class Session:
    """One client, from its greeting to its end; owns the connection and the client's monitor."""

    def __init__(self, registry: CommandRegistry, connection: Connection, works: Works) -> None:
        self._registry, self._connection, self._works = registry, connection, works
        self._monitor = Monitor()
        self._is_negotiated = False
        self._oob = False
        self._stream = JsonStream()
        self._polls: dict[bytes, Poll] = {}
        self._room = asyncio.Semaphore(REQUESTS_MAX)  #: for what was read and is not answered
        self._unanswered_count = 0  #: of these
        self._requests: asyncio.Queue[object] = asyncio.Queue()  #: bounded by `_room`
        self._events = EventQueue()
        self._write_lock = asyncio.Lock()
        self._side: set[asyncio.Task[None]] = set()
        self._begun: set[asyncio.Task[bytes]] = set()
        self._cancellable: set[asyncio.Task[bytes]] = set()
        self._says_no_more = False

    async def run(self) -> None:
        """Serve until the client leaves, or until a bug here makes that impossible."""
        helpers = [
            asyncio.ensure_future(helper)
            for helper in (self._read(), self._execute_in_order(), self._write_events())
        ]
        watcher = asyncio.ensure_future(self._cancel_what_nobody_awaits())
        try:
            await self._write(greeting())
            ended, _ = await asyncio.wait(helpers, return_when=asyncio.FIRST_COMPLETED)
            for helper in ended:
                helper.result()
        except ConnectionError:
            log.debug("a monitor's client is gone")
        finally:
            try:
                await self._end((*helpers, watcher, *self._side))
            finally:  # `close` of the server may cancel what is before
                self._connection.close()
                when_all_ended(self._begun, self._monitor.close)

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        if self.dropped_events_count:
            log.info("a monitor's client missed %d events", self.dropped_events_count)
        for task in (*tasks, *self._cancellable):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def dropped_events_count(self) -> int:
        return self._events.dropped_count

    def notify(self, event: Event) -> None:
        """Queue an event for a client that has negotiated; never blocks."""
        if self._is_negotiated:
            self._events.put(event)

    async def flush(self) -> None:
        """Take no more requests, and write what waits, for FLUSH_WAIT_S at most."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(FLUSH_WAIT_S):
                for _ in range(REQUESTS_MAX):
                    await self._room.acquire()
                await self._events.drained()
                if self._connection.is_unsent:  # the rest of an answer
                    await self._write(b"")

    # -- reading ---------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Take requests until the client says no more, and wait until all are answered.

        :raise ConnectionError: nobody is there who could hear an answer."""
        while (requests := await self._connection.receive(self._look)) is not None:
            if self._connection.descriptors:
                await self._take_descriptors()
            for request in requests:
                await self._room.acquire()
                self._unanswered_count += 1
                if not self._is_negotiated:
                    await self._requests.join()  # it decides what the next one may be
                if self._oob and is_out_of_band(request):
                    self._answer_aside(self._begin(self._order(request), identity_of(request)))
                else:
                    self._requests.put_nowait(request)
        gone = asyncio.ensure_future(self._connection.gone())
        answered = asyncio.ensure_future(self._answered())
        try:
            await asyncio.wait((gone, answered), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            answered.cancel()
            await asyncio.gather(gone, answered, return_exceptions=True)

    def _look(self, data: bytes) -> list[object] | None:
        """The requests that `data` ends; None: there are none, or it was one and is answered."""
        is_whole = self._stream.is_at_rest
        if is_whole and (known := self._polls.get(data)) is not None and self._is_idle:
            self._answer_at_once(known)
            return None
        requests = list(self._stream.feed(data))
        if self._connection.descriptors:
            return requests
        if len(requests) == 1 and self._is_idle:
            order = self._order(requests[0])
            if isinstance(order, Order) and order.command.is_immediate:
                poll = Poll(order, identity_of(requests[0]))
                if is_whole and self._stream.is_at_rest and len(data) <= POLL_BYTES_MAX:
                    self._keep(data, poll)
                self._answer_at_once(poll)
                return None
        return requests or None

    def _keep(self, data: bytes, poll: Poll) -> None:
        """Who polls sends the same line again and again: a few are not read a second time."""
        if len(self._polls) < POLLS_MAX:
            self._polls[data] = poll

    @property
    def _is_idle(self) -> bool:
        """Nothing was read before that is not answered, nothing waits to be written."""
        return not (
            self._unanswered_count
            or self._events
            or self._write_lock.locked()
            or self._room.locked()  # `flush` has taken it all
            or self._connection.is_unsent
        )

    def _answer_at_once(self, poll: Poll) -> None:
        """In a third of the time that tasks take.

        :raise ConnectionError: the client is gone."""
        if not self._connection.send_now(self._execute_now(poll.order, poll.identity)):
            self._aside(self._write(b""))

    async def _take_descriptors(self) -> None:
        """Those that came are for the commands that came with them; older ones nobody wants."""
        await self._requests.join()
        self._monitor.close_received()
        while self._connection.descriptors:
            self._monitor.receive(self._connection.descriptors.popleft())

    async def _answered(self) -> None:
        await self._requests.join()
        await asyncio.gather(*self._side, return_exceptions=True)

    async def _cancel_what_nobody_awaits(self) -> None:
        """End cancellable commands when the client says no more, read or not."""
        await self._connection.input_ended()
        self._says_no_more = True
        for task in self._cancellable:
            task.cancel()

    # -- executing -------------------------------------------------------------------------------

    async def _execute_in_order(self) -> None:
        while True:
            request = await self._requests.get()
            order = self._order(request)
            identity = identity_of(request)
            if isinstance(order, QmpError) or order.command.is_immediate:
                await self._answer_now(order, identity)
            elif order.command.is_asynchronous:
                self._answer_aside(self._begin(order, identity))
            else:
                await self._answer(self._begin(order, identity))
            self._requests.task_done()

    def _order(self, request: object) -> Order | QmpError:
        """What a request asks for, or why it cannot be had."""
        try:
            if isinstance(request, JsonError):
                raise QmpError(str(request))
            return understand(request, self._find, oob=self._oob)
        except QmpError as exc:
            return exc

    def _find(self, name: str) -> Command:
        if name == "qmp_capabilities":
            return Command(name, Negotiation, self._negotiate)
        if not self._is_negotiated:
            raise QmpError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        return self._registry.find(name)

    def _begin(self, order: Order | QmpError, identity: Json) -> asyncio.Task[bytes]:
        work = self._works.begin(self._execute(order, identity))
        self._begun.add(work)
        work.add_done_callback(self._begun.discard)
        if isinstance(order, Order) and order.command.is_cancellable:
            self._cancellable.add(work)
            work.add_done_callback(self._cancellable.discard)
            if self._says_no_more:
                work.cancel()
        return work

    async def _execute(self, order: Order | QmpError, identity: Json) -> bytes:
        """The answer as a line; every request has one, whatever happens."""
        current_monitor.set(self._monitor)  # of this task alone
        try:
            if isinstance(order, QmpError):
                raise order
            return answer_line(await order.command.run(order.arguments), identity)
        except QmpError as exc:
            return error_line(exc.class_, str(exc), identity)
        except MigrationError as exc:
            return error_line("GenericError", str(exc), identity)
        except Exception as exc:
            log.exception("internal error in a QMP command")
            return error_line("GenericError", f"internal error: {exc!r}", identity)

    async def _negotiate(self, arguments: Negotiation) -> None:
        if self._is_negotiated:
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored",
                "CommandNotFound",
            )
        self._oob = bool(arguments.enable)
        self._is_negotiated = True

    # -- writing ---------------------------------------------------------------------------------

    async def _answer(self, work: asyncio.Task[bytes]) -> None:
        """Write the answer of what was begun, when it has ended.

        :raise ConnectionError: the client is gone; the command was executed all the same."""
        try:
            await self._write(await asyncio.shield(work))
        finally:
            self._answered_one()

    async def _answer_now(self, order: Order | QmpError, identity: Json) -> None:
        """Execute what never waits, and write its answer: half the time that a task takes.

        :raise ConnectionError: the client is gone."""
        try:
            await self._write(self._execute_now(order, identity))
        finally:
            self._answered_one()

    def _execute_now(self, order: Order | QmpError, identity: Json) -> bytes:
        work = self._execute(order, identity)
        try:
            work.send(None)
        except StopIteration as ended:
            data: bytes = ended.value
            return data
        work.close()
        raise RuntimeError(f"a command that is said to be immediate waits: {order}")

    def _answered_one(self) -> None:
        self._unanswered_count -= 1
        self._room.release()

    def _answer_aside(self, work: asyncio.Task[bytes]) -> None:
        self._aside(self._answer(work))

    def _aside(self, writing: Coroutine[Any, Any, None]) -> None:
        """Go on meanwhile; who is gone hears nothing."""

        async def write() -> None:
            with contextlib.suppress(ConnectionError):
                await writing

        task = asyncio.ensure_future(write())
        self._side.add(task)
        task.add_done_callback(self._side.discard)

    async def _write(self, data: bytes) -> None:
        """After the events that came before it, as QEMU does."""
        async with self._write_lock:
            await self._write_events_that_wait()
            await self._connection.send(data)

    async def _write_events(self) -> None:
        while True:
            await self._events.wait()
            async with self._write_lock:
                await self._write_events_that_wait()

    async def _write_events_that_wait(self) -> None:
        while self._events:
            await self._connection.send(self._events.take())
            self._events.done()
