"""Control's end of its guest's process: requests with a bound, and its death noticed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from engine.errors import (
    ChannelError,
    GuestError,
    MemoryRefused,
    MigrationError,
    NotHandedOver,
    UsageError,
    WireError,
)
from engine.guest import datagrams, messages

log = logging.getLogger("ramferry.guest")

ANSWER_WAIT_S: Final = 10.0
ADOPT_WAIT_S: Final = 5.0
END_WAIT_S: Final = 2.0
DEATH_WAIT_S: Final = 0.5  #: from the end of the connection to that of the process
AnswerT = TypeVar("AnswerT", bound=messages.Answer)
ERRORS: Final[dict[str, Callable[[str], MigrationError]]] = {
    "MemoryRefused": MemoryRefused,
    "NotHandedOver": NotHandedOver,
    "UsageError": UsageError,
    "ChannelError": lambda doing: ChannelError(-1, doing),
}


class AgentLink:
    """The connection to an agent; owns it, the process if it is our child, and descriptors in
    answers until they are taken.
    """

    def __init__(
        self, connection: socket.socket, pid: int, child: subprocess.Popen[bytes] | None
    ) -> None:
        """Take the connection and the child over.

        :raise GuestError: the process has ended already."""
        self.pid, self._child = pid, child
        self.on_event: Callable[[messages.Event], None] | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[messages.Answer, list[int]]]] = {}
        self._decoder = messages.answer_decoder()
        self._dead = asyncio.Event()
        self._death = ""
        self._is_ending = False
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as exc:
            connection.close()
            raise GuestError(f"the guest's process {pid} has ended") from exc
        connection.setblocking(False)
        self._socket: socket.socket | None = connection
        loop = asyncio.get_running_loop()
        loop.add_reader(connection, self._read)
        loop.add_reader(self._pidfd, self._reap)

    # -- requests --------------------------------------------------------------------------------

    def next_id(self) -> int:
        """For the next request."""
        return next(self._ids)

    async def ask(
        self,
        request: messages.Request,
        wanted: type[AnswerT],
        fds: Sequence[int] = (),
        wait_s: float = ANSWER_WAIT_S,
    ) -> tuple[AnswerT, list[int]]:
        """Ask, and wait for the answer; its descriptors are the caller's.

        :raise GuestError: the guest is dead, refuses, or does not answer in time."""
        if self._socket is None:
            raise GuestError(f"the guest is dead: {self._death or 'it hung up'}")
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        try:
            datagrams.send(self._socket, request, fds)
            async with asyncio.timeout(wait_s):
                await asyncio.wait([future])
        except TimeoutError as exc:
            raise GuestError(
                f"the guest (pid {self.pid}) did not answer {type(request).__name__} "
                f"in {wait_s:g} s"
            ) from exc
        except OSError as exc:
            raise GuestError(f"the guest (pid {self.pid}) takes no requests") from exc
        finally:
            self._waiting.pop(request.id, None)
        answer, answer_fds = future.result()
        if isinstance(answer, wanted):
            return answer, answer_fds
        datagrams.close_all(answer_fds)
        if isinstance(answer, messages.Failed):
            raise ERRORS.get(answer.error, GuestError)(answer.reason)
        raise GuestError(f"the guest answered with {type(answer).__name__}")

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data, fds = datagrams.receive(self._socket)
        except BlockingIOError:
            return
        except (OSError, WireError) as exc:
            self._hang_up(str(exc) if isinstance(exc, WireError) else "it hung up")
            return
        if not data:
            self._hang_up("it hung up")
            return
        try:
            answer = self._decoder.decode(data)
        except WireError as exc:
            datagrams.close_all(fds)
            self._hang_up(str(exc))
            return
        if isinstance(answer, messages.Event):
            if self.on_event is not None:
                self.on_event(answer)
            return
        waiting = self._waiting.pop(answer.id, None)
        if waiting is None or waiting.done():
            datagrams.close_all(fds)
        else:
            waiting.set_result((answer, fds))

    def _hang_up(self, reason: str) -> None:
        """Without its connection the agent goes on or ends by its own rules.

        Those who wait are told when its death is known, which says more, or soon."""
        if self._socket is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        self._death = self._death or reason
        loop.call_later(DEATH_WAIT_S, self._fail_waiting)

    def _fail_waiting(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(GuestError(f"the guest is dead: {self._death}"))
        self._waiting.clear()

    # -- the end ---------------------------------------------------------------------------------

    def _reap(self) -> None:
        """What it said before its end counts: `Taken` may be among it."""
        while self._socket is not None and _can_be_read(self._socket):
            self._read()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        code = self._child.wait() if self._child is not None else None
        if self._is_ending:
            self._death = "it was told to end"
        elif code is not None and code < 0:
            self._death = f"its process {self.pid} was killed by {_signal_name(-code)}"
        else:
            self._death = f"its process {self.pid} ended" + (f" with code {code}" if code else "")
        self._hang_up(self._death)
        self._fail_waiting()
        self._dead.set()

    @property
    def is_alive(self) -> bool:
        """The process has not ended."""
        return not self._dead.is_set()

    async def died(self) -> str:
        """Wait for the end of the process; return why."""
        await self._dead.wait()
        return self._death

    async def end(self) -> bool:
        """Ask it to end, kill it if it does not; when this returns the process is gone. Whether it
        ended by itself then, and so has put right what it had changed."""
        was_alive, self._is_ending = self.is_alive, True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                datagrams.send(self._socket, messages.Quit(self.next_id()))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._dead.wait(), END_WAIT_S)
        was_killed = self.is_alive
        if was_killed:
            log.warning("guest (pid %d) does not end, killing it", self.pid)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self._dead.wait()
        self._hang_up(self._death)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        return was_alive and not was_killed

    def leave(self) -> None:
        """Give the connection up, the process goes on."""
        self._hang_up("left alone")
        self._fail_waiting()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)


def _can_be_read(connection: socket.socket) -> bool:
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    return bool(waiting.poll(0))


def _signal_name(number: int) -> str:
    """SIGKILL and the like; real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def start_agent(module: str = "engine.guest.agent") -> AgentLink:
    """Start an agent in a session of its own, so that Ctrl-C does not reach it.

    :raise GuestError: it cannot be started."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as exc:
            ours.close()
            raise GuestError("the guest's process cannot be started") from exc
    return AgentLink(ours, child.pid, child)


def adopt_agent(path: str) -> AgentLink:
    """Connect to an agent whose control process died.

    :raise UsageError: there is none.
    :raise GuestError: it has just ended."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
    except OSError as exc:
        connection.close()
        raise UsageError(f"no guest waits at '{path}': {exc.strerror}") from exc
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return AgentLink(connection, struct.unpack("3i", credentials)[0], None)
