"""The destination from the token on: until every page is here, through any number of pauses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from engine import wire
from engine.compress.codecs import CODEC_IDS
from engine.control.fitting import check_resumes, refuse
from engine.control.framestream import ConnectionLost
from engine.control.host import Host
from engine.control.mainchannel import DestinationEnd
from engine.control.postcopy.destination import PostcopyDestination
from engine.control.receivers import ReceiverGroup
from engine.control.status import Status
from engine.control.uri import FAULT_CHANNEL, Address, VsockAddress
from engine.errors import GuestError, MigrationError, PeerRefused, WireError, text_of

log = logging.getLogger("ramferry.destination")

GOODBYE_WAIT_S: Final = 1.0
DYING_WAIT_S: Final = 5.0  #: from a guest's last page, which its kernel frees first, to its end
BEGIN_AGAIN_S: Final = 1.0  #: between two tries to start a fault service


class Migration(Protocol):
    """What `Completion` uses of the incoming migration that it belongs to."""

    host: Host
    session: bytes
    status: Status
    error: str | None
    address: Address | VsockAddress | None

    def set_status(self, status: Status) -> None: ...
    def tell(self, message: wire.Message) -> None: ...
    def bind(self, number: int) -> str: ...
    def moved(self, address: Address) -> None: ...
    def use(self, main: Any, count: int) -> ReceiverGroup: ...
    def forget_failure(self) -> None: ...
    async def unless_failed(self, *works: Coroutine[Any, Any, object]) -> None: ...
    async def converse_until(self, main: Any, over: asyncio.Event) -> None: ...
    async def end_channels(self, main: Any, *, has_failed: bool) -> None: ...
    async def last_word(self, main: Any, message: wire.Message) -> None: ...


class Completion:
    """Owns the listener of `migrate-recover` until its source has come."""

    def __init__(self, migration: Migration, main: Any) -> None:
        """
        :param main: the main channel, as long as it lasts."""
        self._migration = migration
        self._postcopy: PostcopyDestination | None = None
        self.main = main
        self._next: DestinationEnd[wire.Resume] | None = None
        self._is_opened = asyncio.Event()  #: a way that nobody waits at yet
        self._saying: asyncio.Task[None] | None = None  #: once more that every page is here
        self._goes_on = asyncio.Event()  #: the source has every channel, and knows that we wait

    @property
    def postcopy(self) -> PostcopyDestination:
        assert self._postcopy is not None, "`run` comes first"
        return self._postcopy

    async def run(self, postcopy: PostcopyDestination, failure: Exception | None) -> None:
        """:param failure: of the connections, before the guest was known to be ours."""
        self._postcopy = postcopy
        self._goes_on.set()
        if failure is None:
            await self._migration.last_word(self.main, wire.TookOver())
        await self._run(failure)

    async def begin_again(self) -> PostcopyDestination:
        """Serve faults after the death of the control process that had begun it. As long as the
        guest lives nothing is given up. `open_way` may come before this has ended.

        :raise GuestError: it is dead."""
        migration = self._migration
        host = migration.host
        while self._postcopy is None:
            try:
                self._postcopy = await PostcopyDestination.again(
                    host, migration.session, migration.tell
                )
            except (MigrationError, OSError, TimeoutError) as exc:
                if not host.guest.is_alive:
                    raise GuestError(f"the guest is dead: {text_of(exc)}") from exc
                migration.error = f"the fault service cannot be started: {text_of(exc)}"
                log.error("%s", migration.error)
                await asyncio.sleep(BEGIN_AGAIN_S)
        return self._postcopy

    async def run_paused(self) -> None:
        """As `run`, after `begin_again`."""
        await self._run(MigrationError("the control process before this one was killed"))

    async def _run(self, failure: Exception | None) -> None:
        migration, has_all = self._migration, self.postcopy.service.has_all
        while failure is not None or not (self._goes_on.is_set() and has_all.is_set()):
            try:
                if failure is not None:
                    raise failure
                for fact in (self._goes_on, has_all):
                    await migration.converse_until(self.main, fact)
            except (MigrationError, OSError, TimeoutError) as caught:
                exc = await self._why(caught)
                if not migration.host.guest.is_alive:
                    await self._fail(exc)
                    return
                if has_all.is_set():  # whoever else is gone, nobody waits for a page any more
                    log.warning("every page is here, and the source is lost: %s", text_of(exc))
                    break
                failure = await self._pause_and_resync(exc)
        migration.error = None
        if self.main is not None:
            self.main.stop_listening()  # a source that comes back finds nobody, and can tell why
        if migration.status is Status.POSTCOPY_PAUSED:  # by ways that QEMU's go, too
            migration.set_status(Status.POSTCOPY_RECOVER)
        if migration.status is Status.POSTCOPY_RECOVER:
            migration.set_status(Status.POSTCOPY_ACTIVE)
        migration.set_status(Status.COMPLETED)
        if self.main is not None:
            await self._say_all()
        await self.postcopy.end(is_closing=True)

    async def _say_all(self) -> None:
        await self._migration.last_word(self.main, wire.HasAll())
        with contextlib.suppress(ConnectionLost, WireError, TimeoutError):
            async with asyncio.timeout(GOODBYE_WAIT_S):  # the source hangs up, page service first
                while True:
                    await self.main.receive()

    async def _say_again(self) -> None:
        """The source may not have heard that every page is here: tell it when it comes by the way
        that was opened."""
        try:
            await self._next_source(asyncio.Event())
            await self._say_all()
        except (MigrationError, OSError) as exc:
            log.warning("the source was not told that every page is here: %s", text_of(exc))
        finally:
            self.close()
            if self.main is not None:
                self.main.close()
            self._saying = None

    async def end_saying(self) -> None:
        """Idempotent."""
        await _cancel(self._saying)

    async def _why(self, exc: Exception) -> Exception:
        """What it was in truth: whoever inserts pages sees the guest's end first."""
        guest = self._migration.host.guest
        if isinstance(exc, GuestError) or not guest.is_alive:
            with contextlib.suppress(TimeoutError):
                reason = await asyncio.wait_for(guest.died(), DYING_WAIT_S)
                return GuestError(f"the guest died: {reason}")
        return exc

    async def _fail(self, exc: Exception) -> None:
        """The guest is dead: nobody needs its pages any more."""
        self._migration.error = text_of(exc)
        log.error("postcopy ends: %s", self._migration.error)
        self._migration.set_status(Status.FAILED)
        if self.main is not None:
            await self._migration.last_word(self.main, wire.Failed(wire.cut(text_of(exc))))

    async def _pause_and_resync(self, exc: Exception) -> Exception | None:
        """Wait for a way to the source; what breaks that off is another failure."""
        migration = self._migration
        migration.error = text_of(exc)
        log.warning("postcopy is paused: %s", migration.error)
        await migration.end_channels(self.main, has_failed=False)
        self.main, migration.address = None, None
        self._goes_on.clear()
        if migration.status is not Status.POSTCOPY_PAUSED:
            migration.set_status(Status.POSTCOPY_PAUSED)
        migration.forget_failure()
        try:
            question = await self._next_source(self.postcopy.service.has_all)
            migration.set_status(Status.POSTCOPY_RECOVER)
            await migration.unless_failed(self._resync(question))
        except (MigrationError, OSError, TimeoutError) as again:
            return again
        return None

    def go_on(self) -> None:
        """The source has opened every channel."""
        migration = self._migration
        migration.error = None
        migration.set_status(Status.POSTCOPY_ACTIVE)
        self._goes_on.set()

    # -- another way -----------------------------------------------------------------------------

    def open_way(self, address: Address) -> None:
        """Wait there for the source, and nowhere else any more.

        :raise OSError: cannot listen there.
        :raise UsageError: something else is at the unix path."""
        if self._next is not None:
            self._next.close()
            self._next = None
        self._next = DestinationEnd(address, wire.Resume)
        self._migration.moved(self._next.address)
        self._is_opened.set()
        if self._migration.status is Status.COMPLETED and self._saying is None:
            self._saying = asyncio.get_running_loop().create_task(self._say_again())

    async def _next_source(self, needless: asyncio.Event) -> wire.Resume:
        """Wait for our source, wherever we listen; others are told what is wrong.

        :raise GuestError: the guest has died.
        :raise MigrationError: `needless` came first."""
        died = asyncio.ensure_future(self._migration.host.guest.died())
        ended = asyncio.ensure_future(needless.wait())
        accepting: asyncio.Future[Any] | None = None
        try:
            while True:
                opened = asyncio.ensure_future(self._is_opened.wait())
                waiting = {one for one in (died, ended, opened, accepting) if one is not None}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                opened.cancel()
                if died.done():
                    raise GuestError(f"the guest died: {died.result()}")
                if ended.done():
                    raise MigrationError("the last page came after the connections were lost")
                if self._is_opened.is_set():
                    self._is_opened.clear()
                elif accepting is not None and (source := await self._judge(accepting.result())):
                    self.main, self._next = self._next, None
                    return source
                await _cancel(accepting)
                assert self._next is not None
                accepting = asyncio.ensure_future(self._next.accept())
        finally:
            await _cancel(died)
            await _cancel(ended)
            await _cancel(accepting)

    async def _judge(self, question: wire.Resume) -> wire.Resume | None:
        """None, and a refusal, if it is not our source."""
        assert self._next is not None
        try:
            check_resumes(self._migration.host, self._migration.session, question)
        except (PeerRefused, WireError) as exc:
            await refuse(self._next, exc)
            return None
        return question

    async def _resync(self, question: wire.Resume) -> None:
        """Tell the source what is here, and where to send the rest."""
        migration, postcopy = self._migration, self.postcopy
        receivers = migration.use(self.main, question.channels)
        pieces = await postcopy.resync(receivers, migration.bind(FAULT_CHANNEL))
        await receivers.start()
        for piece in pieces:
            await self.main.send(piece)
        faults, codecs = await postcopy.service.where(), tuple(CODEC_IDS.values())
        answer = wire.Resumed(wire.VERSION, migration.session, receivers.endpoints, faults, codecs)
        await self.main.send(answer)

    def close(self) -> None:
        """Wait for no source any more. Idempotent."""
        if self._next is not None:
            self._next.close()
            self._next = None


async def _cancel(task: asyncio.Future[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
