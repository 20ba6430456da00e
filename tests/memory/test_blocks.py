"""What RAM blocks take for granted."""

from __future__ import annotations

import os

import pytest

from engine.errors import MemoryRefused
from engine.memory.blocks import check_page_size


def test_the_page_size_of_this_kernel_is_accepted() -> None:
    check_page_size()


@pytest.mark.parametrize("size", [16384, 65536])
def test_another_page_size_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGESIZE": size}.__getitem__)

    with pytest.raises(MemoryRefused) as refused:
        check_page_size()

    assert str(refused.value) == f"this kernel has pages of {size} bytes; 4096 are needed"
