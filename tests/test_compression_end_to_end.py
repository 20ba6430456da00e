"""Whole migrations with codecs: fixed ones, `auto`, the old `compress`, changes on the way, and
destinations that lack one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

import engine
from engine.compress.codecs import CODECS

pytestmark = pytest.mark.process

GUEST: Final = "workload:size=32M"  #: its contents are mixed: text, pointers, noise, zeros
#: Several times as fast as `begin` lets it be sent: no round finds nothing dirty, and is the last.
WRITING: Final = f"{GUEST},rate=300M,pattern=random"
DOWNTIME_MAX_MS: Final = 30_000  #: long enough for all of RAM, on any machine
DEADLINE_S: Final = 60.0
any_codec = pytest.mark.parametrize("codec", CODECS)

#: A destination's control process whose build lacks lz4. The shebang's interpreter starts its
#: workers, which are whole.
LACKING = """#!{python}
import sys
from engine.compress import codecs
del codecs.CODEC_IDS["lz4"]
from engine.cli import main
sys.argv[1:3] = []
main()
"""


@asynccontextmanager
async def couple(*settings: str) -> AsyncIterator[tuple[engine.Control, engine.Control]]:
    source = engine.Control.start(WRITING, settings=settings)
    destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0")
    async with source, destination:
        yield source, destination


@asynccontextmanager
async def lacking_lz4(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[engine.Control, engine.Control]]:
    """A whole source, and a destination that does not know lz4."""
    script = directory / "lacking"
    script.write_text(LACKING.format(python=sys.executable))
    script.chmod(0o700)
    async with engine.Control.start(WRITING) as source:
        destination = engine.Control.start(GUEST, "defer")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(script))
            await destination.__aenter__()
        async with destination_of(destination):
            await destination.execute(
                "migrate-incoming", uri="tcp:127.0.0.1:0", exit_on_error=False
            )
            yield source, destination


@asynccontextmanager
async def destination_of(started: engine.Control) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await started.close()


async def begin(
    source: engine.Control, destination: engine.Control, **parameters: Any
) -> engine.Migration:
    """It does not end before `finish`: a limit of 0 waits for a guest that writes nothing."""
    limits = {"max_bandwidth": 20_000_000, "downtime_limit": 0}
    return await source.migrate(destination, **{**limits, **parameters})


async def finish(
    migration: engine.Migration, source: engine.Control, destination: engine.Control
) -> tuple[dict[str, Any], engine.Verdict]:
    await source.execute("migrate-set-parameters", downtime_limit=DOWNTIME_MAX_MS, max_bandwidth=0)
    result = await migration.result()
    return dict(result.raw), await engine.verify(source, destination)


async def batches(migration: engine.Migration) -> dict[str, int]:
    """How many batches got which codec, on all channels."""
    found: dict[str, int] = {}
    for channel in (await migration.statistics()).raw.get("x-compression", {}).get("channels", ()):
        for name, count in channel["batches"].items():
            found[name] = found.get(name, 0) + count
    return found


async def until_batches(migration: engine.Migration, codec: str, more: int = 4) -> None:
    """Wait until this codec got more batches than now."""
    begun = (await batches(migration)).get(codec, 0)
    async with asyncio.timeout(DEADLINE_S):
        while (await batches(migration)).get(codec, 0) < begun + more:
            await asyncio.sleep(0.01)


async def until_drained(
    migration: engine.Migration, bytes_per_s_min: float
) -> list[dict[str, Any]]:
    """All channels, once they are full, encode, and drain so much together: on a busy machine one
    has nothing to wait for, or sends less, for a moment."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            raw = (await migration.statistics()).raw
            found: list[dict[str, Any]] = raw["x-compression"]["channels"]
            known = [channel["auto"] for channel in found]
            are_full = all(one["channel-is-full"] and one["codec"] != "none" for one in known)
            if are_full and sum(one["drain-bytes-per-second"] for one in known) > bytes_per_s_min:
                return found
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("tracker", ["uffd-wp", "content-hash"])
@any_codec
def test_a_guest_that_writes_arrives_right_with_every_codec(codec: str, tracker: str) -> None:
    async def scenario() -> tuple[dict[str, Any], dict[str, int], engine.Verdict]:
        async with couple() as (source, destination):
            migration = await begin(
                source, destination, multifd_compression=codec, x_tracker=tracker
            )
            async for now in migration.progress(0.02):
                if now.rounds >= 3:
                    break
            raw, verdict = await finish(migration, source, destination)
            return raw, await batches(migration), verdict

    raw, counted, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    did = raw["x-compression"]
    assert set(counted) == {codec}
    assert 0 < did["encoded-bytes"] < 0.8 * did["plain-bytes"]
    assert did["plain-bytes"] <= did["tried-bytes"] < raw["ram"]["normal-bytes"]
    assert raw["ram"]["multifd-bytes"] < raw["ram"]["normal-bytes"]


def test_auto_arrives_right_and_says_what_it_chose() -> None:
    async def scenario() -> tuple[dict[str, int], list[dict[str, Any]], str, engine.Verdict]:
        async with couple() as (source, destination):
            migration = await begin(source, destination, multifd_compression="auto")
            async for now in migration.progress(0.02):
                if now.rounds >= 3:
                    break
            chosen = await batches(migration)
            channels = await until_drained(migration, 10e6)
            printed = await source.execute("human-monitor-command", command_line="info migrate")
            _, verdict = await finish(migration, source, destination)
            return chosen, channels, str(printed), verdict

    chosen, channels, printed, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    drained = [channel["auto"]["drain-bytes-per-second"] for channel in channels]
    assert 10e6 < sum(drained) < 80e6, "one budget: on a busy machine one channel gets more of it"
    for known in (channel["auto"] for channel in channels):
        assert 0 < known["drain-bytes-per-second"] < 40e6
        assert known["channel-is-full"]
        assert known["last-change"]["to"] == known["codec"] != "none"
        assert {one["codec"] for one in known["estimates"]} >= {"none", known["codec"]}
    assert "\nauto compression: " in printed
    assert sum(chosen.values()) > 10
    assert set(chosen) - {"none"}, "at 20 MB/s any codec pays"


def test_what_is_without_effect_says_so() -> None:
    """Content hashes need private copies: the migration is right, and neither delta nor elision is
    used."""

    async def scenario() -> tuple[dict[str, Any], engine.Verdict]:
        async with couple("xbzrle=on", "x-elide-unchanged=on") as (source, destination):
            migration = await begin(source, destination, x_tracker="content-hash")
            async for now in migration.progress(0.02):
                if now.rounds >= 3:
                    break
            return await finish(migration, source, destination)

    raw, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    assert raw["x-compression"]["without-effect"] == ["xbzrle", "x-elide-unchanged"]
    assert raw["xbzrle-cache"]["pages"] == raw["x-compression"]["elided-pages"] == 0


@pytest.mark.parametrize("level", [1, 5])
def test_the_old_compress_is_zlib_on_as_many_channels_as_threads(level: int) -> None:
    settings = ["compress=on", f"compress-level={level}", "compress-threads=3"]

    async def scenario() -> tuple[dict[str, Any], engine.Verdict]:
        async with couple(*settings) as (source, destination):
            migration = await begin(source, destination, multifd_compression="lz4")
            await until_batches(migration, "zlib")
            return await finish(migration, source, destination)

    raw, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    channels = raw["x-compression"]["channels"]
    assert [(one["codec"], one["level"]) for one in channels] == [("zlib", level)] * 3
    assert len(raw["x-channels"]) == 3
    assert all(set(one["batches"]) == {"zlib"} for one in channels)


def test_the_old_compress_has_as_many_channels_as_ever_until_threads_are_set() -> None:
    async def scenario() -> tuple[dict[str, Any], engine.Verdict]:
        async with couple("compress=on", "multifd-channels=4") as (source, destination):
            migration = await begin(source, destination)
            await until_batches(migration, "zlib")
            return await finish(migration, source, destination)

    raw, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    assert len(raw["x-channels"]) == 4


@pytest.mark.parametrize("tracker", ["uffd-wp", "content-hash"])
def test_a_codec_that_is_changed_on_the_way_is_used_from_the_next_batch(tracker: str) -> None:
    """Six changes, two of them only of a level; batches of each are counted."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("lz4", {"multifd_compression": "lz4"}),
        ("none", {"multifd_compression": "none"}),
        ("zlib", {"multifd_compression": "zlib", "multifd_zlib_level": 6}),
        ("zstd", {"multifd_compression": "zstd", "multifd_zstd_level": 3}),
        ("zstd", {"x_multifd_zstd_fast": 5}),
        ("lz4", {"multifd_compression": "lz4", "multifd_lz4_acceleration": 8}),
    ]

    async def scenario() -> tuple[list[tuple[str, int]], dict[str, int], engine.Verdict]:
        async with couple() as (source, destination):
            migration = await begin(
                source, destination, multifd_compression="zstd", x_tracker=tracker
            )
            await until_batches(migration, "zstd")
            seen = []
            for name, parameters in changes:
                await source.execute("migrate-set-parameters", **parameters)
                await until_batches(migration, name)
                channels = (await migration.statistics()).raw["x-compression"]["channels"]
                seen += [(one["codec"], one["level"]) for one in channels if one["codec"] == name]
            _, verdict = await finish(migration, source, destination)
            return seen, await batches(migration), verdict

    seen, counted, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    assert counted.keys() == {"none", *CODECS}
    assert {("lz4", 1), ("none", 0), ("zlib", 6), ("zstd", 3), ("zstd", -5), ("lz4", 8)} <= {*seen}


def test_a_change_in_every_moment_loses_no_page() -> None:
    """As fast as the monitor takes them, until the migration has ended."""
    names = ["lz4", "zstd", "auto", "zlib", "none"]

    async def scenario() -> tuple[int, engine.Verdict]:
        async with couple() as (source, destination):
            migration = await begin(source, destination)
            changes = 0
            async for now in migration.progress(0.0):
                name = names[changes % len(names)]
                await source.execute("migrate-set-parameters", multifd_compression=name)
                changes += 1
                if now.rounds >= 3 and changes >= 50:
                    await source.execute("migrate-set-parameters", downtime_limit=DOWNTIME_MAX_MS)
            await migration.result()
            return changes, await engine.verify(source, destination)

    changes, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    assert changes >= 50


@pytest.mark.parametrize("wanted", ["lz4", "auto"])
def test_a_destination_that_lacks_a_codec_says_so_before_a_byte_of_ram_moves(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits on, and takes what it knows; the guest runs where it was all the time."""

    async def scenario() -> tuple[engine.MigrationFailed, int, engine.Verdict]:
        async with lacking_lz4(tmp_path, monkeypatch) as (source, destination):
            migration = await source.migrate(destination, multifd_compression=wanted)
            with pytest.raises(engine.MigrationFailed) as failed:
                await migration.result()
            allocated = (await destination.query_guest())["blocks"][0]["allocated"]
            assert (await source.execute("query-status"))["running"]
            assert (await destination.execute("query-migrate"))["status"] == "setup"
            again = await source.migrate(
                destination, multifd_compression="zstd", downtime_limit=DOWNTIME_MAX_MS
            )
            await again.result()
            return failed.value, allocated, await engine.verify(source, destination)

    failed, allocated, verdict = asyncio.run(scenario())
    assert str(failed) == (
        "the destination refused: cannot decode lz4; this build knows zlib, zstd"
    )
    assert failed.statistics.raw.get("ram", {}).get("multifd-bytes", 0) == 0
    assert failed.statistics.normal_pages == 0
    assert allocated == 0
    assert verdict.is_right, verdict


def test_a_codec_that_the_destination_lacks_changes_nothing_when_it_is_set_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does `auto`, which may choose it; what the destination knows is used."""

    async def scenario() -> tuple[list[set[str]], str, engine.Verdict]:
        async with lacking_lz4(tmp_path, monkeypatch) as (source, destination):
            migration = await begin(source, destination)
            await until_batches(migration, "none")
            seen = []
            for wanted in ("lz4", "auto"):
                await source.execute("migrate-set-parameters", multifd_compression=wanted)
                await until_batches(migration, "none")
                seen.append(set(await batches(migration)))
            await source.execute("migrate-set-parameters", multifd_compression="zstd")
            await until_batches(migration, "zstd")
            await source.execute("migrate-set-parameters", multifd_compression="lz4")
            await until_batches(migration, "zstd")
            seen.append(set(await batches(migration)))
            _, verdict = await finish(migration, source, destination)
            return seen, source.stderr, verdict

    seen, stderr, verdict = asyncio.run(scenario())
    assert verdict.is_right, verdict
    assert seen == [{"none"}, {"none"}, {"none", "zstd"}]
    assert "the destination cannot decode lz4; the codec stays" in stderr
