"""A control process with one workload guest, to be killed: `python -m tests.guest.stub SPEC ROLE`.

Orders come as JSON lines on stdin; each is answered with one line when it is done.
"""

from __future__ import annotations

import asyncio
import json
import select
import sys
from typing import Any

from engine.guest.base import TrackerName
from engine.guest.spec import WorkloadSpec, open_workload, parse_guest_spec
from engine.guest.workload import WorkloadGuest

JUDGING: list[asyncio.Future[Any]] = []  #: begun, and never heard of


async def nothing(_at_ns: int) -> None:
    """Taken: nobody to tell."""


async def carry_out(guest: WorkloadGuest, order: dict[str, Any]) -> Any:
    session = bytes.fromhex(order.get("session", ""))
    match order["do"]:
        case "pause":
            return await guest.pause(for_migration=order["for_migration"])
        case "throttle":
            return await guest.throttle(order["percent"])
        case "track":
            return (await guest.start_tracking(TrackerName(order["name"]))).name.value
        case "writes":
            return await guest.writes()
        case "listen":
            return await guest.listen_handover(order["uri"])
        case "arm":
            return await guest.arm(session, order["run"], nothing)
        case "connect":
            return await guest.connect_handover(order["endpoint"], session)
        case "give_away":
            return await guest.give_away()
        case "hand_over":
            keeps_ram = order.get("keeps_ram", False)
            return (await guest.hand_over(order["wait_ns"], keeps_ram=keeps_ram)).value
        case "load":
            return await guest.load_state(bytes.fromhex(order["state"]))
        case "open_missing":
            return (await guest.open_missing()).vcpus
        case "begin_judging":
            JUDGING.append(asyncio.ensure_future(guest.judge()))
            uffd = (await guest.open_missing()).uffds[0]
            return len((await asyncio.to_thread(select.select, [uffd], [], [], 20))[0])
    raise ValueError(order)


async def main() -> None:
    spec = parse_guest_spec(sys.argv[1])
    assert isinstance(spec, WorkloadSpec)
    guest = await open_workload(spec, incoming=sys.argv[2] == "incoming")
    print(json.dumps({"pid": guest.pid}), flush=True)  # noqa: T201
    while line := await asyncio.to_thread(sys.stdin.readline):
        result = await carry_out(guest, json.loads(line))
        print(json.dumps({"result": result}), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
