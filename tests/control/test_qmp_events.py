"""Events that wait for a client: which are lost when it does not read."""

from __future__ import annotations

import json

import pytest

from engine.control.qmp.events import EVENTS_MAX, EventQueue, make_event
from engine.control.status import Status


def test_lasting_events_survive_those_that_only_pass_and_the_loss_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue = EventQueue()
    queue.put(make_event("STOP", None))
    for number in range(EVENTS_MAX * 2):
        queue.put(make_event("MIGRATION_PASS", {"pass": number}))
        queue.put(make_event("MIGRATION", {"status": "active"}))
    queue.put(make_event("MIGRATION", {"status": "completed"}))
    queue.put(make_event("RESUME", None))

    assert len(queue) == EVENTS_MAX
    events = [json.loads(queue.take()) for _ in range(EVENTS_MAX)]
    names = [event["event"] for event in events]
    lost = EVENTS_MAX * 4 + 3 - EVENTS_MAX
    assert (names[0], names[-1]) == ("STOP", "RESUME")
    assert events[-2]["data"] == {"status": "completed"}
    assert events[-4]["data"] == {"pass": EVENTS_MAX * 2 - 1}
    assert [event.get("x-dropped-events") for event in events] == [lost] + [None] * (EVENTS_MAX - 1)
    assert queue.dropped_count == lost
    assert len(caplog.messages) == 1


def test_when_all_that_wait_last_the_oldest_is_dropped() -> None:
    queue = EventQueue()
    for _ in range(EVENTS_MAX):
        queue.put(make_event("STOP", None))
    queue.put(make_event("MIGRATION_PASS", {"pass": 1}))
    assert queue.dropped_count == 1
    queue.put(make_event("RESUME", None))

    names = [json.loads(queue.take())["event"] for _ in range(len(queue))]

    assert names == ["STOP"] * (EVENTS_MAX - 1) + ["RESUME"]


@pytest.mark.parametrize("status", [status.value for status in Status])
def test_no_event_is_lost_by_which_a_client_may_wait_for_a_status_that_stays(status: str) -> None:
    stays = {"none", "cancelled", "completed", "failed", "colo", "pre-switchover"}
    stays |= {"postcopy-active", "postcopy-paused"}

    assert make_event("MIGRATION", {"status": status}).is_passing is (status not in stays)
