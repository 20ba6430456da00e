"""Orders about compression at any instant, and what a sender may keep and send because of them."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path

import pytest

from engine import _native, wire
from engine.memory.blocks import PAGE_SIZE
from engine.multifd.progress import Count
from tests.multifd.rig import DEADLINE_S, SenderRig, memory, sender
from tests.multifd.test_deltas import Destination, content, round_of, write

pytestmark = pytest.mark.process

MIB = 1024 * 1024
PAGE_COUNT = 64


async def packets_of_round(rig: SenderRig) -> tuple[int, int]:
    """Take a round that was ordered: its pages, and the bytes of its largest payload."""
    pages = largest = 0
    while True:
        header, frames = await rig.packet()
        if header.kind is wire.PacketKind.ROUND_END:
            return pages, largest
        pages, largest = pages + header.pages, max(largest, len(frames))


async def obeyed(rig: SenderRig, number: int) -> None:
    """Wait until every order before this one has been carried out."""
    await rig.harvest(number)


def test_a_page_that_went_through_the_cache_is_not_known_by_an_older_hash() -> None:
    """Sent by its hash, then through the cache as another, then it is again what it was."""

    async def scenario() -> tuple[bytes, bytes]:
        block, there = memory(PAGE_COUNT, b"x" * PAGE_COUNT * PAGE_SIZE), Destination()
        async with sender(block) as rig:
            steps = [(0, b"old"), (0, b"old"), (PAGE_COUNT, b"new"), (0, b"old")]
            for number, (cache_pages, text) in enumerate(steps, 1):
                cache_bytes = cache_pages * PAGE_SIZE
                rig.worker.order(wire.Compress("none", xbzrle_cache_bytes=cache_bytes, elide="on"))
                write(rig, 5, 0, text)
                await round_of(rig, number, there)
            result = bytes(there.ram[5 * PAGE_SIZE :][:3]), content(rig)[5 * PAGE_SIZE :][:3]
        os.close(block.fd)
        return result

    assert asyncio.run(scenario()) == (b"old", b"old")


def test_auto_may_follow_any_codec_within_a_round() -> None:
    """The batch that waits meanwhile was encoded by a codec that `auto` does not know."""
    page_count = 16 * wire.BATCH_PAGES_MAX

    async def scenario() -> int:
        block = memory(page_count, b"tale of a page. " * (page_count * PAGE_SIZE // 16))
        async with sender(block) as rig:
            rig.worker.order(wire.Compress("zlib", zlib_level=9))
            _native.bitmap_set_range(rig.dirty[0], 0, page_count)
            rig.budget.rate_bytes_per_s = 1
            rig.worker.order(wire.SendRound(1))
            await rig.until(lambda: rig.progress[Count.PACED_NS])
            rig.worker.order(wire.Compress("auto"))
            await obeyed(rig, 1)
            rig.budget.rate_bytes_per_s = 0
            pages, _ = await packets_of_round(rig)
            await obeyed(rig, 2)
        os.close(block.fd)
        return pages

    assert asyncio.run(scenario()) == page_count


def test_the_longest_deltas_of_a_batch_fit_in_a_packet() -> None:
    """All bytes of all pages but the last four became others: no delta is longer, and it is one."""
    page_count = wire.BATCH_PAGES_MAX

    async def scenario() -> int:
        block, largest = memory(page_count), 0
        async with sender(block) as rig:
            rig.worker.order(wire.Compress("none", xbzrle_cache_bytes=page_count * PAGE_SIZE))
            for number, letter in enumerate([b"x", b"x", b"y"], 1):
                for page in range(page_count):
                    write(rig, page, 0, letter * (PAGE_SIZE - 4))
                rig.worker.order(wire.SendRound(number))
                largest = max(largest, (await packets_of_round(rig))[1])
        os.close(block.fd)
        return largest

    assert asyncio.run(scenario()) == wire.PAYLOAD_BYTES_MAX


@pytest.mark.parametrize(
    "how", [{"elide": "on"}, {"xbzrle_cache_bytes": 64 * MIB}], ids=["elide", "xbzrle"]
)
def test_a_sender_that_finds_nothing_changed_still_takes_orders(how: dict[str, object]) -> None:
    page_count = 16 * 1024

    async def scenario() -> int:
        block = memory(page_count, b"tale of a page. " * (page_count * PAGE_SIZE // 16))
        left = 0
        unchanged = Count.ELIDED_PAGES if "elide" in how else Count.DELTA_UNCHANGED
        async with sender(block) as rig:
            rig.worker.order(wire.Compress("none", **how))  # type: ignore[arg-type]
            for number in (1, 2):
                _native.bitmap_set_range(rig.dirty[0], 0, page_count)
                rig.worker.order(wire.SendRound(number))
                await packets_of_round(rig)
            for number in itertools.count(3):  # until it was caught within a round
                _native.bitmap_set_range(rig.dirty[0], 0, page_count)
                before = rig.progress[unchanged]
                rig.worker.order(wire.SendRound(number))
                await rig.until(lambda: rig.progress[unchanged] > before)  # noqa: B023
                os.kill(rig.worker.pid, signal.SIGSTOP)
                is_within = rig.dirty.count() > page_count // 4
                if is_within:
                    rig.worker.order(wire.Harvest(1))
                os.kill(rig.worker.pid, signal.SIGCONT)
                await packets_of_round(rig)
                await rig.heard.next(wire.RoundSent, number)
                if is_within:
                    left = (await rig.heard.next(wire.Harvested)).dirty_pages
                    break
        os.close(block.fd)
        return left

    async def bounded() -> int:
        async with asyncio.timeout(DEADLINE_S):
            return await scenario()

    assert asyncio.run(bounded()) > 0


def private_bytes(pid: int) -> int:
    """What RLIMIT_DATA limits."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def test_a_large_cache_may_grow_and_shrink() -> None:
    """The worker's memory is limited to what it was ordered to keep, and a little more: both caches
    are there while pages move, and the old one is gone then."""

    async def scenario() -> list[int]:
        block, sizes = memory(1024 * 1024), []  # 4 GiB without a page
        async with sender(block) as rig:
            for number, mib in enumerate((1024, 2048, 1024, 0), 1):
                rig.worker.order(wire.Compress("none", xbzrle_cache_bytes=mib * MIB))
                await obeyed(rig, number)
                sizes.append(private_bytes(rig.worker.pid) // MIB)
        os.close(block.fd)
        return sizes

    first, grown, shrunk, gone = asyncio.run(scenario())
    assert gone < 384
    assert (first - gone) // 1024 == 1
    assert (grown - gone) // 1024 == 2
    assert (shrunk - gone) // 1024 == 1


@pytest.mark.parametrize("cache_bytes", [2**45, 2**63], ids=["32 TiB", "8 EiB"])
def test_a_cache_is_no_larger_than_the_ram(cache_bytes: int) -> None:
    """All sizes that `xbzrle-cache-size` takes are orders like others."""

    async def scenario() -> dict[wire.PacketKind, int]:
        block, there = memory(PAGE_COUNT, b"x" * PAGE_COUNT * PAGE_SIZE), Destination()
        async with sender(block) as rig:
            rig.worker.order(wire.Compress("none", xbzrle_cache_bytes=cache_bytes))
            for number in (1, 2, 3):
                _native.bitmap_set_range(rig.dirty[0], 0, PAGE_COUNT)
                write(rig, 5, 0, b"%d" % number)
                await round_of(rig, number, there)
            assert bytes(there.ram) == content(rig)
            assert private_bytes(rig.worker.pid) < 384 * MIB
        os.close(block.fd)
        return there.pages

    assert asyncio.run(scenario())[wire.PacketKind.DELTAS] == 2  # of the page in rounds 2 and 3
