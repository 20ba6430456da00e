"""What must keep a guest from being migrated."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import engine
from engine.control.blockers import BLOCKERS_MAX, REASON_CHARACTERS_MAX, Blockers
from engine.errors import UsageError
from tests.conformance.peers import peer


def test_the_newest_blocker_is_told_until_it_is_removed() -> None:
    blockers = Blockers(lambda: False)
    blockers.check()
    first, second = blockers.add("first"), blockers.add("second")
    assert blockers.reasons() == ["second", "first"]
    with pytest.raises(UsageError, match=r"^second$"):
        blockers.check()
    blockers.remove(second)
    with pytest.raises(UsageError, match=r"^first$"):
        blockers.check()
    with pytest.raises(UsageError, match=f"Migration blocker '{second}' not found"):
        blockers.remove(second)
    blockers.remove(first)
    blockers.check()
    assert blockers.reasons() == []


def test_nothing_is_added_where_it_may_not_be() -> None:
    migrating = Blockers(lambda: True)
    with pytest.raises(UsageError) as refused:
        migrating.add("why")
    assert str(refused.value) == (
        "disallowing migration blocker (migration/snapshot in progress) for: why"
    )
    only = Blockers(lambda: True, only_migratable=True)
    with pytest.raises(UsageError) as refused:
        only.add("why")
    assert str(refused.value) == "disallowing migration blocker (--only-migratable) for: why"
    assert migrating.reasons() == only.reasons() == []


@pytest.mark.parametrize("reason", ["", " \n", "x" * (REASON_CHARACTERS_MAX + 1)])
def test_a_reason_says_something_and_not_too_much(reason: str) -> None:
    blockers = Blockers(lambda: False)
    with pytest.raises(UsageError, match="characters"):
        blockers.add(reason)
    blockers.add("x" * REASON_CHARACTERS_MAX)


def test_there_are_only_so_many() -> None:
    blockers = Blockers(lambda: False)
    identities = [blockers.add(f"reason {index}") for index in range(BLOCKERS_MAX)]
    with pytest.raises(UsageError, match="already"):
        blockers.add("one more")
    blockers.remove(identities[0])
    assert blockers.add("one more") not in identities


async def refusal(control: engine.Control, command: str, **arguments: Any) -> str:
    with pytest.raises(engine.UsageError) as refused:
        await control.execute(command, **arguments)
    return str(refused.value)


@pytest.mark.process
def test_a_blocked_migration_is_refused_in_the_blockers_words() -> None:
    async def scenario() -> None:
        async with engine.Control.start("ram:size=16M") as source:
            answer = await source.execute("x-add-migration-blocker", reason="it is being repaired")
            info = await source.execute("query-migrate")
            assert info["blocked-reasons"] == ["it is being repaired"]
            said = await refusal(source, "migrate", uri="tcp:127.0.0.1:1")
            assert said == "it is being repaired"
            await source.execute("x-remove-migration-blocker", id=answer["id"])
            assert "blocked-reasons" not in await source.execute("query-migrate")
            await source.execute("migrate", uri="tcp:127.0.0.1:1")

    asyncio.run(scenario())


@pytest.mark.process
def test_only_migratable_refuses_every_blocker() -> None:
    with peer("ramferry", "--only-migratable") as one:
        answer = one.client.execute("x-add-migration-blocker", reason="why")
        desc = answer["error"]["desc"]
        assert desc == "disallowing migration blocker (--only-migratable) for: why"
        assert "blocked-reasons" not in one.client.execute("query-migrate")["return"]
