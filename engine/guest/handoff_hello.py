"""What a VMM says when it hands its memory over: bytes of a stranger, checked here.

`parse_hello` and `check_regions` are pure; `check_descriptors` looks at what came beside the
message. The protocol's page is docs/handoff.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

import msgspec

from engine import _native
from engine.errors import GuestError, MemoryRefused, WireError, shown
from engine.guest.foreign import ForeignBlock, find_shared, open_block
from engine.guest.mappings import Mapping
from engine.guest.sharers import check_still_alone
from engine.guest.tracker import FEATURES as TRACKING_FEATURES
from engine.memory.blocks import PAGE_SIZE
from engine.memory.missing import FEATURES as MISSING_FEATURES
from engine.wire import BLOCKS_MAX, BlockShape, check_blocks

VERSION: Final = 1
#: A region is less than 512 bytes with an id of 255, and a name of its own for each other key.
HELLO_BYTES_MAX: Final = 64 * 1024
ADDRESS_MAX: Final = 2**63 - 1
THREADS_MAX: Final = 4096
FDS_A_REGION: Final = 2  #: its memory and its userfaultfd
#: `page_size_kib` of Firecracker is in bytes, whatever it is called; no two of these are the same.
PAGE_SIZES: Final = {
    value: size for size in (PAGE_SIZE, 2 * 1024**2, 1024**3) for value in (size, size // 1024)
}
FEATURES: Final = TRACKING_FEATURES | MISSING_FEATURES | _native.UFFD_FEATURE_THREAD_ID
F_SEAL_FUTURE_WRITE: Final = 0x10  #: Linux 5.1; not in `fcntl`
UFFD_LINK: Final = "anon_inode:[userfaultfd]"

Word = Annotated[int, msgspec.Meta(ge=0, le=ADDRESS_MAX)]


class Region(msgspec.Struct, frozen=True, rename={"page_bytes": "page_size"}):
    """One piece of guest memory, with Firecracker's names; keys that we do not know are ignored.

    :ivar base_host_virt_addr: where the VMM maps it.
    :ivar offset: where it begins in its file.
    :ivar page_size_kib: see `PAGE_SIZES`; newer Firecrackers call it `page_size`, too."""

    base_host_virt_addr: Word
    size: Word
    offset: Word
    page_size_kib: Word = PAGE_SIZE
    page_bytes: Word = 0
    id: str = ""

    @property
    def page_size(self) -> int:
        """Bytes.

        :raise WireError: no kernel has such pages."""
        said = self.page_bytes or self.page_size_kib
        if said not in PAGE_SIZES:
            raise WireError(
                f"page size {said}; 4, 2048 and 1048576 are allowed, or the same in bytes"
            )
        return PAGE_SIZES[said]

    @property
    def end(self) -> int:
        return self.base_host_virt_addr + self.size


class Hello(msgspec.Struct, frozen=True):
    """The extended form, for live migration.

    :ivar running: its vCPUs run.
    :ivar state: it has a device state to save and load.
    :ivar vcpus: thread ids of its vCPUs; none: it does not tell."""

    handoff: int
    regions: list[Region]
    running: bool
    state: bool = False
    vcpus: Annotated[list[Word], msgspec.Meta(max_length=THREADS_MAX)] = []


_HELLO: Final = msgspec.json.Decoder(Hello)


def parse_hello(line: bytes) -> Hello:
    """:raise WireError: one line that says what is wrong."""
    try:
        hello = _HELLO.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise WireError(f"not a hello: {exc}") from exc
    if hello.handoff != VERSION:
        raise WireError(f"version {hello.handoff} of the handoff protocol; {VERSION} is spoken")
    check_regions(hello.regions)
    for region in hello.regions:
        if region.offset:
            raise WireError(
                f"region '{shown(region.id)}' begins at {region.offset} of its file; each needs a "
                "memfd of its own, from its beginning"
            )
    check_blocks([BlockShape(each.id, each.size, each.page_size) for each in hello.regions])
    return hello


def check_regions(regions: Sequence[Region]) -> None:
    """:raise WireError: none, too many, not whole pages, or one over another."""
    if not 0 < len(regions) <= BLOCKS_MAX:
        raise WireError(f"{len(regions)} regions; 1 to {BLOCKS_MAX} can be handed over")
    for region in regions:
        odd = (region.base_host_virt_addr | region.size | region.offset) % region.page_size
        if odd or not region.size or region.end > ADDRESS_MAX:
            raise WireError(
                f"region of {region.size} bytes at {region.base_host_virt_addr:#x}, offset "
                f"{region.offset}, is not whole pages of {region.page_size}"
            )
    check_apart((each.base_host_virt_addr, each.end) for each in regions)


def check_apart(places: Iterable[tuple[int, int]]) -> None:
    """:raise WireError: two places (begin, end) have something in common."""
    for before, after in pairwise(sorted(places)):
        if after[0] < before[1]:
            raise WireError(f"two regions overlap at {after[0]:#x}")


@dataclass(frozen=True, slots=True)
class Offered:
    """Memory that was handed over and is what it was said to be.

    :ivar blocks: with descriptors that are the caller's.
    :ivar uffds: one a block, negotiated, the caller's."""

    blocks: list[ForeignBlock]
    uffds: list[int]


def check_descriptors(
    hello: Hello, fds: Sequence[int], pid: int, mappings: Sequence[Mapping]
) -> Offered:
    """Check what came beside a hello: for each region a memfd, then a userfaultfd. All become the
    caller's.

    :param pid: who sent it; `mappings` are its.
    :raise MigrationError: one line that says what is wrong; the descriptors stay the caller's."""
    wanted = FDS_A_REGION * len(hello.regions)
    if len(fds) != wanted:
        raise WireError(
            f"{len(fds)} descriptors beside {len(hello.regions)} regions; {wanted} are needed: "
            "for each its memfd and its userfaultfd"
        )
    memfds, uffds = list(fds[::FDS_A_REGION]), list(fds[1::FDS_A_REGION])
    blocks = []
    for region, memfd in zip(hello.regions, memfds, strict=True):
        block = _check_memfd(region, memfd)
        check_mapped(block, pid, mappings)
        blocks.append(block)
    check_still_alone(blocks, pid)
    for region, uffd in zip(hello.regions, uffds, strict=True):
        check_uffd(f"region '{shown(region.id)}'", uffd)
        _negotiate(region, uffd)
    return Offered(blocks, uffds)


def _check_memfd(region: Region, fd: int) -> ForeignBlock:
    """:raise MigrationError: not memory that lies still and is as large as the region."""
    what = f"the memory of region '{shown(region.id)}'"
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise WireError(f"{what} is no memfd")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise WireError(f"{what} may not be read and written; open it O_RDWR")
    _seal(what, fd)
    if os.fstat(fd).st_size != region.size:  # now it cannot shrink any more
        raise WireError(f"{what} has {found.st_size} bytes, and not {region.size}")
    block = open_block(region.id, fd, region.size)
    if block.backing_page_size != region.page_size:
        raise WireError(
            f"{what} has pages of {block.backing_page_size} bytes, and not {region.page_size}"
        )
    return ForeignBlock(block, region.base_host_virt_addr)


def _seal(what: str, fd: int) -> None:
    """A file that shrinks kills whoever reads it.

    :raise WireError: that cannot be ruled out, or it cannot be written to."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise WireError(f"{what} is no memfd: {exc.strerror}") from exc
    if seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
        raise WireError(f"{what} is sealed against writing")
    if not seals & fcntl.F_SEAL_SHRINK:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        except OSError as exc:
            raise WireError(
                f"{what} could shrink while it is read; make it with MFD_ALLOW_SEALING"
            ) from exc


def check_mapped(block: ForeignBlock, pid: int, mappings: Sequence[Mapping]) -> None:
    """:raise MemoryRefused: the process has not mapped all of it there, shared, once, and so not
    as two blocks either."""
    what = f"the memfd of region '{shown(block.block.name)}'"
    found = find_shared(what, block.block.fd, block.block.size, pid, mappings)
    if found.start != block.address:
        raise MemoryRefused(
            f"process {pid} does not map {what} shared and writable at {block.address:#x}"
        )


def check_uffd(what: str, fd: int) -> None:
    """:raise WireError: the descriptor is something else."""
    kind = ""
    with contextlib.suppress(OSError):
        kind = os.readlink(f"/proc/self/fd/{fd}")
    if kind != UFFD_LINK:
        raise WireError(f"the descriptor for faults of {what} is no userfaultfd")


def _negotiate(region: Region, uffd: int) -> None:
    try:
        os.set_blocking(uffd, False)
        _native.uffd_negotiate(uffd, FEATURES)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise GuestError(f"a userfaultfd cannot be used: {exc.strerror}") from exc
        raise MemoryRefused(
            f"the userfaultfd of region '{shown(region.id)}' cannot track: it must be fresh, "
            "without UFFDIO_API, and the kernel Linux 6.7"
        ) from exc
