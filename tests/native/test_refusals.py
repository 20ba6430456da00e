"""Whatever does not fit is a ValueError of one line, before a byte is touched."""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable
from typing import Any

import pytest

from engine import _native
from tests.native.support import PAGE, table_of

SLICE = (128, 64, 0, 1)
RUN = table_of([(0, 1)])


def words(count: int = 2) -> bytearray:
    return bytearray(8 * count)


def odd() -> memoryview:
    """Writable memory of two words that is not aligned to words."""
    return memoryview(bytearray(17))[1:]


def ram(pages: int = 128) -> mmap.mmap:
    return mmap.mmap(-1, pages * PAGE)


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
    ("hash_pages", (bytes(PAGE), 1, bytearray(15), RUN, 1), "run 0"),
    ("hash_pages", (bytes(PAGE - 1), 1, bytearray(16), RUN, 1), "pages of 4095 bytes"),
    ("hash_pages", (bytes(PAGE), 2**64, bytearray(16), RUN, 1), "is not in the range"),
    ("hash_scan", (ram(127), 1, bytes(2048), words(), words(), SLICE), "ram of"),
    ("hash_scan", (ram(), 1, bytes(2047), words(), words(), SLICE), "hashes of 2047 bytes"),
    ("hash_scan", (ram(), 1, bytes(2048), words(1), words(), SLICE), "candidates bitmap"),
    ("hash_scan", (ram(), 1, bytes(2048), words(), words(1), SLICE), "dirty bitmap"),
    ("pagemap_scan", (0, 1, words(), SLICE), "address 1 is not a multiple"),
    ("pagemap_scan", (0, 0, words(1), SLICE), "bitmap of 8 bytes"),
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
    ("budget_take", (odd(), 1, 1, 1), "budget is not aligned"),
    ("budget_take", (words(), -1, 1, 1), "-1 is not in the range"),
    ("punch_hole", (0, -1, 1), "-1 is not in the range"),
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


def test_the_module_has_what_its_stub_declares() -> None:
    stub = (inspect.getfile(_native).rpartition("/")[0]) + "/_native.pyi"
    with open(stub) as lines:
        declared = {line[4:].partition("(")[0] for line in lines if line.startswith("def ")}

    assert declared <= set(dir(_native))
