"""What the guest tests share: scenarios with a deadline, guests that always end, a stub control."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.guest.judgement import Judgement
from engine.guest.spec import WorkloadSpec, open_workload, parse_guest_spec
from engine.guest.token import MESSAGE, Kind, decode, encode
from engine.guest.workload import WorkloadGuest

DEADLINE_S = 120.0
SECOND_NS = 1_000_000_000
SESSION = bytes(range(1, 17))
T = TypeVar("T")


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario; a hang fails it."""

    async def bounded() -> T:
        async with asyncio.timeout(DEADLINE_S):
            return await scenario

    return asyncio.run(bounded())


@contextlib.asynccontextmanager
async def workload(text: str, *, incoming: bool = False, start: bool = True) -> AsyncIterator[Any]:
    """A workload guest of this specification, ended on every path."""
    spec = parse_guest_spec(f"workload:{text}")
    assert isinstance(spec, WorkloadSpec)
    guest = await open_workload(spec, incoming=incoming, run=start)
    try:
        yield guest
    finally:
        await guest.quit()


@contextlib.asynccontextmanager
async def judged(guest: WorkloadGuest) -> AsyncIterator[Judgement]:
    """Its judgement, given back."""
    judgement = await guest.judge()
    try:
        yield judgement
    finally:
        judgement.close()


async def writes_reach(guest: WorkloadGuest, count: int) -> None:
    """Wait until the vCPUs have made so many writes."""
    while (await guest.writes() or 0) < count:
        await asyncio.sleep(0.002)


def copy_ram(source: WorkloadGuest, destination: WorkloadGuest) -> None:
    """What the engine would do, in one go."""
    with source.blocks[0].map() as here, destination.blocks[0].map() as there:
        there[:] = here[:]


def ended_within(pid: int, wait_s: float = 60.0) -> bool:
    """Wait for the end of any process."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], wait_s)[0])
    finally:
        os.close(pidfd)


class Stub:
    """A control process of its own with one guest; takes orders line by line, can be killed."""

    def __init__(self, spec: str, *, incoming: bool, wait: bool = True) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.guest.stub", spec, "incoming" if incoming else "source"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        self.guest_pid = 0
        if wait:
            self.guest_pid = self.read()["pid"]

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the stub died"
        return json.loads(line)

    def order(self, **order: Any) -> None:
        """Give an order, do not wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def do(self, **order: Any) -> Any:
        """Give an order and wait for its result."""
        self.order(**order)
        return self.read()["result"]

    def kill(self) -> None:
        """kill -9, and reap."""
        self._process.kill()
        self._process.wait()

    def line_of_guest(self) -> str:
        """What the guest says on stderr after its control process was killed."""
        assert self._process.stderr is not None
        assert select.select([self._process.stderr], [], [], 60)[0], "the guest says nothing"
        return self._process.stderr.readline().decode()

    def close(self) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def stub(spec: str, *, incoming: bool = False, wait: bool = True) -> Iterator[Stub]:
    """A stub; afterwards it and its guest are gone whatever the test did."""
    control = Stub(spec, incoming=incoming, wait=wait)
    try:
        yield control
    finally:
        control.close()
        if control.guest_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(control.guest_pid, 15)
            assert ended_within(control.guest_pid)


def socket_of(control: Stub) -> str:
    """Where the orphaned guest says that it can be adopted."""
    line = control.line_of_guest()
    found = re.search(r"adopt it with --guest workload:socket=(\S+); end it with: kill \d+$", line)
    assert found, line
    return found[1]


@contextlib.asynccontextmanager
async def adopted(path: str) -> AsyncIterator[WorkloadGuest]:
    async with workload(f"socket={path}") as guest:
        yield guest


@contextlib.contextmanager
def peer(answers: Mapping[Kind, Kind | None], asked: threading.Event) -> Iterator[str]:
    """A destination that answers as told (None: never does); `asked` is set by the first TAKE."""
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, session = decode(await reader.readexactly(MESSAGE.size))
                if kind is Kind.TAKE:
                    asked.set()
                answer = answers.get(kind)
                if answer is not None:
                    writer.write(encode(answer, session))
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:

        async def stop() -> None:
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
