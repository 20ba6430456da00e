"""A source and a destination of one engine, and what a client sees of their migration."""

from __future__ import annotations

from typing import Any, Final

from tests.conformance.peers import Client, Peer
from tests.support import eventually

SLOW: Final = {"max-bandwidth": 1_000_000, "downtime-limit": 1}


class Couple:
    """A source and a destination of one engine, connected over TCP."""

    def __init__(self, source: Peer, destination: Peer, *capabilities: str) -> None:
        self.source, self.destination = source.client, destination.client
        wanted = [{"capability": name, "state": True} for name in ("events", *capabilities)]
        for one in (self.source, self.destination):
            answer = one.execute("migrate-set-capabilities", capabilities=wanted)
            assert answer == {"return": {}}
        answer = self.destination.execute(
            "migrate-incoming", uri="tcp:127.0.0.1:0", exit_on_error=False
        )
        assert answer == {"return": {}}
        info = self.destination.execute("query-migrate")["return"]
        self.uri = f"tcp:127.0.0.1:{info['socket-address'][0]['port']}"

    def set(self, values: dict[str, int]) -> None:
        request = {"execute": "migrate-set-parameters", "arguments": values}
        assert self.source.ask(request) == {"return": {}}

    def migrate(self) -> None:
        assert self.source.execute("migrate", uri=self.uri) == {"return": {}}

    def sequences(self) -> tuple[list[str], list[str]]:
        """Both sides' events so far. Passes between `active` and the stop are as many as rounds
        were needed: they are checked to rise by one, and left out."""
        for one in (self.source, self.destination):  # an answer comes after the events before it
            one.execute("query-status")
        passes = [e["data"]["pass"] for e in self.source.events if e["event"] == "MIGRATION_PASS"]
        assert passes == list(range(1, len(passes) + 1))
        return sequence(self.source.events), sequence(self.destination.events)

    def seen(self) -> dict[str, Any]:
        """How both sides stand once all is over: events, statuses, members of query-migrate."""
        seen: dict[str, Any] = {}
        seen["source"], seen["destination"] = self.sequences()
        for side, one in (("source", self.source), ("destination", self.destination)):
            seen[f"{side} status"] = settled_status(one)
            info = one.execute("query-migrate")["return"]
            seen[f"{side} migration"] = info.get("status")
            if info.get("status") == "cancelled":  # QEMU's has it when the reader was the first
                info.pop("error-desc", None)
            seen[f"{side} members"] = members(info)
        return seen


def members(info: dict[str, Any]) -> list[str]:
    """Of a query-migrate, without ours."""
    return sorted(name for name in info if not name.startswith("x-"))


def sequence(events: list[dict[str, Any]]) -> list[str]:
    names = []
    for event in events:
        match event["event"]:
            case "MIGRATION":
                names.append(event["data"]["status"])
            case "MIGRATION_PASS":
                names.append("pass")
            case "STOP" | "RESUME":
                names.append(event["event"])
    return [
        name
        for index, name in enumerate(names)
        if name != "pass" or names[index - 1] in ("setup", "device")
    ]


def settled_status(one: Client) -> dict[str, Any]:
    """`query-status` once the migration's end has reached the run state: QEMU emits `completed`
    first, and goes from `finish-migrate` to `postmigrate` a moment later, with no event."""
    seen: dict[str, Any] = {}

    def has_settled() -> bool:
        seen.update(one.execute("query-status")["return"])
        return seen["status"] not in ("finish-migrate", "inmigrate")

    eventually(has_settled, 5.0)
    return seen
