"""Pages for a VMM that speaks Firecracker's handshake: `python -m engine.guest.handoff_pages GO
MEMFD UFFD REGIONS`, started by the agent.

It serves the VMM's faults from received memory and pushes the rest behind them. Where all is there,
the memory is the VMM's alone. It needs neither agent nor control then: a VMM whose handler is gone
waits for ever.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from engine import _native
from engine.guest.adoption import say
from engine.guest.handoff_hello import Region
from engine.guest.handoff_serving import is_wanted

UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_WAKE: Final = 0x8010AA02
COPY: Final = struct.Struct("=QQQQq")  #: to, from, length, mode, and how many bytes it were
RANGE: Final = struct.Struct("=QQ")
EVENT: Final = struct.Struct("=B7xQQQ")  #: kind; flags and address, or begin and end
PAGEFAULT, REMOVE = 0x12, 0x15
EVENTS_MAX: Final = 64  #: read at once
CHUNK_BYTES: Final = 256 * 1024  #: about 0.1 ms, for which a fault waits


class PagePusher:
    """One VMM's memory; borrows both descriptors."""

    def __init__(self, uffd: int, memfd: int, regions: Sequence[Region]) -> None:
        self._uffd, self._memfd, self._regions = uffd, memfd, regions
        self._memory = mmap.mmap(memfd, os.fstat(memfd).st_size)
        self._zeros = mmap.mmap(-1, max(each.page_size for each in regions))
        self._address = _native.mapping_address(self._memory)
        self._faults: deque[int] = deque()  #: addresses of those who wait
        #: For each region, the pages that the VMM has given back: they are zero.
        self._removed = [np.zeros(each.size // each.page_size, np.bool_) for each in regions]

    def run(self) -> None:
        """Until all is there.

        :raise OSError: the VMM is gone, or its memory is not what it said."""
        for index, region in enumerate(self._regions):
            place = region.offset
            while (found := self._next_data(region, place)) is not None:
                begin, place = found
                self._serve_faults()
                self._copy(index, begin - region.offset, place - region.offset)
        for region in self._regions:
            self._unregister(region)
        while not self._is_quiet():
            self._take_events()

    def _next_data(self, region: Region, place: int) -> tuple[int, int] | None:
        """The next piece of the region that is no hole, in whole pages, and no longer than what is
        copied at once; holes are zero when the VMM's memory is its own."""
        end, unit = region.offset + region.size, region.page_size
        if place >= end:
            return None
        try:
            begin = os.lseek(self._memfd, place, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return None
            raise
        begin = max(place, begin - begin % unit)
        hole = os.lseek(self._memfd, begin, os.SEEK_HOLE)
        stop = min(end, begin + max(CHUNK_BYTES, unit), hole + -hole % unit)
        return (begin, max(stop, begin + unit)) if begin < end else None

    def _serve_faults(self) -> None:
        """Those who wait now."""
        self._take_events()
        while self._faults:
            self._serve(self._faults.popleft())

    def _copy(self, index: int, begin: int, end: int) -> None:
        """From what was received to where nothing is yet, and nothing was given back."""
        region, removed = self._regions[index], self._removed[index]
        unit = region.page_size
        while begin < end:
            ahead = removed[begin // unit : end // unit]  # anew: more may have been given back
            size = (int(ahead.argmax()) if ahead.any() else len(ahead)) * unit
            if not size:
                begin += unit
                continue
            source = self._address + region.offset + begin
            done, error = self._copy_once(region.base_host_virt_addr + begin, source, size)
            begin += done
            if error == errno.EEXIST:
                self._wake(region.base_host_virt_addr + begin, unit)
                begin += unit
            elif error == errno.EAGAIN:
                self._take_events()  # it gives memory back, and waits for us to hear of it
            elif error:
                raise OSError(error, os.strerror(error))

    def _copy_once(self, to: int, source: int, size: int) -> tuple[int, int]:
        """How many bytes were copied, and why not more."""
        request = bytearray(COPY.pack(to, source, size, 0, 0))
        try:
            fcntl.ioctl(self._uffd, UFFDIO_COPY, request)
        except OSError as exc:
            return max(0, COPY.unpack(request)[4]), exc.errno or errno.EIO
        return COPY.unpack(request)[4], 0

    def _wake(self, address: int, size: int) -> None:
        fcntl.ioctl(self._uffd, UFFDIO_WAKE, RANGE.pack(address, size))

    # -- events ----------------------------------------------------------------------------------

    def _take_events(self) -> None:
        """All that wait now. What was given back counts from here on, before any fault is served:
        its old contents must not come again."""
        try:
            events = os.read(self._uffd, EVENT.size * EVENTS_MAX)
        except BlockingIOError:
            return
        for kind, first, second, _ in EVENT.iter_unpack(events):
            if kind == REMOVE:
                self._remove(first, second)
            elif kind == PAGEFAULT:
                self._faults.append(second)

    def _remove(self, begin: int, end: int) -> None:
        for region, removed in zip(self._regions, self._removed, strict=True):
            base, unit = region.base_host_virt_addr, region.page_size
            first = max(begin, base) - base
            last = min(end, region.end) - base
            if first < last:
                removed[first // unit : -(-last // unit)] = True

    def _serve(self, address: int) -> None:
        for index, region in enumerate(self._regions):
            begin = address - region.base_host_virt_addr
            if 0 <= begin < region.size:
                begin -= begin % region.page_size
                if self._removed[index][begin // region.page_size]:
                    self._zero(region, begin)
                else:
                    self._copy(index, begin, begin + region.page_size)

    def _zero(self, region: Region, begin: int) -> None:
        to, source = region.base_host_virt_addr + begin, _native.mapping_address(self._zeros)
        error = errno.EAGAIN
        while error == errno.EAGAIN:
            _, error = self._copy_once(to, source, region.page_size)
            if error == errno.EAGAIN:
                self._take_events()
        if error == errno.EEXIST:
            self._wake(to, region.page_size)
        elif error:
            raise OSError(error, os.strerror(error))

    def _unregister(self, region: Region) -> None:
        try:
            _native.uffd_unregister(self._uffd, region.base_host_virt_addr, region.size)
        except OSError:  # ENOMEM also when the VMM is gone, which a copy tells: ESRCH
            self._zero(region, 0)  # what is not there now is zero
            raise

    def _is_quiet(self) -> bool:
        """Nobody waits for us to hear that memory was given back. While somebody does, the kernel
        copies nothing and says so, before it looks whether the place is registered any more."""
        region = self._regions[0]
        _, error = self._copy_once(region.base_host_virt_addr, self._address, region.page_size)
        return error != errno.EAGAIN

    def close(self) -> None:
        """Give the mappings back."""
        self._memory.close()
        self._zeros.close()


def main(go: int, memfd: int, uffd: int, text: str) -> None:
    """Wait until the guest is the VMM's, and push; if it never is, nothing is done."""
    regions = msgspec.json.decode(text, type=list[Region])
    os.set_blocking(uffd, False)
    pusher = PagePusher(uffd, memfd, regions)
    try:
        with socket.socket(fileno=go) as orders:
            if not is_wanted(orders):
                return
        pusher.run()
    except OSError as exc:
        if exc.errno != errno.ESRCH:  # its process is gone
            say(f"handoff[{os.getpid()}]: the VMM waits for ever where pages are missing: {exc}")
    finally:
        pusher.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
