"""Placing and clearing pages in real memory, with and without userfaultfd, until it is full."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import _native
from tests.kernel import has_userfaultfd
from tests.native.support import PAGE, bitmap_of, pages_in, pages_of, table_of

PAGES = 256


needs_uffd = pytest.mark.skipif(not has_userfaultfd(), reason="no userfaultfd here")


def uffd_for_shared_memory() -> int:
    return _native.uffd_open(_native.UFFD_USER_MODE_ONLY, _native.UFFD_FEATURE_MISSING_SHMEM)


class Destination:
    """RAM to place into, as a receiver has it; owns descriptors and mappings."""

    def __init__(self, fd: int, page_count: int, with_uffd: bool) -> None:
        self.fd, self.page_count = fd, page_count
        os.ftruncate(fd, page_count * PAGE)
        self.ram = mmap.mmap(fd, page_count * PAGE)
        self.fresh = mmap.mmap(fd, page_count * PAGE)
        self.uffd = uffd_for_shared_memory() if with_uffd else -1
        self.address = _native.mapping_address(self.fresh) if self.uffd >= 0 else 0
        self.placed = bitmap_of((), page_count)
        if self.uffd >= 0:
            _native.uffd_register(
                self.uffd, self.address, page_count * PAGE, _native.UFFD_REGISTER_MISSING
            )

    def place(self, payload: bytes, runs: list[tuple[int, int]]) -> tuple[int, int]:
        return _native.place(
            self.uffd, self.address, self.ram, self.placed, payload, table_of(runs), len(runs),
            self.page_count,
        )  # fmt: skip

    def clear(self, runs: list[tuple[int, int]]) -> int:
        return _native.clear(self.ram, self.placed, table_of(runs), len(runs), self.page_count)

    def read(self) -> bytes:
        return os.pread(self.fd, self.page_count * PAGE, 0)

    def close(self) -> None:
        if self.uffd >= 0:
            _native.uffd_unregister(self.uffd, self.address, self.page_count * PAGE)
            os.close(self.uffd)
        self.ram.close()
        self.fresh.close()
        os.close(self.fd)


@pytest.fixture(params=[pytest.param("uffd", marks=needs_uffd), "memcpy"])
def with_uffd(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "uffd")


@pytest.fixture
def destination(with_uffd: bool) -> Iterator[Destination]:
    made = Destination(os.memfd_create("ramferry-test", os.MFD_CLOEXEC), PAGES, with_uffd)
    yield made
    made.close()


run_lists = st.lists(
    st.integers(0, PAGES - 1).flatmap(
        lambda first: st.tuples(st.just(first), st.integers(1, min(90, PAGES - first)))
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(st.tuples(st.booleans(), run_lists, st.integers(0, 2**32)), min_size=1, max_size=6),
    st.sets(st.integers(0, PAGES - 1), max_size=5),
)
def test_any_sequence_of_places_and_clears_leaves_every_page_right(
    with_uffd: bool, steps: list[tuple[bool, list[tuple[int, int]], int]], behind: set[int]
) -> None:
    destination = Destination(os.memfd_create("ramferry-test", os.MFD_CLOEXEC), PAGES, with_uffd)
    try:
        model, placed = bytearray(PAGES * PAGE), set[int]()
        for page in behind:  # somebody wrote before us: UFFDIO_COPY says EEXIST
            destination.ram[page * PAGE] = model[page * PAGE] = 0x5A
        for is_clear, runs, seed in steps:
            pages = pages_in(runs)
            if is_clear:
                assert destination.clear(runs) == sum(page in placed for page in pages)
                for page in placed.intersection(pages):
                    model[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
                continue
            payload = random.Random(seed).randbytes(len(pages) * PAGE)
            fresh, copied = destination.place(payload, runs)
            expected = set(pages) - placed - behind if destination.uffd >= 0 else set()
            assert (fresh, copied) == (len(expected), len(pages) - len(expected))
            placed.update(pages)
            for position, page in enumerate(pages):
                source = payload[position * PAGE : (position + 1) * PAGE]
                model[page * PAGE : (page + 1) * PAGE] = source
        assert destination.read() == model
        assert pages_of(destination.placed) == placed
    finally:
        destination.close()


def test_clearing_holes_allocates_nothing(destination: Destination) -> None:
    assert destination.clear([(0, PAGES)]) == 0
    assert os.fstat(destination.fd).st_blocks == 0


def test_placing_allocates_only_what_was_placed(destination: Destination) -> None:
    destination.place(b"x" * 3 * PAGE, [(10, 1), (200, 2)])
    assert os.fstat(destination.fd).st_blocks * 512 == 3 * PAGE


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([(0, 1), (PAGES, 1)], id="run-behind-the-end"),
        pytest.param([(0, 1), (PAGES - 1, 2)], id="run-over-the-end"),
        pytest.param([(0, 1), (2**32 - 1, 2**32 - 1)], id="run-that-wraps"),
        pytest.param([(0, 1), (5, 0)], id="empty-run"),
    ],
)
def test_a_bad_run_writes_nothing_at_all(
    destination: Destination, runs: list[tuple[int, int]]
) -> None:
    with pytest.raises(ValueError, match=r"run 1, .* is empty or not within 256"):
        destination.place(b"x" * 2 * PAGE, runs)
    with pytest.raises(ValueError, match=r"run 1, .* is empty or not within 256"):
        destination.clear(runs)
    assert os.fstat(destination.fd).st_blocks == 0
    assert not any(destination.placed)


@pytest.mark.parametrize("size", [0, PAGE - 1, PAGE + 1, 2 * PAGE])
def test_a_payload_of_the_wrong_length_writes_nothing(destination: Destination, size: int) -> None:
    with pytest.raises(ValueError, match=f"payload of {size} bytes is not the 1 pages"):
        destination.place(bytes(size), [(3, 1)])
    assert os.fstat(destination.fd).st_blocks == 0


@pytest.fixture
def tiny_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 32 pages."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root; CI runs this as root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    subprocess.run(mount, check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_file_system_is_an_error_and_never_a_signal(
    tiny_tmpfs: Path, with_uffd: bool
) -> None:
    fd = os.open(tiny_tmpfs / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    destination = Destination(fd, PAGES, with_uffd)
    try:
        destination.place(b"a" * 20 * PAGE, [(0, 20)])
        with pytest.raises(OSError, match=r"memory|space") as caught:
            destination.place(b"b" * 50 * PAGE, [(0, 5), (100, 45)])
        assert caught.value.errno in (errno.ENOMEM, errno.ENOSPC)
        marked = pages_of(destination.placed)
        assert set(range(20)) <= marked  # what was there stays, what failed has no bit
        for page in marked - set(range(20)):
            assert destination.read()[page * PAGE : (page + 1) * PAGE] == b"b" * PAGE
        with pytest.raises(OSError, match=r"memory|space"):
            destination.place(b"c" * PAGE * 40, [(150, 40)])
        assert destination.place(b"d" * 20 * PAGE, [(0, 20)]) == (0, 20)
        assert destination.read()[: 20 * PAGE] == b"d" * 20 * PAGE
    finally:
        destination.close()


def test_deltas_on_a_full_file_system_are_an_error_and_never_a_signal(tiny_tmpfs: Path) -> None:
    fd = os.open(tiny_tmpfs / "ram", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    destination = Destination(fd, PAGES, with_uffd=False)
    try:
        with pytest.raises(OSError, match=r"memory|space") as caught:
            _native.delta_apply(
                destination.ram, destination.placed, b"\x03\x00\x00\x01x" * PAGES,
                table_of([(0, PAGES)]), 1, PAGES,
            )  # fmt: skip
        assert caught.value.errno in (errno.ENOMEM, errno.ENOSPC)
        marked = pages_of(destination.placed)
        assert 0 < len(marked) <= 32
        assert all(destination.ram[page * PAGE] == ord("x") for page in marked)
    finally:
        destination.close()


@needs_uffd
def test_registration_errors_carry_the_kernels_errno() -> None:
    uffd = uffd_for_shared_memory()
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            _native.uffd_register(uffd, 0, PAGE, _native.UFFD_REGISTER_MISSING)
        with pytest.raises(OSError, match="Invalid argument"):
            _native.uffd_unregister(uffd, PAGE, 0)
    finally:
        os.close(uffd)
    with pytest.raises(OSError, match="Invalid argument"):
        _native.uffd_open(_native.UFFD_USER_MODE_ONLY, 1 << 62)


@needs_uffd
def test_uffd_descriptors_are_not_inherited_and_do_not_block() -> None:
    uffd = uffd_for_shared_memory()
    try:
        assert not os.get_inheritable(uffd)
        assert not os.get_blocking(uffd)
    finally:
        os.close(uffd)
