"""The destination's receivers, played by a test."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

from engine import wire
from engine.control.pool import Pool, Worker
from engine.control.receivers import Channels, ReceiverGroup
from engine.errors import WorkerLost
from engine.guest.base import Missing
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock


def played_group(ram: int, count: int, said: list[wire.Message]) -> ReceiverGroup:
    """A group whose receivers a test puts into its lanes."""
    os.ftruncate(ram, PAGE_SIZE)
    return ReceiverGroup(
        [RamBlock("ram", PAGE_SIZE, ram, PAGE_SIZE)],
        cast(Pool[wire.ReceiverReport], None),
        Channels(bytes(16), count, lambda index: f"tcp://127.0.0.1:{index}"),
        heal_limit=8,
        tell=said.append,
        fail=lambda exc: said.append(wire.Failed(str(exc))),
    )


async def end() -> None:
    """Nothing to kill."""


def test_a_second_wish_for_a_lane_waits_until_its_new_receiver_listens() -> None:
    """The receiver was killed and replaced; before the new one listens the sender dies, too. What
    is lost from then on is of the second wish's incarnation."""
    said: list[wire.Message] = []

    async def scenario() -> list[wire.Message]:
        ram = os.memfd_create("ram")
        group = played_group(ram, 1, said)
        worker: Any = SimpleNamespace(is_alive=True, pid=1, end=end)
        lane = group.lanes[0]
        lane.worker, lane.incarnation, group._is_announced = cast(Worker[Any], worker), 2, True
        group.reopen(0, 3)
        await asyncio.sleep(0)
        before = list(said)
        group._take(lane, worker, wire.Opened(2))  # late, and over
        group._take(lane, worker, wire.Ready("tcp://127.0.0.1:7", "memcpy"))
        await asyncio.gather(*group._tasks)
        group._lose(lane, WorkerLost("receiver", 0, "the process died"))
        await group.end()
        os.close(ram)
        return before

    assert asyncio.run(scenario()) == []
    assert said[0] == wire.Reopened(0, 3, "tcp://127.0.0.1:7")
    assert isinstance(said[1], wire.ChannelBroken)
    assert said[1].incarnation == 3


def test_the_group_inserts_when_all_who_live_have_said_so() -> None:
    async def scenario() -> None:
        ram, said = os.memfd_create("ram"), list[wire.Message]()
        group = played_group(ram, 3, said)
        orders: list[wire.Message] = []

        def take(order: wire.Message, _: list[int]) -> None:
            orders.append(order)

        workers = [SimpleNamespace(is_alive=True, order=take, end=end) for _ in range(3)]
        for lane, worker in zip(group.lanes, workers, strict=True):
            lane.worker = cast(Worker[Any], worker)
        group._is_announced = True
        received = PageBitmaps.create("received", group._blocks)
        group.insert(cast(Missing, SimpleNamespace(addresses=[4096], uffds=[])), received)
        waiting = asyncio.ensure_future(group.inserting())
        group._take(group.lanes[0], cast(Worker[Any], workers[0]), wire.Inserting())
        group._take(group.lanes[1], cast(Worker[Any], workers[1]), wire.Inserting())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        workers[2].is_alive = False
        group._lose(group.lanes[2], WorkerLost("receiver", 2, "the process died"))
        await asyncio.wait_for(waiting, 5)
        assert orders == [wire.InsertPages([4096])] * 3
        await group.end()
        received.close()
        os.close(ram)

    asyncio.run(scenario())
