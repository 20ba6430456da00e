"""The monitor of real processes: QEMU's sequences of events, and its refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import engine

pytestmark = pytest.mark.process

GUEST = "workload:size=16M"
WRITING = f"{GUEST},rate=5M,pattern=random"


def told(event: Any) -> Any:
    """An event in short: a status, `PASS n`, or its name."""
    match event["event"]:
        case "MIGRATION":
            return event["data"]["status"]
        case "MIGRATION_PASS":
            return event["data"]["pass"]
    return event["event"]


async def collect(control: engine.Control, is_last: Callable[[Any], bool]) -> list[Any]:
    """What a control process says until `is_last`."""
    seen: list[Any] = []
    with control.listen() as events:
        async with asyncio.timeout(60):
            async for event in events:
                seen.append(told(event))
                if is_last(seen[-1]):
                    return seen
    return seen


def test_a_live_migration_tells_qemus_sequence_on_both_sides() -> None:
    async def scenario() -> tuple[list[Any], list[Any], int]:
        source = engine.Control.start(WRITING)
        destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0")
        async with source, destination:
            both = [
                asyncio.ensure_future(collect(side, lambda last: last == "completed"))
                for side in (source, destination)
            ]
            await asyncio.sleep(0)
            migration = await source.migrate(destination, max_bandwidth=0)
            here, there = await asyncio.gather(*both)
            return here, there, (await migration.result()).rounds

    here, there, rounds = asyncio.run(scenario())
    passes = [one for one in here if isinstance(one, int)]
    assert [one for one in here if not isinstance(one, int)] == [
        "setup", "active", "STOP", "device", "completed",
    ]  # fmt: skip
    assert passes == list(range(1, rounds + 1))
    assert here.index("setup") < here.index(1) < here.index("active")
    assert here.index("device") < here.index(rounds) < here.index("completed")
    assert there[-3:] == ["active", "RESUME", "completed"]


def test_a_stopped_guest_is_neither_stopped_nor_resumed() -> None:
    async def scenario() -> tuple[list[Any], list[Any], Any]:
        source = engine.Control.start(WRITING)
        destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0")
        async with source, destination:
            await source.execute("stop")
            both = [
                asyncio.ensure_future(collect(side, lambda last: last == "completed"))
                for side in (source, destination)
            ]
            await asyncio.sleep(0)
            await source.migrate(destination, max_bandwidth=0)
            here, there = await asyncio.gather(*both)
            return here, there, await destination.execute("query-status")

    here, there, status = asyncio.run(scenario())
    assert "STOP" not in here
    assert "RESUME" not in there
    assert status == {"running": False, "status": "paused"}


def test_a_refused_connection_is_setup_and_failed() -> None:
    async def scenario() -> tuple[list[Any], Any]:
        async with engine.Control.start(WRITING) as source:
            seen = asyncio.ensure_future(collect(source, lambda last: last == "failed"))
            await asyncio.sleep(0)
            await source.migrate("tcp:127.0.0.1:1")
            return await seen, await source.execute("query-migrate")

    seen, info = asyncio.run(scenario())
    assert seen == ["setup", "failed"]
    assert info == {
        "status": "failed",
        "error-desc": "Failed to connect to '127.0.0.1:1': Connection refused",
    }


def test_a_cancel_tells_cancelling_and_cancelled_once_each() -> None:
    async def scenario() -> list[Any]:
        source = engine.Control.start(f"{WRITING},contents=random")
        destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0")
        async with source, destination:
            seen = asyncio.ensure_future(collect(source, lambda last: last == "cancelled"))
            await asyncio.sleep(0)
            migration = await source.migrate(destination, max_bandwidth=1_000_000)
            async for progress in migration.progress(0.02):
                if progress.transferred_bytes:
                    break
            await migration.cancel()
            return await seen

    assert asyncio.run(scenario()) == ["setup", 1, "active", "cancelling", "cancelled"]


def test_without_the_capability_only_stop_and_resume_are_told() -> None:
    async def scenario() -> list[Any]:
        async with engine.Control.start(WRITING) as source:
            await source.execute(
                "migrate-set-capabilities", capabilities=[{"capability": "events", "state": False}]
            )
            seen = asyncio.ensure_future(collect(source, lambda last: last == "RESUME"))
            await asyncio.sleep(0)
            with pytest.raises(engine.MigrationFailed):
                await (await source.migrate("tcp:127.0.0.1:1")).result()
            await source.execute("stop")
            await source.execute("cont")
            return await seen

    assert asyncio.run(scenario()) == ["STOP", "RESUME"]


async def refusal(control: engine.Control, command: str, **arguments: Any) -> str:
    with pytest.raises(engine.UsageError) as refused:
        await control.execute(command, **arguments)
    return str(refused.value)


def test_commands_at_the_wrong_time_are_refused_in_qemus_words() -> None:
    async def scenario() -> dict[str, str]:
        source = engine.Control.start(WRITING)
        destination = engine.Control.start(GUEST, "defer")
        async with source, destination:
            uri, target = "tcp:127.0.0.1:0", "tcp:127.0.0.1:9"
            said = {
                "incoming at a source": await refusal(source, "migrate-incoming", uri=uri),
                "migrate at a destination": await refusal(destination, "migrate", uri=target),
                "resume": await refusal(source, "migrate", uri=target, resume=True),
                "unknown": await refusal(source, "migrate", uri="foo:bar"),
                "nothing": await refusal(source, "migrate"),
                "nowhere": await refusal(source, "migrate", uri="tcp::4444"),
            }
            await destination.execute("migrate-incoming", uri=uri)
            said["incoming twice"] = await refusal(destination, "migrate-incoming", uri=uri)
            await (await source.migrate(destination, max_bandwidth=0)).result()
            said["after"] = await refusal(source, "migrate", uri=target)
            said["cont after"] = await refusal(source, "cont")
            assert await source.execute("migrate_cancel") == {}
            assert await source.execute("query-status") == {
                "running": False,
                "status": "postmigrate",
            }
            return said

    said = asyncio.run(scenario())
    assert said["incoming at a source"] == "'-incoming' was not specified on the command line"
    assert said["migrate at a destination"] == "Guest is waiting for an incoming migration"
    assert said["resume"] == "Cannot resume if there is no paused migration"
    assert said["unknown"] == "unknown migration protocol: foo:bar"
    assert said["nowhere"] == ("address ':4444' has no host to connect to; write tcp:HOST:PORT")
    assert said["nothing"] == "need either 'uri' or 'channels' argument"
    assert said["incoming twice"] == "The incoming migration has already been started"
    assert said["after"] == "Can't migrate the vm that was paused due to previous migration"
    assert "at the destination" in said["cont after"]


def test_query_migrate_shows_what_qemu_shows() -> None:
    members = {
        "transferred", "remaining", "total", "duplicate", "normal", "normal-bytes",
        "dirty-pages-rate", "mbps", "dirty-sync-count", "postcopy-requests", "page-size",
        "multifd-bytes", "pages-per-second", "precopy-bytes", "downtime-bytes", "postcopy-bytes",
        "dirty-sync-missed-zero-copy",
    }  # fmt: skip

    async def scenario() -> tuple[Any, Any]:
        source = engine.Control.start(WRITING)
        destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0")
        async with source, destination:
            before = await source.execute("query-migrate")
            await (await source.migrate(destination, max_bandwidth=0)).result()
            after = await source.execute("query-migrate")
            async with asyncio.timeout(60):  # its guest tells the source, and then its own control
                while await destination.execute("query-migrate") != {"status": "completed"}:
                    await asyncio.sleep(0.01)
            return before, after

    before, after = asyncio.run(scenario())
    assert before == {}
    assert set(after["ram"]) == members
    assert {name for name in after if not name.startswith("x-")} == {
        "status", "total-time", "setup-time", "downtime", "ram",
    }  # fmt: skip
    assert after["ram"]["remaining"] == 0
    assert after["ram"]["normal-bytes"] == after["ram"]["normal"] * 4096
    assert isinstance(after["ram"]["mbps"], float)
    assert type(after["downtime"]) is int
