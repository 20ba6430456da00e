"""A guest's userfaultfd for missing pages, opened in the guest's own process.

A userfaultfd belongs to the address space that opened it: the guest opens it, registers its RAM,
and lends the descriptor. It keeps its own open until every page is received: when the last one is
closed, a missing page reads as zero.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence

from engine import _native
from engine.errors import MemoryRefused

FEATURES = _native.UFFD_FEATURE_MISSING_SHMEM | _native.UFFD_FEATURE_MISSING_HUGETLBFS


def open_missing(mappings: Sequence[mmap.mmap]) -> int:
    """A userfaultfd over whole mappings of this process; the caller owns it.

    With privilege (CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1) the kernel's own accesses wait
    too: system calls on RAM, KVM. Any user gets one for user-mode accesses; a system call on a
    missing page then fails with EFAULT.

    :raise MemoryRefused: this kernel or user has none, or a mapping is registered already."""
    try:
        uffd = _open_first()
    except OSError as exc:
        raise MemoryRefused(f"no userfaultfd for missing pages: {exc.strerror}") from exc
    try:
        for mapping in mappings:
            _native.uffd_register(
                uffd,
                _native.mapping_address(mapping),
                len(mapping),
                _native.UFFD_REGISTER_MISSING,
            )
    except OSError as exc:
        os.close(uffd)
        raise MemoryRefused(f"RAM cannot be registered for faults: {exc.strerror}") from exc
    return uffd


def _open_first() -> int:
    """The best that can be had: with the kernel's accesses, and with thread ids."""
    named = FEATURES | _native.UFFD_FEATURE_THREAD_ID
    user_only = _native.UFFD_USER_MODE_ONLY
    last: OSError | None = None
    for flags, features in ((0, named), (user_only, named), (0, FEATURES), (user_only, FEATURES)):
        try:
            return _native.uffd_open(flags, features)
        except OSError as exc:
            if exc.errno not in (errno.EPERM, errno.EINVAL):
                raise
            last = exc
    assert last is not None
    raise last
