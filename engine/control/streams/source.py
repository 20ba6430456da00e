"""A source's end of a stream: begun by control, filled by one sender, ended by control."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any, Final

import msgspec

from engine import wire
from engine.compress.codecs import CODEC_IDS
from engine.control.agreement import Agreement
from engine.control.conversation import ANSWER_WAIT_S, hello_of
from engine.control.framestream import ConnectionLost
from engine.control.host import Host
from engine.control.senders import SenderGroup
from engine.control.streams import vsock
from engine.control.streams.child import Child
from engine.control.streams.line import ChunkWriter, MessageReader
from engine.control.streams.opening import Sources, Stream, open_source, read_all
from engine.control.uri import StreamAddress, VsockAddress
from engine.errors import GuestError, MigrationError, PeerRefused, WireError
from engine.guest.base import Guest, Handover

log = logging.getLogger("ramferry.source")

TAKE_WAIT_S: Final = 10.0  #: everything was taken: for the destination to say that it runs
CHILD_GRACE_S: Final = 5.0  #: after an end that the destination has confirmed


class StreamRoute:
    """One migration's; owns the stream."""

    can_heal = False

    def __init__(self, address: StreamAddress, sources: Sources, *, answers: bool) -> None:
        """:param answers: the capability `return-path`: the destination answers on the stream."""
        self._address, self._sources, self._answers = address, sources, answers
        self._stream: Stream | None = None
        self._writer: ChunkWriter | None = None
        loop = asyncio.get_running_loop()
        self._armed: asyncio.Future[None] = loop.create_future()
        self._verdict: asyncio.Future[Handover] = loop.create_future()
        self._is_arming = self._is_taking = self._is_over = False
        self._flushing: asyncio.Future[None] | None = None
        self._waits_no_more = asyncio.Event()

    @property
    def is_one_way(self) -> bool:
        return not self._answers

    @property
    def sent_bytes(self) -> int:
        return self._writer.sent_bytes if self._writer is not None else 0

    # -- setup -----------------------------------------------------------------------------------

    def open(self) -> None:
        stream = open_source(self._address, self._sources, answers=self._answers)
        if stream is not None:
            self._use(stream)

    def _use(self, stream: Stream) -> None:
        self._stream = stream
        self._writer = ChunkWriter(stream.fd, is_file=stream.start is not None)

    async def connect(self, host: Host, session: bytes) -> Agreement:
        hello = msgspec.structs.replace(hello_of(host, session), channels=1)
        if isinstance(self._address, VsockAddress):
            async with asyncio.timeout(ANSWER_WAIT_S):
                self._use(await vsock.connect(self._address))
        stream, writer = self._need()
        await writer.send(wire.StreamHello(hello, self._answers))
        return Agreement(
            ["stream"],
            tuple(CODEC_IDS.values()),
            stream_fd=stream.fd,
            is_acknowledged=self._answers,
        )

    async def reopen(self, index: int, incarnation: int) -> str:
        raise MigrationError("a stream that broke cannot be made anew")

    async def check(self, guest: Guest) -> None:
        """The sender sees at once when nobody reads any more."""

    # -- what comes back -------------------------------------------------------------------------

    async def listen(self, senders: SenderGroup) -> None:
        stream, _ = self._need()
        if self._answers:
            await self._hear(MessageReader(stream.answer_fd, wire.StreamAnswer, 65536), senders)
        elif stream.child is not None:
            status = await stream.child.wait()
            if not self._is_taking:
                raise MigrationError(f"{stream.child.describe(status)} before the stream did")

    async def _hear(self, reader: MessageReader, senders: SenderGroup) -> None:
        while True:
            try:
                message = await reader.receive()
            except (ConnectionLost, WireError):
                self._judge(Handover.UNKNOWN)
                raise
            match message:
                case wire.RoundReceived() if message.index == 0:
                    senders.received(message)
                case wire.Armed() if self._is_arming and not self._armed.done():
                    self._armed.set_result(None)
                case wire.TookOver() if self._is_taking:
                    self._judge(Handover.TAKEN)
                case wire.Failed(reason) | wire.Refused(reason):
                    self._judge(Handover.REFUSED)
                    raise PeerRefused(f"the destination failed: {wire.cut(reason)}")
                case _:
                    raise WireError(f"unexpected {type(message).__name__} from the destination")

    def _judge(self, verdict: Handover) -> None:
        if not self._verdict.done():
            self._verdict.set_result(verdict)

    # -- the end of the rounds -------------------------------------------------------------------

    async def round_sent(self) -> None:
        """A file's rounds are on the disk while the guest still runs, not all at the end."""
        await self._flush(os.fdatasync)

    async def _flush(self, sync: Any) -> None:
        """:raise OSError: what was written to the file may not be there."""
        stream, _ = self._need()
        if stream.start is None:
            return
        loop = asyncio.get_running_loop()
        self._flushing = loop.run_in_executor(None, sync, stream.fd)
        await asyncio.shield(self._flushing)

    async def arm(self, senders: SenderGroup, state: bytes, rounds: int, runs: bool) -> None:
        _, writer = self._need()
        await senders.end_channels()
        await writer.send(wire.DeviceState(state))
        self._is_arming = True
        await writer.send(wire.Arm(rounds, runs))
        if self._answers:
            await asyncio.wait_for(asyncio.shield(self._armed), ANSWER_WAIT_S)

    # -- the right to run ------------------------------------------------------------------------

    async def hand_over(self, guest: Guest, *, keeps_ram: bool) -> tuple[Handover, str]:
        """The guest gives its right up before the first byte of `Take` is written: whoever dies
        from here on, it does not run by itself."""
        try:
            await guest.give_away()
        except GuestError as exc:  # nothing was written, so nobody else can have it
            with contextlib.suppress(MigrationError):  # it, too, learns that it is its own
                await guest.settle(taken=False)
            return Handover.REFUSED, f"the guest does not give its right to run up: {exc}"
        outcome, reason = await self._take()
        if outcome is Handover.REFUSED:
            await guest.settle(taken=False)
        elif outcome is Handover.TAKEN and self._answers:
            try:
                await guest.settle(taken=True)
            except GuestError as exc:  # it stands, and is not needed any more
                log.warning("the guest was not told that it runs at the destination: %s", exc)
        return outcome, reason

    async def _take(self) -> tuple[Handover, str]:
        stream, writer = self._need()
        try:
            await self._flush(os.fdatasync)
            self._is_taking = True
            await writer.send(wire.Take())
        except (ConnectionLost, OSError) as exc:
            return Handover.REFUSED, str(exc)
        if self._answers:
            await asyncio.wait({self._verdict}, timeout=TAKE_WAIT_S)
            outcome = self._verdict.result() if self._verdict.done() else Handover.UNKNOWN
            self._is_over = outcome is Handover.TAKEN
            return outcome, ""
        return await self._settle_alone(stream)

    async def _settle_alone(self, stream: Stream) -> tuple[Handover, str]:
        """Nobody answers: everything was taken, and what can still be checked is right."""
        try:
            await self._flush(os.fsync)
        except OSError as exc:
            reason = f"Unable to write: {exc.strerror}"
            return (Handover.REFUSED if self._void(stream) else Handover.UNKNOWN), reason
        stream.say_end()
        if stream.child is not None:
            return await self._settle_with(stream, stream.child)
        self._is_over = True
        return Handover.TAKEN, ""

    async def _settle_with(self, stream: Stream, child: Child) -> tuple[Handover, str]:
        """The program sees the end, and has as long as it lives to pass on what it has taken, or
        until `stop_waiting`. What it leaves unread is taken back, the last byte with it: then
        nobody has all of `Take`, nor ever will."""
        with stream.reopened_for_reading() as unread:
            stream.close()
            ended = await self._ended(child)
            status = await child.wait()
            if left := read_all(unread):
                return Handover.REFUSED, f"{ended}, and left {left} bytes of the stream unread"
        if status:
            return Handover.UNKNOWN, f"{ended} after it had taken the whole stream"
        self._is_over = True
        return Handover.TAKEN, ""

    async def _ended(self, child: Child) -> str:
        """Wait for its end, or make it, and tell how it came."""
        waits = [asyncio.ensure_future(one) for one in (child.wait(), self._waits_no_more.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if waits[0].done():
                return child.describe(await child.wait())
            await child.kill()
            return "the command was ended, as it was to be waited for no more,"
        finally:
            for one in waits:
                one.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def stop_waiting(self) -> None:
        self._waits_no_more.set()

    @staticmethod
    def _void(stream: Stream) -> bool:
        """Take what was written out of the file again; False where that cannot be done."""
        if not stream.may_be_cut or stream.fd < 0:
            return False
        try:
            os.ftruncate(stream.fd, stream.start or 0)
        except OSError as exc:
            log.warning("what was written cannot be taken back: %s", exc.strerror)
            return False
        return True

    # -- the end ---------------------------------------------------------------------------------

    async def break_off(self, last_word: wire.Abort | None) -> None:
        """A stream has no room for last words: its end is one."""
        if self._stream is not None and not self._is_over:
            self._stream.cut()

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if self._flushing is not None:
            with contextlib.suppress(OSError):
                await self._flushing
        if self._writer is not None:
            await self._writer.settle()
        if not self._is_over:
            self._void(stream)
        stream.close()
        if stream.child is not None:
            if self._is_over:
                await stream.child.end(CHILD_GRACE_S)
            else:
                await stream.child.kill()

    def _need(self) -> tuple[Stream, ChunkWriter]:
        assert self._stream is not None, "`open` or `connect` comes first"
        assert self._writer is not None
        return self._stream, self._writer
