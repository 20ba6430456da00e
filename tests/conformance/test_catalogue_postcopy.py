"""The postcopy rows of QEMU's own migration tests, but for TLS and a suspended guest.

As in test_catalogue.py: named after their paths, and every page is checked. QEMU's recovery goes
over descriptors (`fd:`), ours over addresses: what its closed and its silent socket pair do, an
address without a listener and one that never answers do here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

import engine
from tests.conformance.peers import Client
from tests.conformance.test_catalogue import (
    COMPRESSIBLE,
    cancelled,
    check_success,
    couple,
    encoded,
    set_and_read,
    until_marker,
    until_status,
)
from tests.kernel import has_userfaultfd
from tests.survival.proxy import LISTEN, TARGET, proxy

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here"),
]

POSTCOPY: Final = ("postcopy-ram", "postcopy-blocktime")
PREEMPT: Final = (*POSTCOPY, "postcopy-preempt")
#: It does not converge, and in postcopy it needs longer than a test to touch every page.
WRITES: Final = "rate=1M,pattern=random"
SLOW: Final = {"max_bandwidth": 500_000, "downtime_limit": 1}
#: The catalogue's: nothing but what the guest waits for moves.
TRICKLE: Final = {"max_postcopy_bandwidth": 4096}
NOBODY: Final = "tcp:127.0.0.1:1"
WAIT_S: Final = 60.0


class Run:
    """Two sides in postcopy, and what the source told."""

    def __init__(self, source: engine.Control, destination: engine.Control) -> None:
        self.source, self.destination = source, destination
        self.told: dict[engine.Control, list[str]] = {source: [], destination: []}

    async def hear(self, one: engine.Control, events: AsyncIterator[dict[str, Any]]) -> None:
        async for event in events:
            self.told[one].append(event.get("data", {}).get("status", event["event"]))

    async def heard(self, one: engine.Control, name: str, times: int = 1) -> list[str]:
        """What one has told, once it has told that so often."""
        async with asyncio.timeout(WAIT_S):
            while self.told[one].count(name) < times:
                await asyncio.sleep(0.01)
        return self.told[one]

    async def recover(self) -> None:
        """Out of band at the destination, over a unix path; then at the source."""
        uri = f"unix:{self.destination.qmp_path}-r"
        with contextlib.closing(Client(Path(self.destination.qmp_path), oob=True)) as client:
            request = {"exec-oob": "migrate-recover", "arguments": {"uri": uri}}
            assert client.ask(request) == {"return": {}}
        await self.source.execute("migrate", uri=uri, resume=True)

    async def finish(self) -> None:
        await set_and_read(self.source, {"max_postcopy_bandwidth": 0})
        await until_status(self.source, "completed")
        assert "STOP" in await self.heard(self.source, "completed")
        assert "RESUME" in await self.heard(self.destination, "completed")
        info = await self.destination.execute("query-migrate")
        assert len(info["postcopy-vcpu-blocktime"]) == 1
        assert info["postcopy-blocktime"] >= 0
        await check_success(self.source, self.destination)


@contextlib.asynccontextmanager
async def in_postcopy(*capabilities: str, **parameters: Any) -> AsyncIterator[Run]:
    """The guest runs at the destination; the source goes on as `parameters` let it."""
    async with couple(*capabilities, guest=COMPRESSIBLE, writes=WRITES) as (source, destination):
        run = Run(source, destination)
        with source.listen() as told, destination.listen() as told_there:
            hearing = [
                asyncio.create_task(run.hear(source, told)),
                asyncio.create_task(run.hear(destination, told_there)),
            ]
            try:
                await set_and_read(source, SLOW | parameters)
                host, port = (await destination.address()).split(":")[1:]
                addr = {"transport": "socket", "type": "inet", "host": host, "port": port}
                await source.execute("migrate", channels=[{"channel-type": "main", "addr": addr}])
                await until_marker(destination)
                await source.execute("migrate-start-postcopy")
                await until_status(source, "postcopy-active")
                await until_status(destination, "postcopy-active")
                yield run
            finally:
                for task in hearing:
                    task.cancel()
                await asyncio.gather(*hearing, return_exceptions=True)


async def plain(*capabilities: str) -> None:
    async with in_postcopy(*capabilities) as run:
        await run.finish()


def test_migration_postcopy_plain() -> None:
    asyncio.run(plain(*POSTCOPY))


def test_migration_postcopy_preempt_plain() -> None:
    asyncio.run(plain(*PREEMPT))


def test_migration_multifd_postcopy_plain() -> None:
    asyncio.run(plain(*POSTCOPY, "multifd"))


def test_migration_multifd_postcopy_preempt_plain() -> None:
    asyncio.run(plain(*PREEMPT, "multifd"))


def test_migration_multifd_postcopy_tcp_plain_cancel() -> None:
    asyncio.run(cancelled("multifd=on", "multifd-channels=16", "postcopy-ram=on"))


def test_migration_multifd_postcopy_tcp_plain_zstd() -> None:
    """It completes in precopy."""
    asyncio.run(encoded("zstd", "postcopy-ram", multifd_zstd_level=2))


# -- recovery ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def paused(*capabilities: str) -> AsyncIterator[Run]:
    async with in_postcopy(*capabilities, **TRICKLE) as run:
        await run.source.execute("migrate-pause")
        await until_status(run.source, "postcopy-paused")
        await until_status(run.destination, "postcopy-paused")
        yield run


async def recovery(*capabilities: str) -> None:
    async with paused(*capabilities) as run:
        await run.recover()
        await run.finish()


def test_migration_postcopy_recovery_plain() -> None:
    asyncio.run(recovery(*POSTCOPY))


def test_migration_postcopy_preempt_recovery_plain() -> None:
    asyncio.run(recovery(*PREEMPT))


async def touch(destination: engine.Control) -> None:
    """Somebody who is not the source says what QEMU's test says, and goes."""
    await destination.recover()
    _, host, port = (await destination.address()).split(":")
    with socket.create_connection((host, int(port)), WAIT_S) as stranger:
        stranger.sendall(b"\x08")
        stranger.shutdown(socket.SHUT_WR)
        await asyncio.to_thread(stranger.recv, 65536)  # it was listened to
    info = await destination.execute("query-migrate")
    assert info["status"] == "postcopy-paused"


def test_migration_postcopy_recovery_double_failures_reconnect() -> None:
    """The first recovery reaches nobody, and a stranger reaches the destination."""

    async def scenario() -> None:
        async with paused(*POSTCOPY) as run:
            await run.source.execute("migrate", uri=NOBODY, resume=True)
            told = await run.heard(run.source, "postcopy-paused", 2)
            assert told[-2:] == ["postcopy-recover-setup", "postcopy-paused"]
            assert "postcopy-recover" not in told
            await touch(run.destination)
            await run.recover()
            await run.finish()

    asyncio.run(scenario())


def test_migration_postcopy_recovery_double_failures_handshake() -> None:
    """The first recovery is never answered, the second answer is lost; both sides are paused by
    hand again."""

    async def scenario() -> None:
        async with paused(*POSTCOPY) as run:
            with socket.create_server(("127.0.0.1", 0)) as mute:
                uri = f"tcp:127.0.0.1:{mute.getsockname()[1]}"
                await run.source.execute("migrate", uri=uri, resume=True)
                told = await run.heard(run.source, "postcopy-recover")
                assert told[-2:] == ["postcopy-recover-setup", "postcopy-recover"]
                await run.source.execute("migrate-pause")
                await run.heard(run.source, "postcopy-paused", 2)
            await half_a_recovery(run)
            await run.recover()
            await run.finish()

    asyncio.run(scenario())


Ask = Callable[[str, dict[str, Any]], Awaitable[object]]


async def half_a_recovery(run: Run, ask: Ask | None = None) -> None:
    """The destination has answered, the source has not heard it; then the former is paused."""

    async def in_band(command: str, arguments: dict[str, Any]) -> object:
        return await run.destination.execute(command, **arguments)

    ask = ask or in_band
    async with proxy([0]) as (between, port):
        await ask("migrate-recover", {"uri": f"tcp:{TARGET}:{port}"})
        hold = between.hold(port, b"Resumed")
        pauses = run.told[run.source].count("postcopy-paused")
        await run.source.execute("migrate", uri=f"tcp:{LISTEN}:{port}", resume=True)
        async with asyncio.timeout(WAIT_S):
            await hold.reached.wait()
        await until_status(run.destination, "postcopy-recover")
        with pytest.raises(engine.UsageError, match="only be run when postcopy is paused"):
            await run.destination.recover()
        await ask("migrate-pause", {})
        await until_status(run.destination, "postcopy-paused")
        hold.released.set()
        await run.heard(run.source, "postcopy-paused", pauses + 1)


# -- out of band -----------------------------------------------------------------------------------


def test_pause_and_recovery_overtake_a_command_that_waits_for_pages() -> None:
    """A guest that waits for a page is not stopped within 3 s."""

    async def scenario() -> None:
        async with paused(*POSTCOPY) as run:
            path = Path(run.destination.qmp_path)
            with contextlib.closing(Client(path, oob=True)) as client:

                async def overtake(command: str, arguments: dict[str, Any]) -> object:
                    client.send({"execute": "stop", "id": "stop"})
                    client.send({"execute": "query-version", "id": "later"})
                    request = {"exec-oob": command, "arguments": arguments, "id": command}
                    assert client.ask(request) == {"return": {}, "id": command}
                    stop = client.answer()
                    assert stop["id"] == "stop"
                    assert "a vCPU still waits for a missing page" in stop["error"]["desc"]
                    assert client.answer()["id"] == "later"
                    return {}

                await half_a_recovery(run, overtake)
            await run.recover()
            await run.finish()

    asyncio.run(scenario())
