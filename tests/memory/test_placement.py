"""Placing without userfaultfd where the kernel does not let us register."""

from __future__ import annotations

import os
import resource

import pytest

from engine import _native
from engine.memory.bitmaps import PageBitmaps
from engine.memory.blocks import PAGE_SIZE, RamBlock
from engine.memory.placement import Placer
from tests.support import open_descriptors


def test_a_mapping_that_cannot_be_registered_falls_back_to_memcpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_native, "uffd_register", refuse)
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, 64 * PAGE_SIZE)
    block = RamBlock("ram", 64 * PAGE_SIZE, fd)
    placed = PageBitmaps.create("placed", [block])
    before = open_descriptors()

    placer = Placer([block], placed)

    assert placer.method == "memcpy"
    runs = memoryview((5).to_bytes(4, "little") + (1).to_bytes(4, "little"))
    placer.place(0, memoryview(b"x" * PAGE_SIZE), runs, 1)
    assert os.pread(fd, PAGE_SIZE, 5 * PAGE_SIZE) == b"x" * PAGE_SIZE
    placer.close()
    assert open_descriptors() == before
    placed.close()
    os.close(fd)


def test_a_page_that_is_placed_again_costs_no_fault_of_its_own() -> None:
    page_count = 4096
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, page_count * PAGE_SIZE)
    block = RamBlock("ram", page_count * PAGE_SIZE, fd)
    placed = PageBitmaps.create("placed", [block])
    placer = Placer([block], placed)
    if placer.method == "memcpy":
        pytest.skip("fresh pages are populated through the mapping that all others use")
    runs = memoryview(bytes(4) + page_count.to_bytes(4, "little"))
    assert placer.place(0, memoryview(b"x" * block.size), runs, 1) == page_count
    payload = memoryview(b"y" * block.size)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    placer.place(0, payload, runs, 1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert faults < page_count // 8, "one in 16 pages, and the kernel maps those around"
    assert os.pread(fd, block.size, 0) == payload
    placer.close()
    placed.close()
    os.close(fd)
