"""kill -9 of a control process, and the next one on the same state directory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import engine
from engine.control.status import Status
from engine.errors import UsageError

pytestmark = pytest.mark.process

GUEST = "workload:size=32M,contents=random"
WRITING = f"{GUEST},rate=15M,pattern=random"
SLOW = {"max_bandwidth": 10_000_000, "downtime_limit": 1}
FAST = {"max_bandwidth": 0, "downtime_limit": 300}


async def until_active(source: engine.Control, migration: engine.Migration) -> None:
    async for statistics in migration.progress(0.02):
        if statistics.status is Status.ACTIVE and statistics.transferred_bytes > 4_000_000:
            return


async def killed(control: engine.Control) -> None:
    control.kill()
    await control.wait()


async def lives(control: engine.Control) -> None:
    before = (await control.query_guest())["writes"]
    async with asyncio.timeout(60):
        while (await control.query_guest())["writes"] <= before:
            await asyncio.sleep(0.02)


def test_a_guest_is_taken_over_as_it_is(tmp_path: Path) -> None:
    async def scenario() -> tuple[str, int, int]:
        async with engine.Control.start(WRITING, state_dir=tmp_path) as first:
            pid = (await first.query_guest())["pid"]
            await killed(first)
            async with engine.Control.start(WRITING, state_dir=tmp_path) as second:
                await lives(second)
                assert (await second.judge())["wrong-pages"] == 0
                return second.stderr, pid, (await second.query_guest())["pid"]

    said, before, after = asyncio.run(scenario())
    assert before == after
    assert "was killed; no migration was going on; its guest lives and is taken over" in said


def test_a_source_killed_in_precopy_migrates_again(tmp_path: Path) -> None:
    async def scenario() -> str:
        async with (
            engine.Control.start(WRITING, state_dir=tmp_path) as first,
            engine.Control.start(GUEST, "tcp:127.0.0.1:0") as lost,
        ):
            await until_active(first, await first.migrate(lost, **SLOW))
            await killed(first)
            async with (
                engine.Control.start(WRITING, state_dir=tmp_path) as second,
                engine.Control.start(GUEST, "tcp:127.0.0.1:0") as destination,
            ):
                await lives(second)
                await (await second.migrate(destination, **FAST)).result()
                assert (await engine.verify(second, destination)).is_right
                return second.stderr

    assert "as source it was in 'active'; its guest lives" in asyncio.run(scenario())


def test_a_destination_killed_before_the_guest_came_waits_anew(tmp_path: Path) -> None:
    async def scenario() -> str:
        async with (
            engine.Control.start(WRITING) as source,
            engine.Control.start(GUEST, "tcp:127.0.0.1:0", state_dir=tmp_path) as first,
        ):
            migration = await source.migrate(first, **SLOW)
            await until_active(source, migration)
            await killed(first)
            with pytest.raises(engine.MigrationFailed):
                await migration.result()
            await lives(source)
            async with engine.Control.start(GUEST, "tcp:127.0.0.1:0", state_dir=tmp_path) as second:
                assert (await second.query_guest())["blocks"][0]["allocated"] == 0
                await (await source.migrate(second, **FAST)).result()
                assert (await engine.verify(source, second)).is_right
                return second.stderr

    assert "as destination it was in 'active'; its guest has ended" in asyncio.run(scenario())


def test_a_guest_that_has_arrived_is_taken_over_and_waits_for_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            engine.Control.start(WRITING) as source,
            engine.Control.start(GUEST, "tcp:127.0.0.1:0", state_dir=tmp_path) as first,
        ):
            await (await source.migrate(first, max_bandwidth=0)).result()
            await lives(first)
            async with asyncio.timeout(60):  # until it is on record that the guest has arrived
                while (await first.execute("query-migrate"))["status"] != "completed":
                    await asyncio.sleep(0.02)
            await killed(first)
            async with engine.Control.start(GUEST, "tcp:127.0.0.1:0", state_dir=tmp_path) as second:
                await lives(second)
                assert (await second.execute("query-migrate")) == {}
                assert (await engine.verify(source, second)).is_right

    asyncio.run(scenario())


def test_a_guest_that_was_given_away_is_not_begun_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            engine.Control.start(WRITING, state_dir=tmp_path) as first,
            engine.Control.start(GUEST, "tcp:127.0.0.1:0") as destination,
        ):
            await (await first.migrate(destination, max_bandwidth=0)).result()
            await killed(first)
            with pytest.raises(UsageError, match="its guest runs at the destination"):
                async with engine.Control.start(WRITING, state_dir=tmp_path):
                    pytest.fail("it started")
            await lives(destination)

    asyncio.run(scenario())


def test_a_directory_belongs_to_one_living_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine.Control.start(GUEST, state_dir=tmp_path) as first:
            with pytest.raises(UsageError, match="belongs to another control process that lives"):
                async with engine.Control.start(GUEST, state_dir=tmp_path):
                    pytest.fail("it started")
            await lives(first)

    asyncio.run(scenario())


def test_after_an_orderly_end_there_is_nothing_to_be_found(tmp_path: Path) -> None:
    async def scenario() -> str:
        async with engine.Control.start(GUEST, state_dir=tmp_path):
            pass
        async with engine.Control.start(GUEST, state_dir=tmp_path) as second:
            return second.stderr

    assert "killed" not in asyncio.run(scenario())


def test_a_mistake_in_the_next_command_line_is_not_the_guests_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine.Control.start(WRITING, state_dir=tmp_path) as first:
            pid = (await first.query_guest())["pid"]
            await killed(first)
            for _ in range(2):
                with pytest.raises(UsageError, match="no parameter or capability 'bogus'"):
                    async with engine.Control.start(
                        WRITING, settings=["bogus=1"], state_dir=tmp_path
                    ):
                        pytest.fail("it started")
            async with engine.Control.start(WRITING, state_dir=tmp_path) as second:
                await lives(second)
                assert (await second.query_guest())["pid"] == pid
                assert (await second.judge())["wrong-pages"] == 0

    asyncio.run(scenario())


def test_an_unknown_outcome_is_not_forgotten_by_looking(tmp_path: Path) -> None:
    """A ram guest's process was killed with the token on its way: nobody runs it but its user."""
    ram, state = tmp_path / "ram", tmp_path / "state"
    ram.write_bytes(b"A" * 4096 * 256)
    guest = f"ram:size=1M,path={ram}"

    async def scenario() -> None:
        async with engine.Control.start(guest, state_dir=state) as first:
            await killed(first)
        with (state / "journal").open("ab") as journal:
            journal.write(b'{"record":"moved","side":"source","status":"device"}\n')
            journal.write(b'{"record":"promised","side":"source"}\n')
        for _ in range(3):
            async with engine.Control.start(guest, state_dir=state) as next_one:
                assert (await next_one.execute("query-status"))["status"] == "paused"
                assert (await next_one.execute("query-migrate"))["x-handover"] == "unknown"
                with pytest.raises(UsageError, match="nobody has said whether"):
                    await next_one.execute("migrate", uri="tcp:127.0.0.1:1")
                await killed(next_one)
        async with engine.Control.start(guest, state_dir=state) as last:
            await last.execute("cont")
            assert (await last.execute("query-status"))["status"] == "running"
            await killed(last)
        async with engine.Control.start(guest, state_dir=state) as after:
            assert (await after.execute("query-status"))["status"] == "running"

    asyncio.run(scenario())
    assert ram.read_bytes() == b"A" * 4096 * 256


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_ram_guest_stands_or_runs_as_its_user_left_it(tmp_path: Path, is_stopped: bool) -> None:
    spec = f"ram:size=1M,path={tmp_path}/ram"

    async def scenario() -> list[str]:
        states = []
        for life in range(3):
            async with engine.Control.start(spec, state_dir=tmp_path / "state") as one:
                states.append((await one.execute("query-status"))["status"])
                if not life:
                    await one.execute("stop")
                    if not is_stopped:
                        await one.execute("cont")
                one.kill()
                await one.wait()
        return states

    assert asyncio.run(scenario()) == ["running", *["paused" if is_stopped else "running"] * 2]
