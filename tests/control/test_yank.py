"""`yank`: the migration ends, the guest does not; and who works for a migration."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

import engine
from tests.conformance.peers import peer
from tests.support import eventually

pytestmark = pytest.mark.process

GUEST = "workload:size=64M"
MIGRATION = [{"type": "migration"}]


async def begun(source: engine.Control, destination: engine.Control) -> engine.Migration:
    """A migration that would take long, once it has sent something."""
    migration = await source.migrate(destination, max_bandwidth=2_000_000)
    async for progress in migration.progress(0.02):
        if progress.transferred_bytes:
            return migration
    raise AssertionError("it ended")


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_yanked_migration_fails_and_the_guest_goes_on(side: str) -> None:
    async def scenario() -> tuple[Any, ...]:
        source = engine.Control.start(f"{GUEST},rate=5M,contents=random")
        destination = engine.Control.start(GUEST, "defer")
        async with source, destination:
            incoming = {"uri": "tcp:127.0.0.1:0", "exit-on-error": False}
            await destination.execute("migrate-incoming", **incoming)
            assert await source.execute("query-yank") == []
            assert await destination.execute("query-yank") == MIGRATION
            assert await destination.execute("yank", instances=MIGRATION) == {}  # waits as before
            migration = await begun(source, destination)
            assert await source.execute("query-yank") == MIGRATION
            workers = [
                await control.execute("query-migrationthreads") for control in (source, destination)
            ]
            yanked = source if side == "source" else destination
            assert await yanked.execute("yank", instances=MIGRATION) == {}
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            async with asyncio.timeout(60):
                while await destination.execute("query-yank"):
                    await asyncio.sleep(0.02)
            there = await destination.execute("query-migrate")
            idle = await source.execute("query-migrationthreads")
            running = (await source.execute("query-status"))["running"]
            judgement = await source.execute("x-judge")
            return workers, str(failed.value), there, idle, running, judgement

    workers, said, there, idle, running, judgement = asyncio.run(scenario())
    assert "'yank' has cut" in (said if side == "source" else there["error-desc"])
    assert there["status"] == "failed"
    assert running
    assert judgement["wrong-pages"] == 0
    names = [[worker["name"] for worker in one] for one in workers]
    assert names == [["multifdsend_0", "multifdsend_1"], ["multifdrecv_0", "multifdrecv_1"]]
    pids = [worker["thread-id"] for one in workers for worker in one]
    assert len(set(pids)) == 4
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    assert idle == []


def test_nothing_is_yanked_unless_all_can_be() -> None:
    async def scenario() -> None:
        source = engine.Control.start(f"{GUEST},rate=5M,contents=random")
        destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await begun(source, destination)
            instances = [*MIGRATION, {"type": "chardev", "id": "c"}]
            with pytest.raises(engine.UsageError, match=r"^Instance not found$"):
                await source.execute("yank", instances=instances)
            assert await source.execute("yank", instances=[]) == {}
            assert (await migration.statistics()).status.value == "active"
            await migration.cancel()
            with pytest.raises(engine.MigrationFailed):
                await migration.result()

    asyncio.run(scenario())


def test_a_yank_overtakes_what_waits() -> None:
    with peer("ramferry") as one:
        client = one.connect(oob=True)
        try:
            assert client.ask({"exec-oob": "query-yank"}) == {"return": []}
            request = {"exec-oob": "yank", "arguments": {"instances": MIGRATION}}
            assert client.ask(request)["error"]["class"] == "DeviceNotFound"
        finally:
            client.close()
