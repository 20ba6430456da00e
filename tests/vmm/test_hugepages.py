"""RAM in a hugetlbfs: a huge page is tracked and moved as one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hugepages import huge_pages
from tests.support import eventually
from tests.vmm import test_back_ends, test_postcopy
from tests.vmm.back_end import back_end, writes
from tests.vmm.machines import needs_qemu, vm
from tests.vmm.postcopy_rig import lacks_pages
from tests.vmm.test_end_to_end import is_let_go, migrate

pytestmark = [pytest.mark.guest, pytest.mark.process, needs_qemu]
__all__ = ["huge_pages"]


@pytest.fixture
def hugetlbfs(tmp_path: Path, huge_pages: None) -> Iterator[Path]:
    """One with room for two guests."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root; CI runs this as root")
    mount = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(tmp_path)]
    subprocess.run(mount, check=True, timeout=20)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=20)


def memory(path: Path) -> list[str]:
    backend = f"memory-backend-file,id=ram0,size=64M,mem-path={path},share=on"
    return ["-m", "64", "-object", backend, "-machine", "memory-backend=ram0"]


@pytest.mark.parametrize("is_named", [True, False], ids=["file", "directory"])
def test_a_guest_on_huge_pages_arrives(hugetlbfs: Path, is_named: bool) -> None:
    """QEMU makes a file without a name in a directory: it is found by its address."""
    paths = [hugetlbfs / name if is_named else hugetlbfs for name in ("source", "destination")]
    waiting = vm("-incoming", "defer", memory=memory(paths[1]))
    with vm(memory=memory(paths[0])) as source, waiting as destination:
        assert eventually(lambda: source.rounds() > 2)

        result = asyncio.run(migrate(source, destination, stands=is_named))

        if is_named:
            assert paths[0].read_bytes() == paths[1].read_bytes()
            destination.monitor.ask("cont")
        assert result.tracker == "uffd-wp"
        assert is_let_go(source)
        assert destination.goes_on()
    for path in paths:
        if is_named:
            path.unlink()


def test_what_a_back_end_writes_on_huge_pages_arrives(hugetlbfs: Path) -> None:
    """Its mappings are of huge pages, too."""
    paths = [hugetlbfs / name for name in ("source", "destination")]
    with (
        tempfile.TemporaryDirectory() as sockets,
        back_end(Path(sockets) / "source") as found,
        back_end(Path(sockets) / "destination") as other,
        vm(*found.options, memory=memory(paths[0])) as source,
        vm(*other.options, "-incoming", "defer", memory=memory(paths[1])) as destination,
    ):
        assert eventually(lambda: source.rounds() > 2)
        assert writes(paths[0])

        named = f"{source.spec},vhost-user={found.pid}"
        asyncio.run(test_back_ends.migrate(named, destination.spec))

        assert paths[0].read_bytes() == paths[1].read_bytes()
        destination.monitor.ask("cont")
        assert destination.goes_on()
        assert writes(paths[1])
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("rounds", [0, 1], ids=["postcopy", "hybrid"])
def test_a_guest_on_huge_pages_runs_before_they_are_there(hugetlbfs: Path, rounds: int) -> None:
    paths = [hugetlbfs / name for name in ("source", "destination")]
    waiting = vm("-incoming", "defer", memory=memory(paths[1]))
    with vm(memory=memory(paths[0])) as source, waiting as destination:
        source.rams, destination.rams = [paths[0]], [paths[1]]
        assert eventually(lambda: source.rounds() > 2)

        asyncio.run(test_postcopy.migrate(source, destination, rounds=rounds))

        assert destination.goes_on()
        assert not lacks_pages(destination)
        destination.monitor.ask("stop")
        assert test_postcopy.is_untouched(source, destination)
    for path in paths:
        path.unlink()
