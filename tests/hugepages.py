"""Huge pages for the tests that need them, reserved for as long as a test takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

COUNT: Final = 16


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Sixteen of 2 MiB, if the machine can spare them; given back."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    before = int((pool / "nr_hugepages").read_text())
    free = int((pool / "free_hugepages").read_text())
    reserved = free < COUNT
    if reserved:
        try:
            (pool / "nr_hugepages").write_text(str(before + COUNT))
        except OSError:
            pytest.skip("no huge pages, and reserving them needs root")
    try:
        if int((pool / "free_hugepages").read_text()) < COUNT:
            pytest.skip("no huge pages can be reserved here")
        yield
    finally:
        if reserved:
            (pool / "nr_hugepages").write_text(str(before))
