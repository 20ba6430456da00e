"""Placing without userfaultfd where the kernel does not let us register."""

from __future__ import annotations

import os

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
