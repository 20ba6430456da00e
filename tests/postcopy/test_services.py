"""Both services, a guest that faults, and every page compared."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
from pathlib import Path

import pytest

from engine import _native, wire
from engine.control.pool import Worker
from engine.memory.insertion import Inserter
from engine.postcopy.statistics import FaultCount, PageCount
from tests.hugepages import huge_pages
from tests.postcopy.background import pushing
from tests.postcopy.rig import Heard, Rig, rig
from tests.postcopy.support import PAGE, all_dirty, destination, needs_uffd, run, source
from tests.postcopy.toucher import Touches

__all__ = ["huge_pages"]

pytestmark = [pytest.mark.process, needs_uffd]

PAGES = 4096  # 16 MiB
KILLS_MAX = 6


@pytest.mark.parametrize("stride", [0, 1, 7])
@pytest.mark.parametrize("prefetch", [0, 64])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_page_a_guest_touches_is_the_sources(
    stride: int, prefetch: int, threads: int
) -> None:
    async def scenario() -> None:
        with source(PAGES, zero_every=5) as fd:
            async with rig(fd, prefetch_pages_max=prefetch) as made:
                all_dirty(made)
                await made.start()
                answer = await made.toucher.ask(
                    Touches(stride=stride, threads=threads, writes=True)
                )
                marked = await made.toucher.ask(None)
                assert (answer["touched"], answer["wrong"]) == (PAGES, [])
                assert marked == {"marked": PAGES}
                assert made.received.count() == PAGES
                await made.settled()
                check_statistics(made, threads, prefetch)

    run(scenario())


def check_statistics(made: Rig, threads: int, prefetch: int) -> None:
    counts, pages = made.fault_statistics, made.page_statistics
    placed = counts[FaultCount.DEMAND_PAGES] + counts[FaultCount.PREFETCH_PAGES]
    assert placed + counts[FaultCount.REST_PAGES] == PAGES
    assert counts[FaultCount.STRAY_EVENTS] == counts[FaultCount.OPEN] == 0
    assert counts[FaultCount.EVENTS] >= counts[FaultCount.WAITS] > 0
    assert sum(counts.latency_distribution) == counts[FaultCount.WAITS]
    assert 1_000 < counts.latency_mean_ns < 1_000_000_000
    assert sum(thread.waits for thread in counts.threads) == counts[FaultCount.WAITS]
    assert sum(t.blocked_ns for t in counts.threads) == counts[FaultCount.LATENCY_NS]
    assert 1 <= len([t for t in counts.threads if t.thread_id]) <= threads
    assert counts[FaultCount.ANY_BLOCKED_NS] <= counts[FaultCount.LATENCY_NS]
    assert pages[PageCount.DEMAND_PAGES] == counts[FaultCount.WAITS]
    assert pages[PageCount.ZERO_PAGES] > 0
    assert pages.last_demand is not None
    assert (counts[FaultCount.PREFETCH_PAGES] > 0) <= (prefetch > 0)


def test_prefetch_spares_a_sweep_most_of_its_faults() -> None:
    async def faults(prefetch: int) -> int:
        with source(PAGES) as fd:
            async with rig(fd, prefetch_pages_max=prefetch) as made:
                all_dirty(made)
                await made.start()
                # what was asked for in advance has time to come, also where all CPUs are taken
                await made.toucher.ask(Touches(stride=1, pause_us=200))
                await made.settled()
                return made.fault_statistics[FaultCount.WAITS]

    assert run(faults(64)) * 3 < run(faults(0)) == PAGES


def test_what_is_received_as_zero_is_a_hole_until_it_is_touched() -> None:
    async def scenario() -> None:
        with source(PAGES, zero_every=2) as fd:
            async with rig(fd) as made:
                all_dirty(made)
                inserter = Inserter(
                    [made.block], [made.toucher.uffd], [made.toucher.address], made.received
                )
                zero_runs = b"".join(wire.RUN.pack(page, 1) for page in range(0, PAGES, 2))
                assert inserter.clear(0, zero_runs, PAGES // 2) == PAGES // 2
                assert made.block.allocated_bytes() == 0
                await made.start()
                answer = await made.toucher.ask(Touches(writes=True))
                assert answer["wrong"] == []
                assert await made.toucher.ask(None) == {"marked": PAGES}
                counts = made.fault_statistics
                await made.until(lambda: counts[FaultCount.ZERO_PAGES] == PAGES // 2)
                await made.settled()
                assert made.fault_statistics[FaultCount.DEMAND_PAGES] == PAGES // 2

    run(scenario())


def test_all_blocked_time_needs_all_vcpus() -> None:
    async def blocked(vcpus: int) -> tuple[int, int]:
        with source(256) as fd:
            async with rig(fd, vcpus=vcpus) as made:
                await made.start()
                await made.toucher.ask(Touches())
                await made.settled()
                counts = made.fault_statistics
                return counts[FaultCount.ANY_BLOCKED_NS], counts[FaultCount.ALL_BLOCKED_NS]

    any_ns, all_ns = run(blocked(1))
    assert any_ns == all_ns > 0
    assert run(blocked(2))[1] == 0  # one thread touches


def test_the_rest_comes_without_a_touch_and_is_all_there_is() -> None:
    async def scenario() -> None:
        with source(PAGES, zero_every=3) as fd:
            async with rig(fd) as made:
                all_dirty(made)
                worker, faults = await made.start_faults()
                _, pages = await made.start_pages()
                await pages.next(wire.FaultChannelOpened)
                worker.order(wire.FetchRest())
                await faults.next(wire.AllReceived)
                assert made.received.count() == PAGES
                assert made.dirty.count() == 0
                assert destination(made) == os.pread(fd, PAGES * PAGE, 0)
                assert made.block.allocated_bytes() < PAGES * PAGE
                answer = await made.toucher.ask(Touches())
                assert answer["wrong"] == []
                worker.order(wire.FetchRest())  # again: nothing is missing
                await faults.next(wire.AllReceived, 2)

    run(scenario())


def test_a_fetch_of_the_rest_without_a_connection_waits_for_one() -> None:
    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                worker, faults = await made.start_faults()
                worker.order(wire.FetchRest())
                await made.start_pages()
                await faults.next(wire.AllReceived)
                assert destination(made) == os.pread(fd, PAGES * PAGE, 0)

    run(scenario())


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_background_and_faults_place_each_page_once(codec: str) -> None:
    async def scenario() -> None:
        with source(4 * PAGES) as fd:
            async with rig(fd, prefetch_pages_max=32) as made:
                all_dirty(made)
                worker, faults = await made.start_faults()
                _, pages = await made.start_pages()
                await pages.next(wire.FaultChannelOpened)
                async with pushing(made, 2, codec=codec) as background:
                    await made.until(lambda: background.fresh_pages)
                    answer = await made.toucher.ask(Touches(threads=2, writes=True))
                    await background.finished()
                    placed = background.fresh_pages
                worker.order(wire.FetchRest())
                await faults.next(wire.AllReceived)
                assert answer["wrong"] == []
                assert await made.toucher.ask(None) == {"marked": 4 * PAGES}
                assert made.received.count() == 4 * PAGES
                assert faults.of(wire.FaultChannelBroken) == []
                counts = made.fault_statistics
                causes = (FaultCount.DEMAND_PAGES, FaultCount.PREFETCH_PAGES, FaultCount.REST_PAGES)
                assert placed + sum(counts[cause] for cause in causes) == 4 * PAGES

    run(scenario())


def test_a_unix_channel_does_as_well() -> None:
    async def scenario() -> None:
        path = Path(tempfile.mkdtemp()) / "faults"
        with source(64) as fd:
            async with rig(fd, bind=f"ipc://{path}") as made:
                await made.start()
                answer = await made.toucher.ask(Touches())
                assert answer["wrong"] == []
        path.unlink()  # control's: its worker was killed

    run(scenario())


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("codec", ["", "none", "lz4"])
def test_huge_pages_fault_and_come_whole_through_cuts(codec: str) -> None:
    async def scenario() -> None:
        with source(4 * 512, zero_every=512, hugetlb=True) as fd:
            async with rig(fd, hugetlb=True, prefetch_pages_max=64) as made:
                all_dirty(made)
                worker, faults = await made.start_faults()
                pages, heard = await made.start_pages()
                await heard.next(wire.FaultChannelOpened)
                cutting = asyncio.create_task(keep_cutting(made, pages, 5))
                async with pushing(made, 2, codec=codec) if codec else contextlib.nullcontext():
                    answer = await made.toucher.ask(Touches(threads=2, writes=True, pause_us=20))
                cutting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await cutting
                assert answer["wrong"] == []
                assert await made.toucher.ask(None) == {"marked": 4 * 512}
                assert made.received.count() == 4 * 512
                worker.order(wire.FetchRest())
                await faults.next(wire.AllReceived)

    run(scenario())


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_that_are_here_are_kept_where_that_is_not_known_any_more() -> None:
    async def scenario() -> None:
        with source(4 * 512, hugetlb=True) as fd:
            async with rig(fd, hugetlb=True) as made:
                await made.start()
                await made.toucher.ask(Touches(count=2 * 512, writes=True))
                await made.settled()
                for worker in made.workers:
                    await worker.end()
                made.received.clear()
                rest = Touches(first=2 * 512, count=2 * 512, writes=True)
                touching = asyncio.create_task(made.toucher.ask(rest))
                worker, faults = await made.start_faults()
                await made.start_pages()
                assert (await touching)["wrong"] == []
                worker.order(wire.FetchRest())
                await faults.next(wire.AllReceived)
                assert await made.toucher.ask(None) == {"marked": 4 * 512}
                assert made.received.count() == 4 * 512
                assert made.fault_statistics[FaultCount.PRESENT_PAGES] == 2 * 512

    run(scenario())


# -- discard -------------------------------------------------------------------------------------


def test_what_is_stale_is_discarded_before_the_guest_runs_and_never_after() -> None:
    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:
                stale = os.urandom(PAGES * PAGE)
                os.pwrite(made.block.fd, stale, 0)
                os.pwrite(made.block.fd, os.pread(fd, 100 * PAGE, 50 * PAGE), 50 * PAGE)
                made.received.fill()
                _native.bitmap_set_range(made.stale[0], 0, 50)
                worker, heard = await made.start_faults()
                worker.order(wire.Discard())
                assert await heard.next(wire.Discarded) == wire.Discarded(50)
                _native.bitmap_set_range(made.stale[0], 150, PAGES - 150)
                worker.order(wire.Discard())
                assert await heard.next(wire.Discarded, 2) == wire.Discarded(PAGES - 150)
                assert made.block.allocated_bytes() == 100 * PAGE
                await made.start_pages()
                answer = await made.toucher.ask(Touches())
                assert answer["wrong"] == []
                assert made.fault_statistics[FaultCount.EVENTS] == PAGES - 100
                worker.order(wire.Discard())
                assert "once the guest runs" in (await heard.next(wire.WorkerFailed)).reason

    run(scenario())


# -- loss ----------------------------------------------------------------------------------------


async def touch(made: Rig, part: int, **touches: int) -> None:
    """A third of all pages, checked and written."""
    count = made.block.page_count // 3
    first = part * count
    if part == 2:
        count = made.block.page_count - first
    answer = await made.toucher.ask(Touches(first=first, count=count, writes=True, **touches))
    assert (answer["touched"], answer["wrong"]) == (count, [])


async def keep_cutting(made: Rig, pages: Worker[wire.PagesReport], seed: int) -> None:
    rng = random.Random(seed)
    while True:
        await asyncio.sleep(rng.random() * 0.05)
        made.reconnect(pages)


def test_a_channel_that_is_cut_again_and_again_loses_nothing() -> None:
    async def scenario() -> None:
        with source(2 * PAGES, zero_every=9) as fd:
            async with rig(fd, prefetch_pages_max=64) as made:
                all_dirty(made)
                _, faults = await made.start_faults()
                pages, heard = await made.start_pages()
                await heard.next(wire.FaultChannelOpened)
                cutting = asyncio.create_task(keep_cutting(made, pages, 1))
                for part in range(3):
                    await touch(made, part, threads=3, pause_us=100)
                    cuts = 2 * (part + 1)
                    await faults.next(wire.FaultChannelOpened, 1 + cuts)
                cutting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await cutting
                assert await made.toucher.ask(None) == {"marked": 2 * PAGES}

    run(scenario())


async def start_connected(made: Rig) -> tuple[Worker[wire.FaultsReport], Worker[wire.PagesReport]]:
    faults, _ = await made.start_faults()
    pages, heard = await made.start_pages()
    await heard.next(wire.FaultChannelOpened)
    return faults, pages


async def keep_killing(made: Rig, victim: str, seed: int, kills: list[str]) -> None:
    """What control does: whoever died is replaced, and the channel made anew. Only so often: a busy
    machine needs seconds for a new one, and killed for ever none would get on."""
    rng = random.Random(seed)
    faults, pages = made.workers[-2:]
    while len(kills) < KILLS_MAX:
        await asyncio.sleep(rng.random() * 0.1)
        now = rng.choice(("faults", "pages")) if victim == "either" else victim
        if now == "faults":
            os.kill(faults.pid, signal.SIGKILL)
            await faults.end()
            faults, _ = await made.start_faults()
            made.reconnect(pages)
        else:
            os.kill(pages.pid, signal.SIGKILL)
            await pages.end()
            pages, _ = await made.start_pages()
        kills.append(now)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("victim", ["faults", "pages", "either"])
def test_services_that_are_killed_under_load_lose_nothing(victim: str, seed: int) -> None:
    async def scenario() -> None:
        with source(2 * PAGES, zero_every=9) as fd:
            async with rig(fd, prefetch_pages_max=64) as made:
                all_dirty(made)
                await start_connected(made)
                kills: list[str] = []
                killing = asyncio.create_task(keep_killing(made, victim, seed, kills))
                async with pushing(made, 1) if seed == 2 else contextlib.nullcontext():
                    for part in range(3):
                        await touch(made, part, threads=3, seed=seed, pause_us=300)
                        await made.until(lambda: len(kills) > part)  # noqa: B023
                killing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await killing
                assert await made.toucher.ask(None) == {"marked": 2 * PAGES}

    run(scenario())


@pytest.mark.parametrize("victim", ["sender", "receiver"])
@pytest.mark.parametrize("hugetlb", [False, True])
def test_what_a_killed_background_had_taken_comes_with_the_rest(
    victim: str, hugetlb: bool, request: pytest.FixtureRequest
) -> None:
    if hugetlb:
        request.getfixturevalue("huge_pages")

    async def scenario() -> None:
        with source(6 * 512, hugetlb=hugetlb) as fd:
            async with rig(fd, hugetlb=hugetlb) as made:
                all_dirty(made)
                faults, heard = await made.start_faults()
                await made.start_pages()
                async with pushing(made, 1) as background:
                    await made.until(made.received.count)
                    receiver, sender = background.workers
                    os.kill({"sender": sender, "receiver": receiver}[victim].pid, signal.SIGKILL)
                    answer = await made.toucher.ask(Touches(writes=True))
                    faults.order(wire.FetchRest())
                    await heard.next(wire.AllReceived)
                assert answer["wrong"] == []
                assert await made.toucher.ask(None) == {"marked": 6 * 512}
                assert made.received.count() == 6 * 512

    run(scenario())


def test_all_that_was_taken_and_lost_with_a_page_service_comes_with_the_rest() -> None:
    """A killed service may have taken bits of pages that it never sent."""

    async def scenario() -> None:
        with source(PAGES) as fd:
            async with rig(fd) as made:  # nothing is dirty: as if all had been taken, and lost
                worker, faults = await made.start_faults()
                pages, heard = await made.start_pages()
                await heard.next(wire.FaultChannelOpened)
                worker.order(wire.FetchRest())
                await asyncio.sleep(0.005)
                os.kill(pages.pid, signal.SIGKILL)
                await made.start_pages()
                await faults.next(wire.AllReceived)
                assert destination(made) == os.pread(fd, PAGES * PAGE, 0)

    run(scenario())


def test_control_that_dies_takes_its_services_with_it_and_the_guest_goes_on_later() -> None:
    async def scenario() -> None:
        with source(256) as fd:
            async with rig(fd) as made:
                all_dirty(made)
                await made.start()
                for worker in made.workers:
                    await worker.end()  # closes their sockets first
                touching = asyncio.create_task(made.toucher.ask(Touches()))
                await made.start()
                assert (await touching)["wrong"] == []

    run(scenario())


def heard_reasons(heard: Heard) -> list[str]:
    return [report.reason for report in heard.of(wire.FaultChannelBroken)]


def test_a_page_service_that_finds_nobody_says_so_and_tries_again_when_told() -> None:
    async def scenario() -> None:
        with source(16) as fd:
            async with rig(fd) as made:
                await made.start_faults()
                right, made.endpoint = made.endpoint, "tcp://127.0.0.1:1"
                pages, heard = await made.start_pages()
                await heard.next(wire.FaultChannelBroken)
                assert "Connection refused" in heard_reasons(heard)[0]
                made.endpoint = right
                made.reconnect(pages)
                await heard.next(wire.FaultChannelOpened)
                assert (await made.toucher.ask(Touches()))["wrong"] == []

    run(scenario())


def test_a_listener_can_be_moved_while_the_connection_goes_on() -> None:
    async def scenario() -> None:
        with source(64) as fd:
            async with rig(fd) as made:
                worker, faults = await made.start_faults()
                pages, heard = await made.start_pages()
                await heard.next(wire.FaultChannelOpened)
                worker.order(wire.ListenFaults("tcp://127.0.0.1:*"))
                moved = (await faults.next(wire.Ready, 2)).endpoint
                assert moved != made.endpoint
                assert (await made.toucher.ask(Touches(count=32)))["wrong"] == []
                made.endpoint = moved
                made.reconnect(pages)
                await heard.next(wire.FaultChannelOpened, 2)
                assert (await made.toucher.ask(Touches()))["wrong"] == []

    run(scenario())


def test_at_a_new_place_a_page_service_that_counts_from_one_again_is_let_in() -> None:
    """Its control process was killed, and the next one knows of no incarnation."""

    async def scenario() -> None:
        with source(64) as fd:
            async with rig(fd) as made:
                worker, faults = await made.start_faults()
                pages, heard = await made.start_pages()
                await heard.next(wire.FaultChannelOpened)
                for count in (2, 3):
                    made.reconnect(pages)
                    await heard.next(wire.FaultChannelOpened, count)
                worker.order(wire.ListenFaults("tcp://127.0.0.1:*"))
                made.endpoint = (await faults.next(wire.Ready, 2)).endpoint
                await pages.end()
                made.incarnation = 0
                _, heard = await made.start_pages()
                assert (await heard.next(wire.FaultChannelOpened)).incarnation == 1
                assert (await made.toucher.ask(Touches()))["wrong"] == []

    run(scenario())
