"""Writes, orders about compression and lost channels at any instant: no page is ever wrong."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from engine import _native, wire
from engine.memory.blocks import PAGE_SIZE
from tests.multifd.rig import SenderRig, memory, sender
from tests.multifd.test_deltas import Destination, content, write

pytestmark = pytest.mark.process

PAGE_COUNT = 1024
ROUNDS = 80  #: a sender that forgets nothing with a channel was found out in 26 to 47


class Play:
    """Plays guest, control and network by chance; the destination takes what arrives."""

    def __init__(self, rig: SenderRig, chance: random.Random) -> None:
        self._rig, self._chance = rig, chance
        self._there = Destination(PAGE_COUNT)
        self._older: dict[int, bytes] = {}  #: what pages once were, and may be again
        self._incarnation = 1

    def write_somewhere(self) -> None:
        chance, rig = self._chance, self._rig
        first = chance.randrange(PAGE_COUNT)
        for page in range(first, min(PAGE_COUNT, first + chance.choice([1, 1, 1, 70]))):
            now = os.pread(rig.block.fd, PAGE_SIZE, page * PAGE_SIZE)
            match chance.randrange(5):
                case 0:
                    write(rig, page, chance.randrange(PAGE_SIZE - 8), chance.randbytes(8))
                case 1:
                    write(rig, page, 0, bytes(PAGE_SIZE))
                case 2:
                    write(rig, page, 0, chance.randbytes(PAGE_SIZE))
                case 3:
                    write(rig, page, 0, self._older.get(page, now))
                case _:
                    write(rig, page, 0, b"abcd" * (PAGE_SIZE // 4))
            if chance.random() < 0.3:
                self._older[page] = now

    def order_compression(self) -> None:
        chance = self._chance
        self._rig.worker.order(
            wire.Compress(
                chance.choice(["none", "zlib", "zstd", "lz4", "auto"]),
                xbzrle_cache_bytes=chance.choice([0, 0, 1, 16, 64, 256, 1024, 4096]) * PAGE_SIZE,
                elide=chance.choice(["off", "on", "auto"]),
            )
        )

    async def lose_channel(self, round_number: int) -> None:
        """What is on its way never arrives; control does as it does then."""
        self._incarnation += 1
        self._rig.worker.order(wire.OpenChannel(self._rig.endpoint, self._incarnation))
        await self._rig.heard.next(wire.Opened, self._incarnation)
        self._rig.in_flight.move_to(self._rig.dirty, 0, 1)
        self._rig.worker.order(wire.SendRound(round_number))

    async def play_round(self, number: int) -> None:
        rig, chance = self._rig, self._chance
        rig.budget.rate_bytes_per_s = chance.choice([0, 0, 20_000_000, 200_000_000])
        rig.worker.order(wire.SendRound(number))
        while True:
            header, frames = await rig.packet()
            if header.incarnation != self._incarnation or header.kind is wire.PacketKind.OPEN:
                continue
            if header.kind is wire.PacketKind.ROUND_END:
                break
            self._there.take(header, frames)
            event = chance.random()
            if event < 0.1:
                self.write_somewhere()
            elif event < 0.2:
                self.order_compression()
            elif event < 0.25:
                await self.lose_channel(number)
        rig.in_flight.move_to(rig.delivered, 0, 1)

    def wrong_pages(self) -> list[int]:
        """Pages that are other at the destination, and nobody knows."""
        ours, theirs, dirty = content(self._rig), bytes(self._there.ram), self._rig.dirty[0]
        return [
            page
            for page in range(PAGE_COUNT)
            if not dirty[page // 8] >> (page % 8) & 1
            and ours[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            != theirs[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        ]


@pytest.mark.parametrize("seed", [1, 2])
def test_after_every_round_a_page_is_right_or_dirty(seed: int) -> None:
    chance = random.Random(seed)

    async def scenario() -> None:
        block = memory(PAGE_COUNT, chance.randbytes(PAGE_COUNT * PAGE_SIZE))
        async with sender(block) as rig:
            play = Play(rig, chance)
            _native.bitmap_set_range(rig.dirty[0], 0, PAGE_COUNT)
            for number in range(1, ROUNDS + 1):
                await play.play_round(number)
                assert not play.wrong_pages(), f"round {number}"
                for _ in range(chance.randrange(60)):
                    play.write_somewhere()
                if chance.random() < 0.5:
                    play.order_compression()
        os.close(block.fd)

    asyncio.run(scenario())
