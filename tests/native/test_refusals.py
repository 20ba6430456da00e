"""Whatever does not fit is a ValueError of one line, before a byte is touched."""

from __future__ import annotations

import ast
import contextlib
import inspect
import mmap
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine import _native
from tests.native.support import PAGE, table_of
from tests.support import eventually

SLICE = (128, 64, 0, 1)
RUN = table_of([(0, 1)])


def words(count: int = 2) -> bytearray:
    return bytearray(8 * count)


def odd() -> memoryview:
    """Writable memory of two words that is not aligned to words."""
    return memoryview(bytearray(17))[1:]


def ram(pages: int = 128) -> mmap.mmap:
    return mmap.mmap(-1, pages * PAGE)


CACHE = _native.delta_cache_new([SLICE], 2)
PAGES_OUT = (bytearray(PAGE), words(1), bytearray(4097), words(1))


def deltas_out(index: int, size: int) -> tuple[bytearray, ...]:
    """The outputs of a delta batch of one page, one of them of another size."""
    return (*PAGES_OUT[:index], bytearray(size), *PAGES_OUT[index + 1 :])


CASES: list[tuple[str, tuple[Any, ...], str]] = [
    ("zero_scan", ("scalar", bytes(PAGE), words(), PAGE), "16 flags do not fit 4096 bytes"),
    ("zero_scan", ("scalar", bytes(PAGE), bytearray(1), 0), "page size 0"),
    ("zero_scan", ("scalar", bytes(PAGE), bytearray(1), 100), "page size 100"),
    ("zero_scan", ("scalar", bytes(PAGE + 1), bytearray(1), PAGE), "1 flags do not fit"),
    ("zero_scan", ("scalar", bytes(PAGE), bytearray(1), -1), "-1 is not in the range"),
    ("bitmap_set_range", (words(), 128, 1), "bitmap of 16 bytes .* 129 pages"),
    ("bitmap_set_range", (words(), 0, 2**64 - 1), "beyond the 2\\*\\*32"),
    ("bitmap_set_range", (words(), 2**64 - 1, 2), "beyond the 2\\*\\*32"),
    ("bitmap_set_range", (words(), -1, 2), "-1 is not in the range"),
    ("bitmap_set_range", (words(), 0, 2**64), "is not in the range"),
    ("bitmap_set_range", (odd(), 0, 1), "bitmap is not aligned to 8 bytes"),
    ("bitmap_set_range", (bytearray(15), 0, 1), "bitmap of 15 bytes is not whole 64-bit words"),
    ("bitmap_count", (words(1), SLICE), "bitmap of 8 bytes"),
    ("bitmap_count", (words(), (128, 63, 0, 1)), "is impossible"),
    ("bitmap_count", (words(), (128, 0, 0, 1)), "is impossible"),
    ("bitmap_count", (words(), (128, 64, 1, 1)), "is impossible"),
    ("bitmap_count", (words(), (128, 64, 0, 0)), "is impossible"),
    ("bitmap_count", (words(), (128, 64, 0, 2**16 + 1)), "is impossible"),
    ("bitmap_count", (words(), (2**32 + 1, 64, 0, 1)), "is impossible"),
    ("bitmap_count", (words(), (-1, 64, 0, 1)), "-1 is not in the range"),
    ("bitmap_clear_slice", (odd(), SLICE), "not aligned"),
    ("bitmap_clear_slice", (words(1), SLICE), "bitmap of 8 bytes"),
    ("bitmap_move_slice", (words(1), words(), SLICE), "source bitmap of 8 bytes"),
    ("bitmap_move_slice", (words(), words(1), SLICE), "target bitmap of 8 bytes"),
    ("bitmap_set_data", (0, 1, PAGE, words()), "offset 1 is not a multiple"),
    ("bitmap_set_data", (0, 0, 1, words()), "size 1 is not a multiple"),
    ("bitmap_set_data", (0, 0, 200 * PAGE, words()), "bitmap of 16 bytes"),
    ("bitmap_set_data", (0, -PAGE, PAGE, words()), "is not in the range"),
    ("bitmap_set_data", (0, 2**63 - PAGE, 2 * PAGE, words()), "reach beyond"),
    ("bitmap_set_data", (2**31, 0, PAGE, words()), "does not fit a C int"),
    ("take_batch", (ram(127), words(), words(), SLICE, 0, 1, True, words(), words()), "ram of"),
    ("take_batch", (ram(), words(1), words(), SLICE, 0, 1, True, words(), words()), "dirty"),
    ("take_batch", (ram(), words(), words(1), SLICE, 0, 1, True, words(), words()), "in_flight"),
    ("take_batch", (ram(), words(), words(), SLICE, 129, 1, True, words(), words()), "cursor 129"),
    ("take_batch", (ram(), words(), words(), SLICE, 0, 0, True, words(), words()), "pages_max"),
    ("take_batch", (ram(), words(), words(), SLICE, 0, 1, True, words(0), words()), "data_runs"),
    ("take_batch", (ram(), words(), words(), SLICE, 0, 1, True, words(), words(0)), "zero_runs"),
    ("gather", (bytes(PAGE), table_of([(0, 2)]), 1), "run 0, 2 pages from page 0"),
    ("gather", (bytes(2 * PAGE - 1), table_of([(0, 2)]), 1), "run 0"),
    ("gather", (bytes(PAGE), RUN, 2), "run table of 8 bytes does not hold 2 runs"),
    ("gather", (bytes(PAGE), RUN, 2**64 - 1), "does not hold"),
    ("gather", (bytes(PAGE), RUN, 1, 2), "plane_runs is 2 of 1 runs"),
    ("split_compressible", (bytes(PAGE), RUN, 2, words()), "run table of 8 bytes does not hold 2"),
    ("split_compressible", (bytes(PAGE - 1), RUN, 1, words()), "run 0"),
    (
        "split_compressible",
        (ram(), table_of([(0, 3)]), 1, words()),
        "no room for 8 bytes of each of 3",
    ),
    ("split_compressible", (bytes(513 * PAGE), table_of([(0, 513)]), 1, words(513)), "at most 512"),
    ("xbzrle_encode", ("fastest", bytes(PAGE), bytes(PAGE), words()), "'fastest' is not known"),
    ("xbzrle_encode", ("scalar", bytes(PAGE - 1), bytes(PAGE), words()), "old_page of 4095 bytes"),
    ("xbzrle_encode", ("scalar", bytes(PAGE), bytes(PAGE + 1), words()), "new_page of 4097 bytes"),
    ("delta_cache_new", ([SLICE], 3), "a cache of 3 pages; a power of two"),
    ("delta_cache_new", ([SLICE], 0), "a cache of 0 pages"),
    ("delta_cache_new", ([SLICE], 2**33), "a cache of 8589934592 pages"),
    ("delta_cache_new", ([(128, 63, 0, 1)], 1), "is impossible"),
    ("delta_cache_resize", (CACHE, 5), "a cache of 5 pages"),
    ("delta_cache_get", (CACHE, 1, 0), "the cache knows no block 1"),
    ("delta_cache_get", (CACHE, 0, 128), "page 128 is not within 128"),
    ("delta_cache_set_zero", (CACHE, 2**64 - 1, 1, RUN, 1), "knows no block"),
    ("delta_cache_set_zero", (CACHE, 0, 2**63, RUN, 1), "is not in the range"),
    ("delta_cache_set_zero", (CACHE, 0, 1, table_of([(127, 2)]), 1), "run 0"),
    ("delta_batch", (CACHE, 1, 1, ram(), RUN, 1, 4094, *PAGES_OUT), "knows no block"),
    ("delta_batch", (CACHE, 0, 1, ram(127), RUN, 1, 4094, *PAGES_OUT), "ram of"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN, 2, 4094, *PAGES_OUT), "does not hold 2 runs"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN, 1, 0, *PAGES_OUT), "delta_bytes_max 0"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN, 1, 4095, *PAGES_OUT), "delta_bytes_max 4095"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN * 513, 513, 9, *PAGES_OUT), "at most 512"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN, 1, 4094, *deltas_out(0, PAGE - 1)), "full_pages of"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN, 1, 4094, *deltas_out(1, 7)), "full_runs of"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN, 1, 4094, *deltas_out(2, 4095)), "deltas of"),
    ("delta_batch", (CACHE, 0, 1, ram(), RUN, 1, 4094, *deltas_out(3, 7)), "delta_runs of"),
    ("delta_apply", (ram(127), words(), b"", RUN, 0, 128), "ram of"),
    ("delta_apply", (ram(), words(1), b"", RUN, 0, 128), "placed bitmap"),
    ("delta_apply", (ram(), words(), b"", table_of([(128, 1)]), 1, 128), "run 0"),
    ("delta_apply", (ram(), words(), b"", RUN, 1, 128), "delta 0 of 1 is wrong"),
    ("delta_apply", (memoryview(ram())[8:], words(), b"", RUN, 0, 1), "not aligned"),
    ("hash_pages", (bytes(PAGE), 1, bytearray(15), RUN, 1), "run 0"),
    ("hash_pages", (bytes(PAGE - 1), 1, bytearray(16), RUN, 1), "pages of 4095 bytes"),
    ("hash_pages", (bytes(PAGE), 2**64, bytearray(16), RUN, 1), "is not in the range"),
    ("gather_changed", (ram(1), 1, words(), words(), RUN, 2, *PAGES_OUT[:2]), "not hold 2 runs"),
    (
        "gather_changed",
        (ram(1), 1, words(), words(), table_of([(1, 1)]), 1, *PAGES_OUT[:2]),
        "run 0",
    ),
    ("gather_changed", (ram(2), 1, words(), words(), RUN, 1, *PAGES_OUT[:2]), "hashes of 16 bytes"),
    ("gather_changed", (ram(1), 1, words(), odd(), RUN, 1, *PAGES_OUT[:2]), "known bitmap"),
    ("gather_changed", (ram(65), 1, words(130), words(1), RUN, 1, *PAGES_OUT[:2]), "known bitmap"),
    ("gather_changed", (ram(1), 1, words(), words(), RUN, 1, words(1), words(1)), "out_pages of 8"),
    (
        "gather_changed",
        (ram(1), 1, words(), words(), RUN, 1, *deltas_out(1, 7)[:2]),
        "out_runs of 7",
    ),
    ("forget_pages", (words(1), table_of([(63, 2)]), 1), "run 0"),
    ("forget_pages", (odd(), RUN, 1), "known bitmap is not aligned"),
    ("hash_scan", (ram(127), 1, bytes(2048), words(), words(), SLICE), "ram of"),
    ("hash_scan", (ram(), 1, bytes(2047), words(), words(), SLICE), "hashes of 2047 bytes"),
    ("hash_scan", (ram(), 1, bytes(2048), words(1), words(), SLICE), "candidates bitmap"),
    ("hash_scan", (ram(), 1, bytes(2048), words(), words(1), SLICE), "dirty bitmap"),
    ("pagemap_scan", (0, 1, words(), SLICE), "address 1 is not a multiple"),
    ("pagemap_scan", (0, 0, words(1), SLICE), "bitmap of 8 bytes"),
    ("pagemap_peek", (0, 1, words(), SLICE), "address 1 is not a multiple"),
    ("pagemap_peek", (0, 0, words(1), SLICE), "bitmap of 8 bytes"),
    ("soft_dirty_scan", (0, 1, words(), SLICE), "address 1 is not a multiple"),
    ("soft_dirty_scan", (0, 2**64, words(), SLICE), "is not in the range"),
    ("soft_dirty_scan", (0, 2**63 - PAGE, words(), SLICE), "reaches beyond"),
    ("uffd_register", (0, 1, PAGE, 1), "address 1 is not a multiple"),
    ("uffd_register", (0, 0, 1, 1), "size 1 is not a multiple"),
    ("uffd_unregister", (0, 1, PAGE), "address 1 is not a multiple"),
    ("uffd_unregister", (0, 0, 1), "size 1 is not a multiple"),
    ("place", (-1, 0, ram(127), words(), bytes(PAGE), RUN, 1, 128), "ram of"),
    ("place", (-1, 0, ram(), words(1), bytes(PAGE), RUN, 1, 128), "placed bitmap"),
    ("place", (-1, 0, ram(), words(), bytes(PAGE), RUN, 2, 128), "does not hold 2 runs"),
    ("place", (-1, 0, ram(), words(), bytes(1), RUN, 1, 128), "payload of 1 bytes"),
    ("place", (3, 1, ram(), words(), bytes(PAGE), RUN, 1, 128), "fresh_address 1"),
    ("place", (3, 0, ram(), words(), bytes(PAGE), RUN, 1, 128), "fresh_address is 0"),
    ("place", (-1, 0, memoryview(ram())[8:], words(), bytes(PAGE), RUN, 1, 1), "not aligned"),
    ("place", (-1, 0, ram(), words(), bytes(PAGE), RUN, 1, 2**40), "more than the 2\\*\\*32"),
    ("clear", (ram(127), words(), RUN, 1, 128), "ram of"),
    ("clear", (ram(), words(1), RUN, 1, 128), "placed bitmap"),
    ("clear", (ram(), words(), table_of([(128, 1)]), 1, 128), "run 0"),
    ("budget_take", (words(1), 1, 1, 1), "budget of 8 bytes"),
    ("budget_take", (memoryview(bytearray(25))[1:], 1, 1, 1), "budget is not aligned"),
    ("budget_take", (words(2), 1, 1, 1), "budget of 16 bytes"),
    ("budget_set_rate", (words(2), 1, 1), "budget of 16 bytes"),
    ("packet_runs_check", (bytes(9), 0, 0, 0, b"", 128, 1), "data_runs of 9 bytes is not whole"),
    ("packet_runs_check", (RUN, 0, 0, 2, b"", 128, 1), "0 of 1 runs are encoded, 0 of .* 2 gath"),
    ("packet_runs_check", (RUN, 0, 1, 1, b"", 128, 1), "1 of 1 runs are encoded, 0 of .* 1 gath"),
    ("packet_runs_check", (RUN, 0, 2**63, 2**63, b"", 128, 1), "runs are encoded"),
    ("packet_runs_check", (RUN, 1, 0, 0, b"", 128, 1), "1 of these as planes"),
    ("packet_runs_check", (RUN, 0, 0, 0, b"", 2**40, 1), "more than the 2\\*\\*32"),
    ("packet_runs_check", (RUN, 0, 0, 0, b"", 128, 0), "units of 0 pages"),
    ("restore_planes", (bytes(PAGE - 1), 1), "planes of 4095 bytes"),
    ("restore_planes", (bytes(PAGE), 2**63), "more than the 2\\*\\*32"),
    ("discard_stale", (-1, words(1), words(), 128, 1), "received of 8 bytes"),
    ("discard_stale", (-1, words(), words(1), 128, 1), "stale of 8 bytes"),
    ("discard_stale", (-1, words(), words(), 128, 0), "units of 0 pages"),
    ("bitmap_widen", (words(), 128, 0), "units of 0 pages"),
    ("pagemap_scan", (0, 0, words(), SLICE, 2**40), "beyond the 2\\*\\*32"),
    ("budget_take", (words(), -1, 1, 1), "-1 is not in the range"),
    ("punch_hole", (0, -1, 1), "-1 is not in the range"),
    ("workload_fill", (ram(1), 0, 2, "text", 1), "ram of"),
    ("workload_fill", (ram(1), 1, 1, "text", 1), "ram of"),
    ("workload_fill", (ram(1), 2**64 - 1, 2, "text", 1), "beyond the 2\\*\\*32"),
    ("workload_fill", (ram(1), -1, 1, "text", 1), "-1 is not in the range"),
    ("workload_fill", (ram(1), 0, 1, "txt", 1), "contents 'txt'; allowed: zero, text, heap"),
    ("workload_fill", (ram(1), 0, 1, "", 1), "contents ''"),
    ("workload_fill", (ram(1), 0, 1, "text", 2**64), "is not in the range"),
    ("workload_fill", (memoryview(bytearray(PAGE + 1))[1:], 0, 1, "text", 1), "ram is not aligned"),
    ("workload_judge", (bytes(PAGE), 0, 2, "text", 1, words()), "ram of"),
    ("workload_judge", (bytes(PAGE), 2**32, 1, "text", 1, words()), "beyond the 2\\*\\*32"),
    ("workload_judge", (bytes(2 * PAGE), 0, 2, "text", 1, words(1)), "counters of 8 bytes"),
    ("workload_judge", (bytes(PAGE), 0, 1, "text", 1, odd()), "counters is not aligned"),
    ("workload_judge", (bytes(PAGE), 0, 1, "mix", 1, words()), "contents 'mix'"),
    ("workload_judge_hole", (0, 3, "text", 1, words()), "counters of 16 bytes"),
    ("workload_judge_hole", (2**64 - 1, 2, "text", 1, words()), "beyond the 2\\*\\*32"),
    ("workload_judge_hole", (0, 1, "text", 1, odd()), "counters is not aligned"),
    ("workload_judge_hole", (0, 1, "none", 1, words()), "contents 'none'"),
    ("workload_start", (ram(1), 2, 1, "sweep", 0, 8, 1, None), "ram of"),
    ("workload_start", (ram(1), 2**64 - 1, 1, "sweep", 0, 8, 1, None), "ram of|2\\*\\*32"),
    ("workload_start", (ram(1), 0, 1, "sweep", 0, 8, 1, None), "1 vcpus on 0 pages"),
    ("workload_start", (ram(1), 1, 0, "sweep", 0, 8, 1, None), "0 vcpus on 1 pages"),
    ("workload_start", (ram(1), 1, 2, "sweep", 0, 8, 1, None), "2 vcpus on 1 pages"),
    ("workload_start", (ram(), 128, 65, "sweep", 0, 8, 1, None), "65 vcpus on 128 pages"),
    ("workload_start", (ram(), 128, 2**32 + 1, "sweep", 0, 8, 1, None), "4294967297 vcpus"),
    ("workload_start", (ram(1), 1, 1, "sweep", 0, 509, 1, None), "509 words a write"),
    ("workload_start", (ram(1), 1, 1, "swoop", 0, 8, 1, None), "pattern 'swoop'; allowed: sweep"),
    ("workload_start", (ram(1), 1, 1, "sweep", -1, 8, 1, None), "-1 is not in the range"),
    ("workload_start", (ram(), 128, 1, "sweep", 0, 8, 1, words(1)), "written bitmap of 8 bytes"),
    ("workload_start", (ram(1), 1, 1, "sweep", 0, 8, 1, odd()), "written bitmap is not aligned"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), CASES, ids=[case[0] for case in CASES])
def test_what_does_not_fit_is_refused(name: str, arguments: tuple[Any, ...], message: str) -> None:
    function: Callable[..., object] = getattr(_native, name)

    with pytest.raises(ValueError, match=message) as caught:
        function(*arguments)

    assert "\n" not in str(caught.value)
    for argument in arguments:
        if isinstance(argument, bytearray | mmap.mmap):
            assert not any(argument[:])


def test_read_only_memory_and_wrong_types_are_type_errors() -> None:
    with pytest.raises((TypeError, BufferError)):
        _native.bitmap_set_range(bytes(8), 0, 1)
    with pytest.raises((TypeError, BufferError)):
        _native.mapping_address(bytes(8))
    with pytest.raises(TypeError):
        _native.bitmap_count(words(), (128, 64, 0))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _native.bitmap_set_range(words(), 0.5, 1)  # type: ignore[arg-type]


def test_buffers_are_given_back_after_success_and_refusal() -> None:
    bitmap = words()
    _native.bitmap_set_range(bitmap, 0, 1)
    with pytest.raises(ValueError, match="bitmap of"):
        _native.bitmap_set_range(bitmap, 0, 1000)
    with pytest.raises(ValueError, match="range"):
        _native.bitmap_set_range(bitmap, 0, -1)

    bitmap.clear()  # BufferError if anybody still held it

    assert len(bitmap) == 0


@contextlib.contextmanager
def workload(vcpus: int = 2) -> Iterator[_native.Workload]:
    """A paused workload over 128 pages, stopped afterwards."""
    made = _native.workload_start(ram(), 128, vcpus, "sweep", 0, 8, 7, None)
    try:
        yield made
    finally:
        _native.workload_stop(made)


@pytest.mark.parametrize(
    ("bitmap", "message"),
    [
        (words(1), "written bitmap of 8 bytes"),
        (odd(), "written bitmap is not aligned"),
        (bytearray(17), "written bitmap of 17 bytes is not whole 64-bit words"),
    ],
)
def test_a_written_bitmap_that_does_not_fit_is_refused_and_the_old_one_stays(
    bitmap: bytearray | memoryview, message: str
) -> None:
    old = words()
    with workload() as guest:
        _native.workload_set_bitmap(guest, old)
        with pytest.raises(ValueError, match=message):
            _native.workload_set_bitmap(guest, bitmap)
        _native.workload_resume(guest)
        assert eventually(lambda: any(old))
        _native.workload_set_bitmap(guest, None)
    bitmap.release() if isinstance(bitmap, memoryview) else bitmap.clear()
    old.clear()  # BufferError if it were still held


def test_a_written_bitmap_that_cannot_be_written_is_a_type_error() -> None:
    with workload() as guest:
        for bitmap in (bytes(16), 7, "16 bytes"):
            with pytest.raises((TypeError, BufferError)):
                _native.workload_set_bitmap(guest, bitmap)  # type: ignore[arg-type]


@pytest.mark.parametrize("percent", [-1, 100, 2**31 - 1])
def test_a_throttle_out_of_range_is_refused(percent: int) -> None:
    with workload() as guest, pytest.raises(ValueError, match=f"throttle of {percent} percent"):
        _native.workload_throttle(guest, percent)


@pytest.mark.parametrize("vcpu", [-1, 64, 2**31 - 1])
def test_a_limit_for_a_vcpu_that_is_not_there_is_refused(vcpu: int) -> None:
    with workload() as guest, pytest.raises(ValueError, match=f"there is no vCPU {vcpu}"):
        _native.workload_limit_dirty(guest, vcpu, 1)


def sealed(state: bytes) -> bytes:
    """A state with the right checksum (FNV-1a of all before it), whatever it says."""
    value = 0xCBF29CE484222325
    for byte in state[:-8]:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return state[:-8] + struct.pack("<Q", value)


def test_every_damaged_device_state_is_refused_and_changes_nothing() -> None:
    with workload() as guest, workload() as other:
        _native.workload_resume(other)
        assert eventually(lambda: min(_native.workload_writes(other)) > 10)
        _native.workload_pause(other, 20_000_000_000)
        state = _native.workload_save(other)
        before = _native.workload_save(guest)
        for position in range(len(state)):
            damaged = bytearray(state)
            damaged[position] ^= 0x41
            with pytest.raises(ValueError, match=r"workload state: its (magic|checksum)"):
                _native.workload_load(guest, bytes(damaged))
            with pytest.raises(ValueError, match="its length"):
                _native.workload_load(guest, state[:position])
        with pytest.raises(ValueError, match="its length"):
            _native.workload_load(guest, state + b"x")
        assert _native.workload_save(guest) == before
        _native.workload_load(guest, state)
        assert _native.workload_save(guest) == state


#: Offset and new value of a 64-bit word of the state, with a checksum that is right again.
HOSTILE = [
    pytest.param(0, 0, "its magic or version", id="magic"),
    pytest.param(8, 2**64 - 1, "other options", id="page-count"),
    pytest.param(16, 1, "other options", id="rate"),
    pytest.param(24, 8, "other options", id="seed"),
    pytest.param(32, 2**32 - 1, "other options", id="vcpus-and-pattern"),
    pytest.param(40, 509, "other options", id="words-of-a-write"),
    pytest.param(40, 8 | 1 << 32, "other options", id="reserved"),
    pytest.param(48, 64, "cursor lies outside", id="cursor-just-behind"),
    pytest.param(72, 2**64 - 1, "cursor lies outside", id="cursor-of-the-second-vcpu"),
]


@pytest.mark.parametrize(("offset", "value", "message"), HOSTILE)
def test_a_hostile_device_state_with_a_right_checksum_is_refused(
    offset: int, value: int, message: str
) -> None:
    with workload() as guest:
        before = _native.workload_save(guest)
        assert sealed(before) == before
        hostile = bytearray(before)
        struct.pack_into("<Q", hostile, offset, value)
        with pytest.raises(ValueError, match=message) as refused:
            _native.workload_load(guest, sealed(bytes(hostile)))
        assert "\n" not in str(refused.value)
        assert _native.workload_save(guest) == before


def test_device_state_of_a_running_guest_is_neither_saved_nor_loaded() -> None:
    with workload() as guest:
        state = _native.workload_save(guest)
        _native.workload_resume(guest)
        with pytest.raises(OSError, match="busy"):
            _native.workload_save(guest)
        with pytest.raises(OSError, match="busy"):
            _native.workload_load(guest, state)


def test_the_module_and_its_stub_have_the_same_names() -> None:
    stub = inspect.getfile(_native).rpartition("/")[0] + "/_native.pyi"
    with open(stub) as text:
        body = ast.parse(text.read()).body
    declared = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    declared |= {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }

    assert declared == {name for name in vars(_native) if not name.startswith("__")}
