"""The rows of QEMU's own migration tests that need neither TLS, mapped-ram nor hardware, and do not
end in postcopy (those are in test_catalogue_postcopy.py).

Each is named after its path there. QEMU's guest adds one to a byte of every page; ours checks more:
a workload guest's pages carry index, generation and checksum over all their bytes, and the page
counters of both sides are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

import engine
from engine.control.status import Status
from engine.errors import UsageError

pytestmark = pytest.mark.process

GUEST: Final = "workload:size=32M,contents=random"
COMPRESSIBLE: Final = "workload:size=32M"
WRITES: Final = "rate=15M,pattern=sweep"
WRITING: Final = f"{GUEST},{WRITES}"
#: The catalogue's: it cannot converge, and it does at once.
SLOW: Final = {"max_bandwidth": 3_000_000, "downtime_limit": 1}
FAST: Final = {"max_bandwidth": 1_000_000_000, "downtime_limit": 30_000}
WAIT_S: Final = 60.0
UUIDS: Final = (
    "11111111-1111-1111-1111-111111111111",
    "22222222-2222-2222-2222-222222222222",
)


@contextlib.asynccontextmanager
async def couple(
    *capabilities: str,
    uri: str = "tcp:127.0.0.1:0",
    uuids: tuple[str, str] = ("", ""),
    guest: str = GUEST,
    writes: str = WRITES,
    **parameters: Any,
) -> AsyncIterator[tuple[engine.Control, engine.Control]]:
    """Both sides with `events`, the capabilities, and parameters that are read back."""
    source = engine.Control.start(f"{guest},{writes}", uuid=uuids[0])
    destination = engine.Control.start(guest, "defer", uuid=uuids[1])
    async with source, destination:
        wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
        for one in (source, destination):
            await one.execute("migrate-set-capabilities", capabilities=wanted)
            await set_and_read(one, parameters)
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        yield source, destination


async def set_and_read(control: engine.Control, parameters: dict[str, Any]) -> None:
    await control.execute("migrate-set-parameters", **parameters)
    values = await control.execute("query-migrate-parameters")
    for name, value in parameters.items():
        assert values[name.replace("_", "-")] == value


async def status_of(control: engine.Control) -> str:
    info = await control.execute("query-migrate")
    return str(info.get("status", "none"))


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await fact():
            await asyncio.sleep(0.02)


async def until_status(control: engine.Control, status: str) -> None:
    """:raise AssertionError: it ended otherwise."""

    async def has_it() -> bool:
        now = await status_of(control)
        assert now == status or now not in ("failed", "cancelled", "completed"), now
        return now == status

    await until(has_it)


async def until_marker(destination: engine.Control) -> None:
    """Data arrives at the destination while the source goes on writing."""

    async def has_data() -> bool:
        return bool((await destination.query_guest())["blocks"][0]["allocated"])

    await until(has_data)


async def check_success(source: engine.Control, destination: engine.Control) -> None:
    """Completed on both sides, every page right, the guest lives there and can be stopped."""
    await until_status(destination, "completed")
    assert await status_of(source) == "completed"
    assert (await source.execute("query-status"))["status"] == "postmigrate"
    await check_lives(destination)
    await destination.execute("stop")
    stood = (await destination.query_guest())["writes"]
    verdict = await engine.verify(source, destination)
    assert verdict.is_right
    assert (await destination.query_guest())["writes"] == stood


async def check_lives(control: engine.Control) -> None:
    before = (await control.query_guest())["writes"]

    async def writes() -> bool:
        return bool((await control.query_guest())["writes"] > before)

    await until(writes)


async def live(*capabilities: str, uri: str = "tcp:127.0.0.1:0", **parameters: Any) -> None:
    """Slow until data has arrived, then fast."""
    async with couple(*capabilities, uri=uri, **parameters) as (source, destination):
        await set_and_read(source, SLOW)
        migration = await source.migrate(destination)
        await until_marker(destination)
        await set_and_read(source, FAST)
        result = await migration.result()
        assert result.rounds >= 2
        await check_success(source, destination)


async def not_live(uri: str) -> None:
    async with couple(uri=uri) as (source, destination):
        await source.execute("stop")
        await (await source.migrate(destination)).result()
        await until_status(destination, "completed")
        await destination.execute("cont")
        await check_success(source, destination)


def test_migration_precopy_unix_plain() -> None:
    async def scenario() -> None:
        async with engine.Control.start(GUEST) as somebody:  # its directory has a short name
            await live(uri=f"unix:{somebody.qmp_path}-m")

    asyncio.run(scenario())


def test_migration_precopy_unix_xbzrle() -> None:
    """Deltas were sent, and counted as QEMU counts them."""

    async def scenario() -> None:
        async with (
            engine.Control.start(GUEST) as somebody,
            couple(
                "xbzrle",
                uri=f"unix:{somebody.qmp_path}-m",
                guest="workload:size=8M,contents=random",
                xbzrle_cache_size=32 * 1024 * 1024,
            ) as (source, destination),
        ):
            await set_and_read(source, SLOW)
            migration = await source.migrate(destination)
            await until_marker(destination)
            await set_and_read(source, {"max-bandwidth": 10_000_000})  # less than it writes

            async def has_deltas() -> bool:
                info = await source.execute("query-migrate")
                cache = info["xbzrle-cache"]
                assert cache["cache-size"] == 32 * 1024 * 1024
                return bool(cache["pages"] and cache["bytes"])  # one may have been unchanged

            await until(has_deltas)
            await set_and_read(source, FAST)
            await migration.result()
            await check_success(source, destination)

    asyncio.run(scenario())


# -- one descriptor ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def strangers() -> AsyncIterator[tuple[engine.Control, engine.Control]]:
    """A source and a destination that was told nothing yet."""
    source, destination = engine.Control.start(WRITING), engine.Control.start(GUEST, "defer")
    async with source, destination:
        yield source, destination


def test_migration_precopy_fd_tcp() -> None:
    """A socket pair, handed over with getfd; `migrate` takes the descriptor with its name."""

    async def scenario() -> None:
        async with strangers() as (source, destination):
            ends = socket.socketpair()
            for one, end in zip((source, destination), ends, strict=True):
                await one.give("fd-mig", end.fileno())
                end.close()
            await destination.execute("migrate-incoming", uri="fd:fd-mig")
            await set_and_read(source, SLOW)
            migration = await source.migrate("fd:fd-mig")
            await until_marker(destination)
            await set_and_read(source, FAST)
            await migration.result()
            await check_success(source, destination)
            for one in (source, destination):
                with pytest.raises(UsageError, match="File descriptor named 'fd-mig' not found"):
                    await one.execute("closefd", fdname="fd-mig")

    asyncio.run(scenario())


def test_migration_precopy_fd_file(tmp_path: Path) -> None:
    file = tmp_path / "migfile"

    async def scenario() -> None:
        async with strangers() as (source, destination):
            for one, mode in ((source, "wb"), (destination, "rb")):
                with file.open(mode) as opened:
                    await one.give("fd-mig", opened.fileno())
            await (await source.migrate("fd:fd-mig")).result()
            await destination.execute("migrate-incoming", uri="fd:fd-mig")
            await check_success(source, destination)
            assert "fd: migration to a file is deprecated. Use file: instead." in source.stderr

    asyncio.run(scenario())


async def through_file(
    file: Path, *, uri: str, offset: int = 0, stopped: bool = False, fdset: bool = False
) -> None:
    """To the file and from it; what is before the offset stays."""
    file.write_bytes(b"X" * offset)
    async with strangers() as (source, destination):
        if stopped:
            await source.execute("stop")
        for one, flags in ((source, os.O_WRONLY), (destination, os.O_RDONLY)):
            if fdset:
                fd = os.open(file, flags)
                one._client.send_fd_scm(fd)
                await one.execute("add-fd", fdset_id=1)
                os.close(fd)
        await (await source.migrate(uri)).result()
        await destination.execute("migrate-incoming", uri=uri)
        if stopped:
            await until_status(destination, "completed")
            await destination.execute("cont")
        await check_success(source, destination)
        assert file.read_bytes()[:offset] == b"X" * offset


def test_migration_precopy_file(tmp_path: Path) -> None:
    file = tmp_path / "migfile"
    asyncio.run(through_file(file, uri=f"file:{file}", stopped=True))


def test_migration_precopy_file_offset(tmp_path: Path) -> None:
    file = tmp_path / "migfile"
    asyncio.run(through_file(file, uri=f"file:{file},offset=0x1000", offset=4096))


def test_migration_precopy_file_offset_fdset(tmp_path: Path) -> None:
    uri = "file:/dev/fdset/1,offset=0x1000"
    asyncio.run(through_file(tmp_path / "migfile", uri=uri, offset=4096, fdset=True))


def test_migration_precopy_file_offset_bad(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine.Control.start(GUEST) as source:
            with pytest.raises(UsageError, match="file URI has bad offset 0x20M: Invalid argument"):
                await source.migrate(f"file:{tmp_path}/migfile,offset=0x20M")
            assert await status_of(source) == "none"

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_migration_precopy_tcp_plain() -> None:
    asyncio.run(not_live("tcp:127.0.0.1:0"))


def test_migration_precopy_tcp_plain_switchover_ack() -> None:
    asyncio.run(live("return-path", "switchover-ack"))


@pytest.mark.parametrize("uri", ["rdma:127.0.0.1:29200", "rdma:[::1]:29200"], ids=["plain", "ipv6"])
def test_migration_precopy_rdma(uri: str) -> None:
    """QEMU has these rows where it was built with the library and finds a device."""

    async def scenario() -> None:
        async with strangers() as (source, destination):
            for one, command in ((source, "migrate"), (destination, "migrate-incoming")):
                with pytest.raises(UsageError, match="no RDMA channel in this build") as refused:
                    await one.execute(command, uri=uri)
                assert "\n" not in str(refused.value)
                assert await status_of(one) == "none"
            await check_lives(source)

    asyncio.run(scenario())


def test_migration_dirty_ring() -> None:
    """QEMU's guest says by KVM's ring what it wrote; ours by its own bitmap."""
    asyncio.run(live(x_tracker="guest-bitmap"))


def test_migration_multifd_tcp_uri_plain_none() -> None:
    asyncio.run(live("multifd", multifd_channels=4))


def test_migration_multifd_tcp_channels_plain_none() -> None:
    async def scenario() -> None:
        async with couple("multifd", multifd_channels=4) as (source, destination):
            host, port = (await destination.address()).split(":")[1:]
            addr = {"transport": "socket", "type": "inet", "host": host, "port": port}
            await source.execute("migrate", channels=[{"channel-type": "main", "addr": addr}])
            await until_status(source, "completed")
            await check_success(source, destination)

    asyncio.run(scenario())


@pytest.mark.parametrize("detection", ["legacy", "none"])
def test_migration_multifd_tcp_plain_zero_page(detection: str) -> None:
    asyncio.run(live("multifd", multifd_channels=4, zero_page_detection=detection))


def test_migration_multifd_tcp_plain_cancel() -> None:
    asyncio.run(cancelled("multifd=on", "multifd-channels=16"))


async def cancelled(*settings: str) -> None:
    """Cancelled on its way; the same source then goes to another destination."""
    async with engine.Control.start(WRITING, settings=settings) as source:
        async with engine.Control.start(GUEST, "tcp:127.0.0.1:0", settings) as exits:
            migration = await source.migrate(exits, **SLOW)
            await until_marker(exits)
            await migration.cancel()
            with pytest.raises(engine.MigrationFailed) as ended:
                await migration.result()
            assert ended.value.statistics.status is Status.CANCELLED
            assert await exits.wait() == 1
        await check_lives(source)
        async with engine.Control.start(GUEST, "tcp:127.0.0.1:0", settings) as second:
            await (await source.migrate(second, **FAST)).result()
            await check_success(source, second)


def test_migration_multifd_tcp_plain_zlib() -> None:
    asyncio.run(encoded("zlib", multifd_zlib_level=2))


def test_migration_multifd_tcp_plain_zstd() -> None:
    asyncio.run(encoded("zstd", multifd_zstd_level=2))


@pytest.mark.parametrize("codec", ["lz4", "auto"])
def test_migration_multifd_tcp_plain_with_what_qemu_lacks(codec: str) -> None:
    asyncio.run(encoded(codec))


async def encoded(codec: str, *capabilities: str, **parameters: Any) -> None:
    """`live`, with what the codec did."""
    wanted = {"multifd_channels": 4, "multifd_compression": codec, **parameters}
    async with couple("multifd", *capabilities, guest=COMPRESSIBLE, **wanted) as (
        source,
        destination,
    ):
        await set_and_read(source, SLOW)
        migration = await source.migrate(destination)
        await until_marker(destination)
        await set_and_read(source, FAST)
        did = (await migration.result()).raw["x-compression"]
        assert 0 < did["encoded-bytes"] < did["plain-bytes"]
        assert len(did["channels"]) == 4
        used = {name for channel in did["channels"] for name in channel["batches"]}
        assert codec in used or codec == "auto"
        await check_success(source, destination)


@pytest.mark.parametrize("codec", ["qatzip", "qpl", "uadk"])
def test_migration_multifd_tcp_plain_hardware(codec: str) -> None:
    """QEMU has these rows where it was built with the library; else it says what ours says."""

    async def scenario() -> None:
        async with engine.Control.start(GUEST) as source:
            text = f"Parameter 'multifd-compression' does not accept value '{codec}'"
            with pytest.raises(UsageError, match=text):
                await source.execute("migrate-set-parameters", multifd_compression=codec)

    asyncio.run(scenario())


def test_migration_auto_converge() -> None:
    throttle = {"cpu_throttle_initial": 5, "cpu_throttle_increment": 25, "max_cpu_throttle": 95}

    async def scenario() -> None:
        async with couple("auto-converge", "pause-before-switchover") as (source, destination):
            await set_and_read(source, throttle | SLOW)
            with source.listen() as events:
                migration = await source.migrate(destination)
                assert await first_throttle(source) >= 5
                rounds = (await migration.statistics()).rounds
                await until(lambda: has_rounds(migration, rounds + 1))
                await set_and_read(source, FAST)
                names = []
                async for event in events:
                    names.append(event.get("data", {}).get("status", event["event"]))
                    if names[-1] == "pre-switchover":
                        break
            assert names[-2:] == ["STOP", "pre-switchover"]
            assert (await source.execute("query-status"))["status"] == "finish-migrate"
            info = await source.execute("query-migrate")
            assert info.get("cpu-throttle-percentage", 0) <= 95
            await source.execute("migrate-continue", state="pre-switchover")
            await migration.result()
            await check_success(source, destination)

    async def first_throttle(source: engine.Control) -> int:
        percents: list[int] = []

        async def is_throttled() -> bool:
            info = await source.execute("query-migrate")
            percents.append(info.get("cpu-throttle-percentage", 0))
            assert (await source.execute("query-status"))["running"]
            return bool(percents[-1])

        await until(is_throttled)
        return percents[-1]

    async def has_rounds(migration: engine.Migration, wanted: int) -> bool:
        return (await migration.statistics()).rounds >= wanted

    asyncio.run(scenario())


def test_dirty_limit() -> None:
    """Limited when it does not converge, free again after a cancel, and limited the next time."""
    settings = {"vcpu_dirty_limit": 2, "throttle_trigger_threshold": 50}

    async def scenario() -> None:
        async with couple("dirty-limit", "pause-before-switchover") as (source, first):
            await set_and_read(source, settings | SLOW)
            await source.migrate(first)
            await until(lambda: is_limited(source))
            with pytest.raises(UsageError, match="while migration is running"):
                await source.execute("set-vcpu-dirty-limit", dirty_rate=1)
            await source.execute("migrate_cancel")
            await until(lambda: is_free(source))
            async with engine.Control.start(GUEST, "tcp:127.0.0.1:0") as second:
                migration = await source.migrate(second)
                await until(lambda: is_limited(source))
                await set_and_read(source, FAST)
                await until_status(source, "pre-switchover")
                await source.execute("migrate-continue", state="pre-switchover")
                await migration.result()
                await check_success(source, second)

    async def is_limited(source: engine.Control) -> bool:
        info = await source.execute("query-migrate")
        if not info.get("dirty-limit-throttle-time-per-round"):
            return False
        limits = await source.execute("query-vcpu-dirty-limit")
        assert [limit["limit-rate"] for limit in limits] == [2]
        return True

    async def is_free(source: engine.Control) -> bool:
        if await status_of(source) != "cancelled":
            return False
        info = await source.execute("query-migrate")
        assert "dirty-limit-throttle-time-per-round" not in info
        return not await source.execute("query-vcpu-dirty-limit")

    asyncio.run(scenario())


def test_vcpu_dirty_limit() -> None:
    """Measured by the ring, limited, and free again; MB/s with QEMU's own tolerance."""
    limit = 10

    async def scenario() -> None:
        async with engine.Control.start("workload:size=64M,rate=40M,pattern=sweep") as source:
            await until(lambda: is_free(source))
            await source.execute("set-vcpu-dirty-limit", dirty_rate=limit)
            limits = await source.execute("query-vcpu-dirty-limit")
            assert [one["limit-rate"] for one in limits] == [limit]
            assert 0 < await measured(source, 3) < limit * 1.5
            await source.execute("cancel-vcpu-dirty-limit")
            assert await source.execute("query-vcpu-dirty-limit") == []
            await until(lambda: is_free(source))

    async def is_free(source: engine.Control) -> bool:
        return await measured(source, 1) > limit * 1.5

    async def measured(source: engine.Control, calc_time: int) -> int:
        await source.execute("calc-dirty-rate", calc_time=calc_time, mode="dirty-ring")
        info: dict[str, Any] = {}

        async def is_measured() -> bool:
            info.update(await source.execute("query-dirty-rate"))
            return bool(info["status"] == "measured")

        await until(is_measured)
        return int(info["dirty-rate"])

    asyncio.run(scenario())


# -- cancel --------------------------------------------------------------------------------------


def test_migration_cancel_src_after_none() -> None:
    async def scenario() -> None:
        async with couple() as (source, destination):
            for one in (source, destination):
                await one.execute("migrate_cancel")
            await set_and_read(source, FAST)
            await (await source.migrate(destination)).result()
            await check_success(source, destination)

    asyncio.run(scenario())


@pytest.mark.parametrize("phase", ["setup", "active", "pre-switchover", "cancelling", "cancelled"])
def test_migration_cancel_src_after(phase: str) -> None:
    """The word comes in that status; after `cancelling` and `cancelled` it is the second word."""

    async def scenario() -> None:
        async with couple("multifd", "pause-before-switchover") as (source, destination):
            if phase != "pre-switchover":
                await set_and_read(source, SLOW)
            with source.listen() as events:
                await source.migrate(destination)
                if phase in ("cancelling", "cancelled"):
                    await source.execute("migrate_cancel")
                statuses = []
                async for event in events:
                    if event["event"] != "MIGRATION":
                        continue
                    statuses.append(event["data"]["status"])
                    if statuses[-1] == phase:
                        await source.execute("migrate_cancel")
                    if statuses[-1] == "cancelled":
                        break
            assert statuses[-2:] == ["cancelling", "cancelled"]
            assert statuses.count("cancelling") == 1
            assert await status_of(source) == "cancelled"
            await until(lambda: has_failed(destination))
            await check_lives(source)

    async def has_failed(destination: engine.Control) -> bool:
        status = await status_of(destination)
        if phase in ("active", "pre-switchover"):
            return status == "failed"
        return status in ("failed", "setup")  # it may not have heard of anybody yet

    asyncio.run(scenario())


def test_migration_cancel_src_after_completed() -> None:
    async def scenario() -> None:
        async with couple() as (source, destination):
            await (await source.migrate(destination, **FAST)).result()
            await source.execute("migrate_cancel")
            await check_success(source, destination)

    asyncio.run(scenario())


def test_migration_cancel_src_after_failed() -> None:
    async def scenario() -> None:
        async with engine.Control.start(WRITING) as source:
            with pytest.raises(engine.MigrationFailed):
                await (await source.migrate("tcp:127.0.0.1:1")).result()
            await source.execute("migrate_cancel")
            assert await status_of(source) == "failed"

    asyncio.run(scenario())


def test_a_stop_in_pre_switchover_holds_at_the_destination() -> None:
    async def scenario() -> None:
        async with couple("pause-before-switchover") as (source, destination):
            migration = await source.migrate(destination, **FAST)
            await until_status(source, "pre-switchover")
            await source.execute("stop")
            await source.execute("migrate-continue", state="pre-switchover")
            await migration.result()
            await until_status(destination, "completed")
            assert (await destination.execute("query-status"))["status"] == "paused"
            await destination.execute("cont")
            await check_success(source, destination)

    asyncio.run(scenario())


# -- validation ----------------------------------------------------------------------------------


def test_migration_bad_dest() -> None:
    async def scenario() -> None:
        async with engine.Control.start(WRITING) as source:
            with source.listen() as events:
                migration = await source.migrate("tcp:127.0.0.1:1")
                statuses = []
                async for event in events:
                    statuses.append(event["data"]["status"])
                    if statuses[-1] == "failed":
                        break
            with pytest.raises(engine.MigrationFailed):
                await migration.result()
            assert statuses == ["setup", "failed"]
            assert (await source.execute("query-status"))["status"] == "running"
            await check_lives(source)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "uuids", [(UUIDS[0], UUIDS[0]), ("", UUIDS[0]), (UUIDS[0], "")],
    ids=["validate_uuid", "validate_uuid_src_not_set", "validate_uuid_dst_not_set"],
)  # fmt: skip
def test_migration_validate_uuid(uuids: tuple[str, str]) -> None:
    async def scenario() -> None:
        async with couple("validate-uuid", uuids=uuids) as (source, destination):
            await (await source.migrate(destination, downtime_limit=1_000_000)).result()
            await check_success(source, destination)

    asyncio.run(scenario())


def test_migration_validate_uuid_error() -> None:
    """The destination says no, and waits on for the right one; QEMU's ends."""

    async def scenario() -> str:
        async with couple("validate-uuid", uuids=UUIDS) as (source, destination):
            with pytest.raises(engine.MigrationFailed) as failed:
                await (await source.migrate(destination)).result()
            await check_lives(source)
            assert await status_of(destination) == "setup"
            return str(failed.value)

    assert f"UUID received is {UUIDS[0]} and local is {UUIDS[1]}" in asyncio.run(scenario())


@pytest.mark.parametrize("given", ["both_set", "none_set"])
def test_migration_validate_uri_channels(given: str) -> None:
    addr = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "1"}
    both = {"uri": "tcp:127.0.0.1:1", "channels": [{"channel-type": "main", "addr": addr}]}

    async def scenario() -> None:
        async with engine.Control.start(GUEST) as source:
            with pytest.raises(UsageError, match="need either 'uri' or 'channels' argument"):
                await source.execute("migrate", **(both if given == "both_set" else {}))

    asyncio.run(scenario())
