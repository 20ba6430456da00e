"""Parameters of compression on a whole control process: set by either monitor, shown by both."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import pytest

import engine
from engine.control.parameter_table import HMP_ORDER
from engine.errors import UsageError

pytestmark = pytest.mark.process

GUEST: Final = "workload:size=1M"
DEFAULTS: Final = {
    "multifd-compression": "none",
    "multifd-zlib-level": 1,
    "multifd-zstd-level": 1,
    "multifd-lz4-acceleration": 1,
    "x-multifd-zstd-fast": 0,
    "x-compress-cpu-percent": 100,
}
OTHERS: Final[dict[str, Any]] = {
    "multifd-compression": "auto",
    "multifd-zlib-level": 9,
    "multifd-zstd-level": 20,
    "multifd-lz4-acceleration": 65535,
    "x-multifd-zstd-fast": 50,
    "x-compress-cpu-percent": 25,
}
#: QEMU's `info migrate_parameters` prints no levels, so neither does ours.
UNSEEN: Final = {"multifd-zlib-level", "multifd-zstd-level"}


async def said(control: engine.Control, line: str) -> str:
    return str(await control.execute("human-monitor-command", command_line=line))


async def both_show(control: engine.Control) -> tuple[dict[str, Any], dict[str, str]]:
    """What QMP answers, and what HMP prints."""
    answer = await control.execute("query-migrate-parameters")
    printed = (await said(control, "info migrate_parameters")).splitlines()
    lines = dict(line.split(": ", 1) for line in printed if ": " in line)
    return {name: answer[name] for name in DEFAULTS}, lines


def check(shown: dict[str, Any], printed: dict[str, str], values: dict[str, Any]) -> None:
    assert shown == values
    seen = {name: str(value) for name, value in values.items() if name not in UNSEEN}
    assert {name: printed[name] for name in seen} == seen
    assert not UNSEEN & printed.keys()


def test_what_one_monitor_sets_both_show() -> None:
    async def scenario() -> None:
        async with engine.Control.start(GUEST) as control:
            check(*await both_show(control), DEFAULTS)
            for name, value in OTHERS.items():
                assert await said(control, f"migrate_set_parameter {name} {value}") == ""
            check(*await both_show(control), OTHERS)
            await control.execute("migrate-set-parameters", **DEFAULTS)
            check(*await both_show(control), DEFAULTS)
            for codec in ("lz4", "zstd", "zlib", "none"):
                await said(control, f"migrate_set_parameter multifd-compression {codec}")
                shown, printed = await both_show(control)
                assert shown["multifd-compression"] == printed["multifd-compression"] == codec

    asyncio.run(scenario())


def test_ours_are_printed_after_qemus() -> None:
    async def scenario() -> list[str]:
        async with engine.Control.start(GUEST) as control:
            return (await said(control, "info migrate_parameters")).splitlines()

    names = [line.split(":")[0] for line in asyncio.run(scenario())]
    qemus = [name for name in HMP_ORDER if name in names]
    assert names[: len(qemus)] == qemus
    ours = {"multifd-lz4-acceleration", "x-multifd-zstd-fast", "x-compress-cpu-percent"}
    assert ours <= set(names[len(qemus) :])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("multifd-compression", "lz5", "does not accept value 'lz5'"),
        ("multifd-compression", "qatzip", "does not accept value 'qatzip'"),
        ("multifd-lz4-acceleration", 0, "expects a value between 1 and 65535"),
        ("multifd-lz4-acceleration", 65536, "expects uint16_t"),
        ("x-multifd-zstd-fast", 51, "expects a value between 0 and 50"),
        ("x-compress-cpu-percent", 0, "expects a value between 1 and 100"),
        ("x-compress-cpu-percent", 101, "expects a value between 1 and 100"),
    ],
)
def test_outside_of_the_values_both_monitors_refuse_and_nothing_changes(
    name: str, value: object, text: str
) -> None:
    async def scenario() -> tuple[str, str, dict[str, Any]]:
        async with engine.Control.start(GUEST) as control:
            with pytest.raises(UsageError) as refused:
                await control.execute("migrate-set-parameters", **{name: value})
            line = await said(control, f"migrate_set_parameter {name} {value}")
            shown, _ = await both_show(control)
            return str(refused.value), line, shown

    by_qmp, by_hmp, shown = asyncio.run(scenario())
    assert text in by_qmp
    assert by_hmp.startswith("Error: ")
    assert text in by_hmp
    assert shown == DEFAULTS


def test_what_a_migration_used_is_in_query_migrate_and_printed() -> None:
    async def scenario() -> tuple[dict[str, Any], str]:
        source = engine.Control.start("workload:size=8M")
        destination = engine.Control.start("workload:size=8M", "tcp:127.0.0.1:0")
        async with source, destination:
            migration = await source.migrate(
                destination, multifd_compression="lz4", multifd_lz4_acceleration=3
            )
            result = await migration.result()
            return dict(result.raw), await said(source, "info migrate -a")

    raw, printed = asyncio.run(scenario())
    channels = raw["x-compression"]["channels"]
    assert {(one["codec"], one["level"]) for one in channels} == {("lz4", 3)}
    assert "x-compression" in printed
    assert "lz4" in printed
