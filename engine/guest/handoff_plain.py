"""A VMM that speaks Firecracker's userfaultfd handshake, as its agent drives it.

It says where its memory is, gives the userfaultfd at which it waits for pages, and never speaks
again. So it is a destination: all pages are received into memory of ours, and then served to it
(`handoff_pages`). To a source it is a guest that is memory and nothing else, as `ram:`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from typing import Final

import msgspec

from engine.errors import GuestError, MemoryRefused, WireError
from engine.guest.backing import make_ram
from engine.guest.cgroups import threads_of
from engine.guest.foreign import ForeignBlock
from engine.guest.foreign_tracking import ForeignTracker
from engine.guest.handoff_door import Visitor
from engine.guest.handoff_hello import Region, check_apart, check_regions, check_uffd
from engine.guest.handoff_serving import READY, SERVE, YOURS
from engine.guest.mappings import read_places
from engine.guest.ram import STATE
from engine.memory.blocks import BLOCK_SIZE_MAX
from engine.memory.tracking import TrackerName

READY_WAIT_S: Final = 10.0  #: for an interpreter to start
END_WAIT_S: Final = 5.0
SERVER: Final = "engine.guest.handoff_pages"
NO_ORDERS: Final = "a VMM of Firecracker's handshake takes no orders; use its own API"

_REGIONS: Final = msgspec.json.Decoder(list[Region])


def parse_plain(text: bytes) -> list[Region]:
    """Firecracker's message: an array of regions, which are parts of one memory file.

    :raise WireError: one line that says what is wrong."""
    try:
        regions = _REGIONS.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise WireError(f"not Firecracker's handshake: {exc}") from exc
    check_regions(regions)
    check_apart((each.offset, each.offset + each.size) for each in regions)
    if size_of(regions) > BLOCK_SIZE_MAX:
        raise WireError(f"a memory of {size_of(regions)} bytes; {BLOCK_SIZE_MAX} are allowed")
    return regions


def size_of(regions: list[Region]) -> int:
    """Of the memory file."""
    return max(each.offset + each.size for each in regions)


def check_waits(pid: int, regions: list[Region]) -> None:
    """:raise MemoryRefused: the process does not wait for the pages of a region, all of them.
    :raise GuestError: it has ended, or is not ours to look at."""
    places = read_places(pid)
    for region in regions:
        reached = region.base_host_virt_addr  # neighbours may be one mapping
        for each in places:
            is_good = "um" in each.flags and each.page_size == region.page_size
            if is_good and each.start <= reached < each.end:
                reached = each.end
        if reached < region.end:
            raise MemoryRefused(
                f"process {pid} does not wait for missing pages of {region.page_size} bytes at "
                f"{reached:#x}, in the region of {region.size} bytes that it has named"
            )


class PlainMachine:
    """One such VMM; owns its connection and userfaultfd, the memory until it is served, and starts
    the process that serves it, which outlives us."""

    kind, qmp_path = "ram", ""

    def __init__(self, visitor: Visitor, *, incoming: bool) -> None:
        """Take over who has said hello.

        :raise MigrationError: one line that says what is wrong; the visitor stays the caller's."""
        self.pid, self.is_running = visitor.pid, False
        regions = parse_plain(visitor.text)
        if not incoming:
            raise GuestError(
                "a VMM of Firecracker's handshake can only take a memory over; start ramferry with "
                "--incoming"
            )
        if len(visitor.fds) != 1:
            raise WireError(f"{len(visitor.fds)} descriptors beside it; its userfaultfd is needed")
        check_uffd("the VMM", visitor.fds[0])
        check_waits(self.pid, regions)
        ram = make_ram(size_of(regions), None, None, None)
        self.blocks = [ForeignBlock(ram.block, 0)]
        self._go, theirs = socket.socketpair()
        with theirs:
            passed = [theirs.fileno(), ram.block.fd, visitor.fds[0]]
            text = msgspec.json.encode(regions).decode()
            try:
                self._server = subprocess.Popen(
                    [sys.executable, "-m", SERVER, *map(str, passed), text],
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as exc:
                os.close(ram.block.fd)
                self._go.close()
                raise GuestError("the process that serves pages cannot be started") from exc
        self._is_ready = self._is_given = False  #: as the process knows
        self._connection, self._uffd = visitor.connection, visitor.fds.pop()

    @property
    def what(self) -> str:
        return f"VMM (pid {self.pid})"

    # -- running: its vCPUs wait where they touch memory, until it is served ----------------------

    def looks_running(self) -> bool:
        return self.is_running

    def pause(self) -> int:
        if self.is_running:
            raise GuestError(NO_ORDERS)
        return time.monotonic_ns()

    def resume(self) -> None:
        if not self.is_running:
            self._tell(SERVE)
            self.is_running = True

    def _tell(self, order: bytes) -> None:
        """:raise GuestError: nobody serves it."""
        try:
            self._go.send(order)
        except OSError as exc:
            raise GuestError(self._unserved) from exc
        self._is_given = True

    @property
    def _unserved(self) -> str:
        return f"the process that serves pages to {self.what} has ended"

    def confirm(self) -> None:
        """:raise GuestError: nobody serves it."""
        if self.is_running and self._server.poll():
            raise GuestError(self._unserved)

    def stay(self, stays: bool) -> None:
        """It cannot be told."""

    def arrive(self) -> None:
        """It gets its pages when it is resumed, or when we have ended."""
        self._tell(YOURS)

    def vcpus(self) -> list[int]:
        """:raise GuestError: it has ended."""
        try:
            return threads_of(self.pid)
        except OSError as exc:
            raise GuestError(f"{self.what} has ended") from exc

    def check_all_wait(self) -> None:
        """Its memory is private."""

    def count_vcpus(self) -> int:
        return 0

    # -- device state: its operator's --------------------------------------------------------------

    def save(self) -> tuple[int, int]:
        raise GuestError(NO_ORDERS)

    def load(self, state_fd: int, size: int) -> None:
        if size != len(STATE) or os.pread(state_fd, size, 0) != STATE:
            raise GuestError(f"device state of {size} bytes is not that of a ram guest")
        self._check_served()

    def _check_served(self) -> None:
        """:raise GuestError: the process that serves pages has ended, or cannot begin."""
        if not self._is_ready:
            with contextlib.suppress(OSError):
                self._go.settimeout(READY_WAIT_S)
                self._is_ready = self._go.recv(1) == READY
        if not self._is_ready or self._server.poll() is not None:
            raise GuestError(self._unserved)

    # -- tracking and missing pages ----------------------------------------------------------------

    def start_tracking(self, wanted: TrackerName | None) -> list[ForeignTracker]:
        raise MemoryRefused(
            "the memory of a VMM of Firecracker's handshake is private: it cannot be migrated on"
        )

    def check_memory(self) -> None:
        """Never tracked."""

    def check_sharers(self, besides: frozenset[int]) -> None:
        """Never tracked."""

    def stop_tracking(self) -> None:
        """Never started."""

    def open_missing(self) -> list[int]:
        raise MemoryRefused(
            "a VMM of Firecracker's handshake is served when all of its memory is here; switch "
            "postcopy-ram off"
        )

    def end_missing(self) -> None:
        """Never begun."""

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        """Who waits in `load` gives up."""
        with contextlib.suppress(OSError):
            self._go.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._go.close()
        if not self._is_given:  # it has nothing to do
            self._server.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(END_WAIT_S)
        self._server.poll()
        self._connection.close()
        os.close(self._uffd)
        for each in self.blocks:
            os.close(each.block.fd)
        self.blocks = []
