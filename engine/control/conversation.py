"""The source's conversation with the destination's control process, over the main channel.

Questions wait for their answers with a bound; what the destination says unasked goes to the
senders, or is its word about the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from engine import wire
from engine.control.agreement import Agreement
from engine.control.compression import channels_of, codecs_of, compression_of
from engine.control.encryption import check_encryption
from engine.control.host import Host
from engine.control.mainchannel import SourceEnd
from engine.control.senders import SenderGroup
from engine.control.uri import Address
from engine.errors import MigrationError, NotHandedOver, PeerRefused, WireError
from engine.guest.base import Guest, Handover
from engine.memory.blocks import PAGE_SIZE

log = logging.getLogger("ramferry.source")

ANSWER_WAIT_S: Final = 20.0
HANDOVER_WAIT_NS: Final = 10_000_000_000
#: Pages one by one: 4 GB/s were measured.
DISCARD_BYTES_PER_S_MIN: Final = 200_000_000
#: For the word of the destination's control process when its guest gave none.
VERDICT_WAIT_S: Final = 3.0

Indexed = TypeVar("Indexed", wire.RoundReceived, wire.ChannelBroken)


def hello_of(host: Host, session: bytes) -> wire.Hello:
    """Who this source is, and what will come.

    :raise WireError: more or larger RAM blocks than a message can hold.
    :raise MigrationError: it shall be encrypted."""
    check_encryption(host)
    guest = host.guest
    shapes = [wire.BlockShape.of(block) for block in guest.blocks]
    wire.check_blocks(shapes)
    return wire.Hello(
        wire.VERSION,
        session,
        PAGE_SIZE,
        shapes,
        channels_of(host),
        guest.kind,
        guest.is_running,
        host.uuid if host.capability("validate-uuid") else "",
        codecs_of(compression_of(host)),
    )


class Conversation:
    """The route over parallel channels; owns the main channel until `close`."""

    can_heal, is_one_way = True, False

    def __init__(self, address: Address) -> None:
        self._address = address
        #: Of postcopy: the fault service listens at another endpoint; every page is there.
        self.on_faults_moved: Callable[[str], None] | None = None
        self.on_complete: Callable[[], None] | None = None
        self._main = SourceEnd(address)
        self._answers: dict[object, asyncio.Future[Any]] = {}
        self._verdict: asyncio.Future[Handover] = asyncio.get_running_loop().create_future()

    @property
    def sent_bytes(self) -> int:
        return self._main.sent_bytes

    def open(self) -> None:
        """Nothing: whether somebody listens there shows when we connect."""

    async def connect(self, host: Host, session: bytes) -> Agreement:
        welcome = await self._greet(hello_of(host, session))
        await host.guest.connect_handover(self._address.reach(welcome.handover), session)
        endpoints = [self._address.reach(endpoint) for endpoint in welcome.endpoints]
        return Agreement(endpoints, welcome.codecs, welcome.placement)

    async def _greet(self, hello: wire.Hello) -> wire.Welcome:
        """Connect the main channel and agree.

        :raise PeerRefused: nobody listens there, or the destination does not fit.
        :raise WireError: it does not speak our language.
        :raise TimeoutError: it does not answer."""
        async with asyncio.timeout(ANSWER_WAIT_S):
            await self._main.connect()
            await self._main.send(hello)
            answer = await self._main.receive()
        if isinstance(answer, wire.Refused):
            raise PeerRefused(f"the destination refused: {wire.cut(answer.reason)}")
        if not isinstance(answer, wire.Welcome):
            raise WireError(f"the destination answered Hello with {type(answer).__name__}")
        if answer.version != wire.VERSION or answer.session != hello.session:
            raise WireError(f"the destination speaks version {answer.version}, or another session")
        if len(answer.endpoints) != hello.channels:
            raise WireError(f"{hello.channels} channels wanted, {len(answer.endpoints)} offered")
        return answer

    async def listen(self, senders: SenderGroup) -> None:
        """Take what the destination says, until the channel is closed.

        :raise PeerRefused: it failed, and says why.
        :raise ConnectionLost: the main channel is gone."""
        while True:
            message = await self._main.receive()
            match message:
                case wire.RoundReceived():
                    senders.received(_checked(message, senders))
                case wire.ChannelBroken():
                    senders.broken(_checked(message, senders))
                case wire.Failed(reason):
                    self._judge(Handover.REFUSED)
                    raise PeerRefused(f"the destination failed: {wire.cut(reason)}")
                case wire.TookOver():
                    self._judge(Handover.TAKEN)
                case wire.FaultsMoved(faults) if self.on_faults_moved is not None:
                    self.on_faults_moved(self._address.reach(faults))
                case wire.HasAll() if self.on_complete is not None:
                    self.on_complete()
                    return
                case _ if self._answers_to(message):
                    pass
                case _:
                    raise WireError(f"unexpected {type(message).__name__} from the destination")

    def _answers_to(self, message: wire.Message) -> bool:
        """Pass an answer to whoever asked; False for what is none."""
        match message:
            case wire.Reopened(index, incarnation, endpoint):
                self._answer(("reopened", index, incarnation), endpoint)
            case wire.PostcopyReady(faults):
                self._answer("postcopy", faults)
            case wire.Armed() if "armed" in self._answers:
                self._answer("armed", None)
            case wire.StaleDiscarded():
                self._answer("stale", None)
            case wire.GoesOn():
                self._answer("goes-on", None)
            case _:
                return False
        return True

    async def reopen(self, index: int, incarnation: int) -> str:
        """Ask for a fresh endpoint of a channel.

        :raise TimeoutError: no answer."""
        endpoint = await self._ask(
            ("reopened", index, incarnation), wire.Reopen(index, incarnation)
        )
        return self._address.reach(str(endpoint))

    async def round_sent(self) -> None:
        """Nothing: the destination acknowledges rounds."""

    async def check(self, guest: Guest) -> None:
        await guest.check_handover()

    async def arm(self, senders: SenderGroup, state: bytes, rounds: int, runs: bool) -> None:
        await self._main.send(wire.DeviceState(state))
        await self._ask("armed", wire.Arm(rounds, runs))

    async def hand_over(self, guest: Guest, *, keeps_ram: bool) -> tuple[Handover, str]:
        """The guests do it among themselves; if ours has no answer, the destination's control may
        know. Also why it was not taken over, if that is known."""
        reason = ""
        try:
            outcome = await guest.hand_over(HANDOVER_WAIT_NS, keeps_ram=keeps_ram)
        except NotHandedOver:
            raise
        except (MigrationError, OSError) as exc:
            log.error("handing over: %s", exc)
            outcome, reason = Handover.UNKNOWN, str(exc)
        if outcome is Handover.UNKNOWN:
            outcome = await self._ask_control(guest)
        return outcome, reason if outcome is Handover.REFUSED else ""

    async def _ask_control(self, guest: Guest) -> Handover:
        """What became of a token, by the word of the destination's control process. One that has
        not come shall not come any more: nobody may be left who could send it."""
        if not self._verdict.done():
            await self._main.say_last(wire.Abort("its guest does not say what became of the token"))
            await asyncio.wait({self._verdict}, timeout=VERDICT_WAIT_S)
        if not self._verdict.done():
            return Handover.UNKNOWN
        verdict = self._verdict.result()
        if verdict is Handover.REFUSED:
            with contextlib.suppress(MigrationError):  # it stands, and says so when it is asked
                await guest.settle(taken=False)
        return verdict

    async def taken(self) -> None:
        """Wait until the destination has said that the guest runs there, which it may never say."""
        if await asyncio.shield(self._verdict) is not Handover.TAKEN:
            await asyncio.Event().wait()

    def _judge(self, verdict: Handover) -> None:
        if not self._verdict.done():
            self._verdict.set_result(verdict)

    # -- postcopy --------------------------------------------------------------------------------

    async def begin_postcopy(self, rounds: int) -> str:
        """No round follows these; return where the fault service listens.

        :raise TimeoutError: no answer."""
        faults = await self._ask("postcopy", wire.BeginPostcopy(rounds))
        return self._address.reach(str(faults))

    async def say_stale(self, pieces: Iterable[wire.Stale]) -> None:
        """Name pages that are old at the destination."""
        for piece in pieces:
            await self._main.send(piece)

    async def discard_stale(self, byte_count: int) -> None:
        """Have what was named freed.

        :param byte_count: of RAM, at most.
        :raise TimeoutError: no answer."""
        wait_s = ANSWER_WAIT_S + byte_count / DISCARD_BYTES_PER_S_MIN
        await self._ask("stale", wire.DiscardStale(), wait_s)

    async def push_ended(self) -> None:
        """Everything was pushed; the destination asks for what it lacks, then `on_complete`."""
        await self._main.send(wire.Pushed())

    async def reconnect(self) -> None:
        """Reach a destination whose postcopy is paused.

        :raise PeerRefused: nobody listens there.
        :raise TimeoutError: it does not answer."""
        async with asyncio.timeout(ANSWER_WAIT_S):
            await self._main.connect()

    async def resync(
        self, question: wire.Resume, take: Callable[[wire.Received], None]
    ) -> tuple[Agreement, str] | None:
        """Learn what the destination has, and its new ways; the second is the fault service's.
        None: it has every page.

        :raise PeerRefused: it is not the right one, or not paused.
        :raise WireError: it does not speak our language.
        :raise TimeoutError: it does not answer."""
        await self._main.send(question)
        while True:
            async with asyncio.timeout(ANSWER_WAIT_S):
                answer = await self._main.receive()
            match answer:
                case wire.Received():
                    take(answer)
                case wire.FaultsMoved():
                    pass  # `Resumed` is newer
                case wire.HasAll():
                    return None
                case wire.Refused(reason) | wire.Failed(reason):
                    raise PeerRefused(f"the destination refused: {wire.cut(reason)}")
                case wire.Resumed(version, session, endpoints, faults, codecs):
                    if (version, session) != (wire.VERSION, question.session):
                        raise WireError(f"the destination speaks version {version}")
                    if len(endpoints) != question.channels:
                        raise WireError(f"{question.channels} channels wanted, not so many offered")
                    reached = [self._address.reach(endpoint) for endpoint in endpoints]
                    return Agreement(reached, codecs), self._address.reach(faults)
                case _:
                    raise WireError(f"the destination answered with {type(answer).__name__}")

    async def go_on(self) -> None:
        """Every channel is open again.

        :raise TimeoutError: no answer."""
        await self._ask("goes-on", wire.GoOn())

    async def _ask(self, key: object, message: wire.Message, wait_s: float = ANSWER_WAIT_S) -> Any:
        self._answers[key] = answer = asyncio.get_running_loop().create_future()
        try:
            await self._main.send(message)
            return await asyncio.wait_for(answer, wait_s)
        finally:
            if self._answers.get(key) is answer:
                del self._answers[key]

    def _answer(self, key: object, value: object) -> None:
        waiting = self._answers.get(key)
        if waiting is not None and not waiting.done():
            waiting.set_result(value)

    def stop_waiting(self) -> None:
        """Nothing: every wait here has its end."""

    async def break_off(self, last_word: wire.Abort | None) -> None:
        """Say a last word if anybody is there to hear it, and close."""
        if last_word is not None:
            await self._main.say_last(last_word)
        self._main.close()

    async def close(self) -> None:
        self._main.close()


def _checked(message: Indexed, senders: SenderGroup) -> Indexed:
    if not 0 <= message.index < senders.count:
        raise WireError(f"the destination speaks of channel {message.index}")
    return message
