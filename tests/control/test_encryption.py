"""A migration that shall be encrypted is never sent in the clear."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.control.status import Status

pytestmark = pytest.mark.process

GUEST = "workload:size=4M"
NOT_YET = "this build of ramferry encrypts no migration yet"
OBJECTS: tuple[dict[str, Any], ...] = (
    {"qom_type": "secret", "id": "some", "data": "x"},
    {"qom_type": "tls-creds-anon", "id": "anon"},
)
TEXTS = [
    ("nope", "No TLS credentials with id 'nope'"),
    ("some", "Object with id 'some' is not TLS credentials"),
    ("anon", NOT_YET),
]


async def failure(source: engine.Control, target: engine.Control | str) -> str:
    with pytest.raises(engine.MigrationFailed) as failed:
        await (await source.migrate(target)).result()
    assert (await source.execute("query-status"))["status"] == "running"
    return str(failed.value)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_neither_side_goes_without_what_it_was_told_to_use(side: str) -> None:
    async def scenario() -> None:
        source = engine.Control.start(f"{GUEST},rate=1M")
        destination = engine.Control.start(GUEST, "tcp:127.0.0.1:0")
        async with source, destination:
            one = source if side == "source" else destination
            for given in OBJECTS:
                await one.execute("object-add", **given)
            for identity, text in TEXTS:
                await one.execute("migrate-set-parameters", tls_creds=identity)
                assert text in await failure(source, destination)
                assert (await destination.execute("query-migrate"))["status"] == "setup"
            await one.execute("migrate-set-parameters", tls_creds="")
            result = await (await source.migrate(destination)).result()
            assert result.status is Status.COMPLETED

    asyncio.run(scenario())


def test_a_file_is_not_touched(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine.Control.start(f"{GUEST},rate=1M") as source:
            await source.execute("migrate-set-parameters", tls_creds="nope")
            assert "No TLS credentials" in await failure(source, f"file:{kept}")

    kept = tmp_path / "kept"
    kept.write_bytes(b"what was there")
    asyncio.run(scenario())

    assert kept.read_bytes() == b"what was there"


def test_a_stream_does_not_go_in_the_clear_either() -> None:
    async def scenario() -> None:
        async with engine.Control.start(f"{GUEST},rate=1M") as source:
            await source.execute("migrate-set-parameters", tls_creds="nope")
            assert "No TLS credentials" in await failure(source, "exec:cat >/dev/null")

    asyncio.run(scenario())
