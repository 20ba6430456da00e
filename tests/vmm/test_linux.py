"""A Linux guest goes back and forth between two places, in every way, while it checks its memory.

Its processes fork, fill memory and files, and look at every word of it in each of their rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from engine.memory.blocks import PAGE_SIZE
from tests.support import eventually
from tests.vmm import linux, test_end_to_end, test_postcopy
from tests.vmm.linux import complaints, has_booted
from tests.vmm.machines import MIB, Vm, needs_qemu
from tests.vmm.postcopy_rig import lacks_pages, needs_kernel_faults
from tests.vmm.test_end_to_end import is_let_go, stand_as

pytestmark = [
    pytest.mark.guest,
    pytest.mark.process,
    needs_qemu,
    linux.needs_kernel,
    needs_kernel_faults,
]

MIGRATIONS: Final = 20
WAYS: Final = ("precopy", "postcopy", "hybrid")
CODECS: Final = ("none", "lz4", "zstd", "xbzrle")  #: all pairs with the ways come in twelve
MIGRATIONS_S: Final = 600  #: some 70 s where nothing else runs
RATE: Final = 256 * MIB  #: bytes in a second: the guest ends rounds while its memory is sent
FLIPPED: Final = 1 << 40


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linux.build(tmp_path_factory.mktemp("linux"))


def migrate(source: Vm, destination: Vm, way: str, codec: str) -> None:
    """In precopy it does not run on its arrival, so that every byte can be compared."""
    is_xbzrle = codec == "xbzrle"
    compression = "none" if is_xbzrle else codec
    capabilities = ("xbzrle=on",) if is_xbzrle else ()
    if way == "precopy":
        asyncio.run(
            test_end_to_end.migrate(
                source, destination, *capabilities, stands=True,
                multifd_compression=compression, max_bandwidth=RATE,
            )
        )  # fmt: skip
        assert source.memory() == destination.memory()
        assert stand_as(source, destination, "paused")
        destination.monitor.ask("cont")
    else:
        settings = (f"multifd-compression={compression}", *capabilities)
        rounds = 1 if way == "hybrid" else 0
        asyncio.run(test_postcopy.migrate(source, destination, *settings, rounds=rounds))
        assert not lacks_pages(destination)
    assert stand_as(source, destination, "running")
    assert is_let_go(source)


def check_goes_on(source: Vm, destination: Vm) -> None:
    """It begins where it was, and ends rounds of which all is at the destination."""
    before = source.rounds()
    assert eventually(lambda: destination.rounds() > before + 2), destination.wrote("kernel")
    rounds = [number for _, number in destination.said()]
    assert 0 <= rounds[0] - before <= 2  # a line may be halved
    assert rounds == list(range(rounds[0], rounds[0] + len(rounds)))
    assert not complaints(source) + complaints(destination)


@pytest.mark.timeout(MIGRATIONS_S)
def test_a_linux_guest_survives_twenty_migrations_back_and_forth(initramfs: Path) -> None:
    with contextlib.ExitStack() as here, contextlib.ExitStack() as there:
        places = cycle([(here, there), (there, here)])
        source = here.enter_context(linux.vm(initramfs))
        assert has_booted(source), source.wrote("kernel")

        for (old, new), way, codec in islice(zip(places, cycle(WAYS), cycle(CODECS)), MIGRATIONS):
            destination = new.enter_context(linux.vm(initramfs, "-incoming", "defer"))
            migrate(source, destination, way, codec)
            check_goes_on(source, destination)
            old.close()
            source = destination


def test_a_linux_guest_notices_a_bit_that_is_wrong(initramfs: Path) -> None:
    """Of each page that is full of one number the last word is changed from outside."""
    with linux.vm(initramfs) as machine:
        assert has_booted(machine), machine.wrote("kernel")
        machine.monitor.ask("stop")
        words = np.memmap(machine.rams[0], np.uint64, "r+").reshape(-1, PAGE_SIZE // 8)
        same = (words == words[:, :1]).all(axis=1) & (words[:, 0] > FLIPPED)
        same &= words[:, 0] % 256 != words[:, 0] // 256 % 256  # not what the children write
        assert same.any()
        words[same, -1] ^= FLIPPED
        machine.monitor.ask("cont")

        says = re.compile(r"is ([0-9a-f]{16}) instead of ([0-9a-f]{16})\n")
        assert eventually(lambda: says.search(machine.wrote("serial")) is not None)
        ((found, wanted),) = says.findall(machine.wrote("serial"))
        assert int(found, 16) ^ int(wanted, 16) == FLIPPED
        what, where = machine.said()[-1]
        assert what == "W"
        assert where % PAGE_SIZE == PAGE_SIZE - 8
