"""The workload guest inside its process: RAM, vCPUs, their tracker and their judge. No event loop.

One `Machine` owns the RAM's descriptor and mapping, the vCPU threads and the tracker; `close` gives
all back. Its methods are called from one thread, but for `fill`, `judge` and, while pages are
missing, `pause`, which run in another: nothing else may wait for a page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from engine import _native
from engine.errors import GuestError, MemoryRefused
from engine.guest import messages
from engine.guest.judgement import WRONG, Judgement
from engine.guest.tracker import OpenTracker, count_written, open_tracker
from engine.memory.blocks import PAGE_SIZE
from engine.memory.missing import open_missing
from engine.memory.tracking import TrackerName

PIECE_PAGES: Final = 8192  #: 32 MiB: filling and judging can be ended this often
PAUSE_WAIT_NS: Final = 3_000_000_000  #: less than control waits for its answer
STATE_VERSION: Final = 2
CHECKSUM: Final = struct.Struct("<I")  #: of all before it, against damage


class SavedState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Device state of a workload guest; `vcpus` is checked by the native code."""

    version: int
    options: messages.Options
    vcpus: bytes
    asleep: bool


class Ended(Exception):
    """The guest was told to end while it was filled or judged."""


class Machine:
    """The guest. Starts paused."""

    def __init__(self, ram_fd: int, size: int, options: messages.Options) -> None:
        """Take the descriptor over, also when this fails.

        :raise GuestError: the options are not possible.
        :raise MemoryRefused: RAM cannot be mapped."""
        self.ram_fd, self.size, self.page_count = ram_fd, size, size // PAGE_SIZE
        self.options = options
        self.is_running = False
        self.is_asleep = False  #: while it runs; its vCPUs stand until it is woken
        self.missing_fd = -1  #: userfaultfd while a page that is not there waits for the engine
        self._ended = threading.Event()
        self._tracker: OpenTracker | None = None
        self._counter: OpenTracker | None = None  #: for a measurement; never beside `_tracker`
        self._is_counting_dirty = False
        self._limits: dict[int, int] = {}  #: bytes per second by vCPU
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, ram_fd)
            try:
                self._ram = undo.enter_context(mmap.mmap(ram_fd, size))
            except (OSError, ValueError) as exc:
                raise MemoryRefused(f"cannot map {size} bytes of RAM") from exc
            self._vcpus = self._start_vcpus(options)
            undo.pop_all()

    def _start_vcpus(self, options: messages.Options) -> _native.Workload:
        try:
            _native.workload_fill(self._ram, 0, 0, options.contents, options.seed)  # checks names
            return _native.workload_start(
                self._ram,
                self.page_count,
                options.vcpus,
                options.pattern,
                options.rate_bytes_per_s,
                options.words,
                options.seed,
                None,
                options.timed,
            )
        except (ValueError, OSError) as exc:
            raise GuestError(f"vCPUs cannot be started: {exc}") from exc

    # -- running ---------------------------------------------------------------------------------

    def pause(self) -> int:
        """Stop every vCPU; return the monotonic time when all stood.

        :raise GuestError: one has waited for a page for too long; the guest runs on."""
        try:
            _native.workload_pause(self._vcpus, PAUSE_WAIT_NS)
        except TimeoutError as exc:
            waits = "waits for a missing page" if self.is_missing_open else "does not stand"
            raise GuestError(
                f"the guest was not stopped and runs on: after {PAUSE_WAIT_NS / 1e9:g} s a vCPU "
                f"still {waits}"
            ) from exc
        self.is_running = False
        return time.monotonic_ns()

    def resume(self) -> None:
        if not self.is_asleep:
            _native.workload_resume(self._vcpus)
        self.is_running = True

    def sleep(self, asleep: bool) -> None:
        """Fall asleep (ACPI's S3, as far as vCPUs go), or be woken. Only what runs does.

        :raise GuestError: it stands, or does not fall asleep."""
        if not self.is_running:
            raise GuestError("the guest stands: it neither falls asleep nor wakes up")
        if asleep:
            self.pause()
        self.is_asleep = asleep
        self.resume()

    def throttle(self, percent: int) -> None:
        """:raise GuestError: out of range."""
        try:
            _native.workload_throttle(self._vcpus, percent)
        except ValueError as exc:
            raise GuestError(str(exc)) from exc

    def writes(self) -> int:
        return sum(_native.workload_writes(self._vcpus))

    # -- device state ----------------------------------------------------------------------------

    def save(self) -> bytes:
        """:raise GuestError: not paused."""
        if self.is_running:
            raise GuestError("the guest runs; pause it before its state is saved")
        vcpus = _native.workload_save(self._vcpus)
        saved = SavedState(STATE_VERSION, self.options, vcpus, self.is_asleep)
        body = msgspec.msgpack.encode(saved)
        return body + CHECKSUM.pack(zlib.crc32(body))

    def load(self, state: bytes) -> None:
        """Take a state over, with the options it was made with. Only while paused.

        :raise GuestError: says what is wrong with it; nothing is changed."""
        body = state[: -CHECKSUM.size]
        if state[-CHECKSUM.size :] != CHECKSUM.pack(zlib.crc32(body)):
            raise GuestError("device state is damaged, or not that of a workload guest")
        try:
            saved = msgspec.msgpack.decode(body, type=SavedState)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise GuestError("device state is not that of a workload guest") from exc
        if saved.version != STATE_VERSION:
            raise GuestError(f"device state version {saved.version}, {STATE_VERSION} expected")
        vcpus = self._start_vcpus(saved.options)
        try:
            _native.workload_load(vcpus, saved.vcpus)
        except ValueError as exc:
            _native.workload_stop(vcpus)
            raise GuestError(str(exc)) from exc
        _native.workload_stop(self._vcpus)
        self._vcpus, self.options, self.is_asleep = vcpus, saved.options, saved.asleep
        self._apply_dirtying()

    # -- tracking --------------------------------------------------------------------------------

    def start_tracking(self, wanted: TrackerName | None) -> OpenTracker:
        """:raise MemoryRefused: the wanted tracker does not work here, or pages are missing."""
        self._check_whole()
        self.stop_tracking()
        self.stop_counting()
        self._tracker = open_tracker(wanted, self._ram, self.page_count)
        if self._tracker.bitmap is not None:
            _native.workload_set_bitmap(self._vcpus, self._tracker.bitmap)
        return self._tracker

    def clear_soft_dirty(self) -> None:
        """:raise MemoryRefused: another tracker is in use."""
        if self._tracker is None or self._tracker.name is not TrackerName.SOFT_DIRTY:
            raise MemoryRefused("the guest is not tracked by soft-dirty bits")
        self._tracker.arm()

    def stop_tracking(self) -> None:
        if self._tracker is not None:
            _native.workload_set_bitmap(self._vcpus, None)
            self._tracker.close()
            self._tracker = None

    # -- what the vCPUs dirty, beside a migration ------------------------------------------------

    def start_counting(self) -> None:
        """Call every page clean, to count what is written from now on.

        :raise MemoryRefused: a migration tracks the guest, or nothing cheap enough works here."""
        if self._tracker is not None:
            raise MemoryRefused("the guest's writes are tracked for a migration")
        self._check_whole()
        self.stop_counting()
        counter = open_tracker(None, self._ram, self.page_count)
        if counter.name is TrackerName.HASH:
            counter.close()
            raise MemoryRefused(f"nothing tells which pages are written: {counter.reason}")
        if counter.bitmap is not None:
            _native.workload_set_bitmap(self._vcpus, counter.bitmap)
        counter.arm()
        self._counter = counter

    def count_written(self) -> int:
        """End the counting; return the pages that were written meanwhile.

        :raise MemoryRefused: a migration has ended it before."""
        if self._counter is None:
            raise MemoryRefused("a migration has begun to track the guest's writes")
        try:
            return count_written(self._counter, self.page_count)
        finally:
            self.stop_counting()

    def stop_counting(self) -> None:
        if self._counter is not None:
            _native.workload_set_bitmap(self._vcpus, None)
            self._counter.close()
            self._counter = None

    def count_dirty(self, is_counting: bool) -> None:
        """Have each vCPU count what it dirties, or not."""
        self._is_counting_dirty = is_counting
        self._apply_dirtying()

    def limit_dirty(self, vcpu: int | None, bytes_per_s: int) -> None:
        """Limit what a vCPU, or each, dirties; 0 is no limit.

        :raise GuestError: there is no such vCPU."""
        if vcpu is not None and vcpu >= self.options.vcpus:
            raise GuestError(f"there is no vCPU {vcpu}; the guest has {self.options.vcpus}")
        for index in range(self.options.vcpus) if vcpu is None else (vcpu,):
            self._limits[index] = bytes_per_s
        self._apply_dirtying()

    def dirtied(self) -> list[tuple[int, int]]:
        """For each vCPU: pages dirtied while that was counted, and ns slept for its limit."""
        return _native.workload_dirtied(self._vcpus)

    def times(self) -> tuple[list[tuple[int, int]], int]:
        """How long writes took in this process, in buckets, and the longest; see messages.Times."""
        return _native.workload_times(self._vcpus)

    def _apply_dirtying(self) -> None:
        _native.workload_count_dirty(self._vcpus, self._is_counting_dirty)
        for index, bytes_per_s in self._limits.items():
            if index < self.options.vcpus:
                _native.workload_limit_dirty(self._vcpus, index, bytes_per_s)

    def go_free(self) -> None:
        """Take back whatever a control process has put upon the vCPUs."""
        self.stop_tracking()
        self.stop_counting()
        self.throttle(0)
        self.count_dirty(False)
        self.limit_dirty(None, 0)

    # -- missing pages ---------------------------------------------------------------------------

    @property
    def is_missing_open(self) -> bool:
        return self.missing_fd >= 0

    def _check_whole(self) -> None:
        """A mapping has one userfaultfd, and no tracker sees what is placed behind the guest."""
        if self.is_missing_open:
            raise MemoryRefused(
                "what the guest writes cannot be told while pages of it are missing; wait for the "
                "end of its postcopy migration"
            )

    def open_missing(self) -> int:
        """From now on who touches a missing page waits; return the userfaultfd, which stays ours.
        Ends tracking and counting. Idempotent.

        :raise MemoryRefused: no userfaultfd here, or not for this memory."""
        if not self.is_missing_open:
            self.stop_tracking()
            self.stop_counting()
            self.missing_fd = open_missing([self._ram])
        return self.missing_fd

    def close_missing(self) -> None:
        """Missing pages read as zero; who waits for one goes on, whoever else has the userfaultfd.
        Idempotent."""
        if self.is_missing_open:
            _native.uffd_unregister(self.missing_fd, self.address, self.size)
            os.close(self.missing_fd)
            self.missing_fd = -1

    @property
    def address(self) -> int:
        """Of RAM in this process."""
        return _native.mapping_address(self._ram)

    # -- contents --------------------------------------------------------------------------------

    def fill(self) -> None:
        """Write the initial contents, on all CPUs but at most four.

        :raise Ended: the guest was told to end."""
        count = min(4, os.cpu_count() or 1, -(-self.page_count // PIECE_PAGES))
        threads = [threading.Thread(target=self._fill_part, args=(i, count)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._ended.is_set():
            raise Ended

    def _fill_part(self, index: int, count: int) -> None:
        for first in range(index * PIECE_PAGES, self.page_count, count * PIECE_PAGES):
            if self._ended.is_set():
                return
            pages = min(PIECE_PAGES, self.page_count - first)
            options = self.options
            _native.workload_fill(self._ram, first, pages, options.contents, options.seed)

    def judge(self, is_given_up: Callable[[], bool] = lambda: False) -> Judgement:
        """Judge every page; only while paused. Holes are not touched, unless they are missing
        pages: then each is waited for.

        :param is_given_up: nobody wants the judgement any more.
        :return: without the vCPUs' writes; the caller owns its descriptor.
        :raise Ended: the guest was told to end, or the judgement was given up."""
        with contextlib.ExitStack() as undo:
            counters_fd = os.memfd_create("ramferry-counters", os.MFD_CLOEXEC)
            undo.callback(os.close, counters_fd)
            os.ftruncate(counters_fd, 8 * self.page_count)
            judgement = Judgement(0, -1, 0, 0, counters_fd)
            with (
                mmap.mmap(counters_fd, 8 * self.page_count) as mapping,
                memoryview(mapping) as whole,
                whole.cast("Q") as counters,
            ):
                for first, pages, is_data in self._pieces():
                    with counters[first : first + pages] as part:
                        judgement = self._judge_piece(judgement, first, is_data, part)
                    if self._ended.is_set() or is_given_up():
                        raise Ended
            undo.pop_all()
        return judgement

    def _judge_piece(
        self, before: Judgement, first: int, is_data: bool, counters: memoryview
    ) -> Judgement:
        contents, seed, pages = self.options.contents, self.options.seed, len(counters)
        if is_data:
            wrong, first_wrong = _native.workload_judge(
                self._ram, first, pages, contents, seed, counters
            )
            page_writes = sum(counters) - wrong * WRONG
        else:
            wrong, first_wrong = _native.workload_judge_hole(first, pages, contents, seed, counters)
            page_writes = 0
        return dataclasses.replace(
            before,
            wrong_pages=before.wrong_pages + wrong,
            first_wrong=before.first_wrong if before.first_wrong >= 0 else first_wrong,
            page_writes_sum=before.page_writes_sum + page_writes,
        )

    def _pieces(self) -> Iterator[tuple[int, int, bool]]:
        """All of RAM in pieces: first page, pages, and whether they are data (else a hole)."""
        offset, has_holes = 0, not self.is_missing_open
        is_data = not has_holes
        while offset < self.size:
            end = self._end_of_piece(offset, is_data) if has_holes else self.size
            for first in range(offset // PAGE_SIZE, end // PAGE_SIZE, PIECE_PAGES):
                yield first, min(PIECE_PAGES, end // PAGE_SIZE - first), is_data
            offset, is_data = end, not is_data

    def _end_of_piece(self, offset: int, is_data: bool) -> int:
        try:
            return os.lseek(self.ram_fd, offset, os.SEEK_HOLE if is_data else os.SEEK_DATA)
        except OSError:  # ENXIO: no data any more
            return self.size

    # -- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        """Have vCPUs, `fill` and `judge` stop soon, also where they wait for a missing page: the
        RAM is not worth anything afterwards."""
        self._ended.set()
        _native.workload_end(self._vcpus)
        self.close_missing()

    def close(self) -> None:
        """Stop the vCPUs and give RAM back; nothing may run in another thread any more."""
        self.end()
        self.stop_tracking()
        self.stop_counting()
        _native.workload_stop(self._vcpus)
        del self._vcpus  # holds the mapping
        with contextlib.suppress(BufferError):
            self._ram.close()
        os.close(self.ram_fd)
