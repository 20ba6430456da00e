"""Kernels of `native/`: whatever loops over pages.

Units: addresses, sizes and offsets are bytes; page indices count 4096-byte pages from the start of
one RAM block. A *bitmap* is a buffer of native 64-bit words, bit `i % 64` of word `i // 64` for
page `i`, its length a multiple of 8 and large enough for `page_count` pages; words are read and
written atomically because other processes share them. A *run table* is a buffer of little-endian
`(uint32 first_page, uint32 page_count)` pairs.

A *slice* is `(page_count, stripe_pages, worker_index, worker_count)`: the pages `p < page_count`
with `(p // stripe_pages) % worker_count == worker_index`. `stripe_pages` is a multiple of 64.

Every function raises ValueError when sizes, indices or alignment do not fit (never touching
memory), OSError with the kernel's errno when a system call fails, and releases the GIL while it
works."""

from collections.abc import Sequence
from typing import NewType

from typing_extensions import Buffer

Slice = tuple[int, int, int, int]

PAGE_SIZE: int  #: 4096
BATCH_WALK_PAGES_MAX: int  #: no batch has more pages, zero ones included
DELTA_PAGES_MAX: int  #: of one delta_batch
DELTA_BYTES_MAX: int  #: longest delta that delta_batch can be asked for: less than a page
DELTA_LENGTH_BYTES: int  #: before each delta of a batch: its length, little-endian
SPLIT_PAGES_MAX: int  #: of one split_compressible
UFFD_USER_MODE_ONLY: int
UFFD_FEATURE_MISSING_SHMEM: int
UFFD_FEATURE_MISSING_HUGETLBFS: int
UFFD_FEATURE_PAGEFAULT_FLAG_WP: int
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: int
UFFD_FEATURE_WP_UNPOPULATED: int
UFFD_FEATURE_WP_ASYNC: int
UFFD_REGISTER_MISSING: int
UFFD_REGISTER_WP: int
INJECT_DONE: int
INJECT_GONE: int
INJECT_NOT_ALLOWED: int
INJECT_TRACED: int
INJECT_NOT_64_BIT: int
INJECT_FILTERED: int
INJECT_SHADOW_STACK: int
INJECT_NO_CODE: int
INJECT_NO_SAFE_THREAD: int
INJECT_TOO_OLD: int
INJECT_REFUSED: int
INJECT_FAILED: int

def kernel_names(kind: str) -> list[str]:
    """Names this CPU can run for `kind` ("zero_scan", "xbzrle"), the measured default first; has
    "scalar"."""

def zero_scan(name: str, pages: Buffer, is_zero: Buffer, page_size: int) -> int:
    """Set `is_zero[i]` to 1 or 0 for each page; return how many are zero. `name` is a demand."""

# -- bitmaps ------------------------------------------------------------------------------------

def bitmap_set_range(bitmap: Buffer, first_page: int, page_count: int) -> int:
    """Set the bits atomically; return how many were clear before."""

def bitmap_clear_slice(bitmap: Buffer, slice: Slice) -> int:
    """Clear the slice's bits atomically; return how many were set."""

def bitmap_count(bitmap: Buffer, slice: Slice) -> int:
    """Count the set bits of the slice."""

def bitmap_move_slice(source: Buffer, target: Buffer, slice: Slice, first_page: int = 0) -> int:
    """Set in `target` every bit of the slice from `first_page` on that is set in `source`, then
    clear it there; return the bits moved, whether `target` had them or not.

    A crash between the two leaves the bit in both: nothing is ever lost."""

def bitmap_set_data(fd: int, offset: int, size: int, bitmap: Buffer) -> int:
    """Set the bit of each page of `fd[offset:offset+size]` that SEEK_DATA reports; return newly
    set.

    Holes are not touched. The descriptor's file position changes."""

# -- source: what to send -----------------------------------------------------------------------

def take_batch(
    ram: Buffer,
    dirty: Buffer,
    in_flight: Buffer,
    slice: Slice,
    cursor: int,
    pages_max: int,
    detect_zero: bool,
    data_runs: Buffer,
    zero_runs: Buffer,
) -> tuple[int, int, int, int, int]:
    """Walk the slice's dirty bits from page `cursor`; take up to `pages_max` non-zero pages.

    For each page taken: its `in_flight` bit is set, *then* its `dirty` bit cleared, *then* its
    content looked at (zero scan with the default kernel when `detect_zero`). Non-zero pages go as
    runs to `data_runs`, zero ones to `zero_runs`; runs merge when adjacent; the walk stops when
    either table is full, after BATCH_WALK_PAGES_MAX pages of both kinds together (so that orders
    are heard), or when the slice ends.

    :return: (next cursor, data runs, zero runs, data pages, zero pages). The next cursor is
        `page_count` when the slice was walked to its end.
    """

def gather(ram: Buffer, runs: Buffer, run_count: int, plane_runs: int = 0) -> bytes:
    """Copy the runs' pages, in order, into one new bytes object (allocated without clearing); those
    of the first `plane_runs` runs as bit planes (`native/planes.h`)."""

def split_compressible(
    ram: Buffer, runs: Buffer, run_count: int, out_runs: Buffer
) -> tuple[int, int, int, int]:
    """Sort up to SPLIT_PAGES_MAX pages by what a codec would gain, from 256 sampled bytes of each.

    Writes to `out_runs` the runs of pages that are worth compressing as bit planes (numbers and
    pointers that seldom repeat), then of the others worth compressing, then of the rest (random,
    encrypted, compressed already), each in the order of `runs`, adjacent pages merged. `out_runs`
    has room for a run of each page; it may be `runs` itself. A heuristic: about one random page in
    10**6 counts as compressible; text, pointers, integers, code and sparse pages always do.

    :return: (runs for planes, other compressible runs, compressible pages, raw runs).
    """

def hash_pages(pages: Buffer, seed: int, hashes: Buffer, runs: Buffer, run_count: int) -> None:
    """Store the seeded 128-bit hash of each page of the private copy `pages` (the runs' pages in
    order) at `hashes[16 * page_index]`."""

def gather_changed(
    ram: Buffer,
    seed: int,
    hashes: Buffer,
    known: Buffer,
    runs: Buffer,
    run_count: int,
    out_pages: Buffer,
    out_runs: Buffer,
) -> tuple[int, int, int]:
    """Copy the runs' pages one after the other to `out_pages`, but leave out each whose `known` bit
    is set and whose seeded 128-bit hash is the one at `hashes[16 * page_index]`; write the runs of
    the others to `out_runs`, their hashes and known bits back. What is hashed is the copy. The
    outputs need room for all pages, and a run of each.

    :return: (pages copied, runs, pages left out).
    """

def forget_pages(known: Buffer, runs: Buffer, run_count: int) -> None:
    """Clear the known bits of pages that are sent another way."""

def hash_scan(
    ram: Buffer,
    seed: int,
    hashes: Buffer,
    candidates: Buffer,
    dirty: Buffer,
    slice: Slice,
    first_page: int = 0,
) -> int:
    """Set the dirty bit of each page of the slice from `first_page` on whose `candidates` bit is
    set and whose hash differs from `hashes`; return bits newly set. Pages whose candidates bit is
    clear are not touched, nor are pages that are dirty."""

# -- source: deltas -----------------------------------------------------------------------------

def xbzrle_encode(name: str, old_page: Buffer, new_page: Buffer, output: Buffer) -> int:
    """Write QEMU's XBZRLE delta between two pages that nobody writes meanwhile to `output`; return
    its length, 0 when they are alike, -1 when it has no room. `name` is a demand."""

DeltaCache = NewType("DeltaCache", object)
"""Capsule: copies of the pages that one sender's destination has, QEMU's direct-mapped cache. Its
memory is taken page by page and goes with the last reference. RuntimeError when two threads use it
at the same time."""

def delta_cache_new(slices: Sequence[Slice], page_count: int) -> DeltaCache:
    """Make an empty cache of `page_count` pages, a power of two, for a worker's slice of each RAM
    block. Slots are numbered by the slices' own pages: as many as they have never conflict."""

def delta_cache_resize(cache: DeltaCache, page_count: int) -> None:
    """Change the size, keeping the pages that fit; of two for one slot the one sent later. OSError:
    no memory, and nothing changed."""

def delta_cache_forget(cache: DeltaCache) -> None:
    """Forget all pages and give their memory back."""

def delta_cache_get(cache: DeltaCache, block_index: int, page: int) -> bytes | None:
    """What the cache has of a page."""

def delta_cache_set_zero(
    cache: DeltaCache, block_index: int, generation: int, runs: Buffer, run_count: int
) -> None:
    """The runs' pages are sent as zero pages; they come into the cache by the rule of delta_batch,
    and take no memory."""

def delta_batch(
    cache: DeltaCache,
    block_index: int,
    generation: int,
    ram: Buffer,
    runs: Buffer,
    run_count: int,
    delta_bytes_max: int,
    full_pages: Buffer,
    full_runs: Buffer,
    deltas: Buffer,
    delta_runs: Buffer,
) -> tuple[int, int, int, int, int, int, int, int]:
    """Deal up to DELTA_PAGES_MAX pages of a block to full pages and deltas.

    Each page is read once, into a copy that is what is compared, sent and kept; the RAM may be
    written meanwhile. A page that is not in the cache goes as it is, and takes its slot unless
    another page has been sent from there in this `generation` or the one before. One that is there
    and unchanged goes nowhere; else it goes as a delta, or as it is when the delta is longer than
    `delta_bytes_max`, and the cache has it. Full pages are copied one after the other to
    `full_pages`, deltas to `deltas`, each behind its length (little-endian uint16). For each page
    the outputs need room for a page, a run, DELTA_LENGTH_BYTES + `delta_bytes_max`, and a run.

    :return: (full pages, full runs, delta pages, delta runs, bytes of deltas with their lengths,
        unchanged pages, misses, overflows); full pages are misses and overflows.
    """

# -- source: dirty tracking ---------------------------------------------------------------------

def pagemap_scan_supported(pagemap_fd: int) -> bool:
    """Tell whether the kernel knows PAGEMAP_SCAN (Linux 6.7)."""

def pagemap_scan(
    pagemap_fd: int, address: int, bitmap: Buffer, slice: Slice, first_page: int = 0
) -> int:
    """Read and re-arm in one call (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN)
    the slice, from `first_page` on, of the RAM that starts at `address` in the tracked process; set
    the written pages' bits; return how many pages were found written, dirty before or not.

    Nothing is allocated, but the first scan may report holes: all of them (Linux 6.18.44, which
    also arms them, in 2 MiB of page tables a GiB) or those beside touched pages (Linux 6.7). So
    discard the first scan, and never read a reported page that SEEK_DATA calls a hole. If the
    caller dies in the call, its slice must count as dirty. OSError(EPERM): the range is not
    registered WP_ASYNC; OSError(ESRCH): the tracked process is gone."""

def pagemap_peek(
    pagemap_fd: int, address: int, bitmap: Buffer, slice: Slice, first_page: int = 0
) -> int:
    """As `pagemap_scan`, but nothing is re-armed: the next scan reports these pages again."""

def soft_dirty_scan(
    pagemap_fd: int, address: int, bitmap: Buffer, slice: Slice, first_page: int = 0
) -> int:
    """Set the bits of the slice's pages from `first_page` on whose soft-dirty flag (pagemap bit 55)
    is set; return how many there are."""

# -- userfaultfd --------------------------------------------------------------------------------

def mapping_address(mapping: Buffer) -> int:
    """The address of a writable buffer in this process (the buffer must outlive its use)."""

def uffd_open(flags: int, features: int) -> int:
    """userfaultfd(O_CLOEXEC | O_NONBLOCK | flags) and UFFDIO_API; the caller owns the descriptor.
    OSError(EINVAL) when the kernel lacks a feature, OSError(EPERM) when the user may not."""

def uffd_negotiate(uffd: int, features: int) -> None:
    """Ask for exactly these features of one that was just opened, here or in another process."""

def uffd_register(uffd: int, address: int, size: int, mode: int) -> None: ...
def uffd_unregister(uffd: int, address: int, size: int) -> None: ...
def inject_userfaultfd(
    pid: int, flags: int, wait_ns: int, keeps: bool = False
) -> tuple[int, int, int, int, int, int, int]:
    """Have process `pid` open a userfaultfd of its own memory, without its help, and fetch it; see
    `native/inject.h`.

    :param keeps: it stays open in the process, too.
    :return: (INJECT_*, the descriptor or -1, its number in the process if it is open there or -1,
        errno, the thread that was stopped, for how many ns, attempts).
    """

def inject_close(
    pid: int, number: int, fd: int, wait_ns: int
) -> tuple[int, int, int, int, int, int, int]:
    """Have process `pid` close its descriptor `number`, if that is our `fd`.

    :return: as `inject_userfaultfd`; the third is -1 when it was closed."""

# -- destination --------------------------------------------------------------------------------

def place(
    uffd: int,
    fresh_address: int,
    ram: Buffer,
    placed: Buffer,
    payload: Buffer,
    runs: Buffer,
    run_count: int,
    page_count: int,
) -> tuple[int, int]:
    """Put `payload`, the runs' pages in order, into RAM; return (pages placed fresh, pages copied).

    Every run is checked against `page_count`, and the payload's length against the runs, before the
    first byte is written. A page's `placed` bit is set before its content is written. Pages whose
    bit was clear go with UFFDIO_COPY (whole runs, DONTWAKE) to `fresh_address`, a second mapping of
    the same RAM registered for missing faults on `uffd`; EEXIST falls back to memcpy. Others, and
    all when `uffd` is -1, are copied into `ram`, a page-aligned mapping that is not registered.

    A full file system is OSError(ENOMEM or ENOSPC), never SIGBUS; pages that were not placed then
    have no `placed` bit."""

def delta_apply(
    ram: Buffer, placed: Buffer, deltas: Buffer, runs: Buffer, run_count: int, page_count: int
) -> None:
    """Apply a batch of deltas to the runs' pages, in place, in a page-aligned mapping that is not
    registered with a userfaultfd.

    Runs and deltas are all checked before the first byte is written: a delta for each page, each
    within its page, and no byte left over. A page whose `placed` bit is clear counts as zero; it
    gets its bit and memory first (a full file system is OSError(ENOMEM or ENOSPC))."""

def clear(ram: Buffer, placed: Buffer, runs: Buffer, run_count: int, page_count: int) -> int:
    """Zero the runs' pages whose `placed` bit is set (others are holes already); return how many.
    All runs are checked before the first byte is written."""

def restore_planes(planes: Buffer, page_count: int) -> bytes:
    """The pages whose bit planes `planes` begins with; see `gather`."""

def packet_runs_check(
    data_runs: Buffer,
    plane_count: int,
    encoded_count: int,
    gathered_count: int,
    zero_runs: Buffer,
    page_count: int,
    unit_pages: int,
) -> None:
    """Check all runs of a packet against a block: those encoded as planes (the first `plane_count`
    data runs), the other encoded ones (up to `encoded_count`), the gathered ones (the next
    `gathered_count`), the direct ones and the zero ones must each be ascending, no page be there
    twice, and each run be whole units of `unit_pages`.

    :raise ValueError: names the first run that is wrong."""

# -- bandwidth ----------------------------------------------------------------------------------

def budget_set_rate(budget: Buffer, rate_bytes_per_s: int, now_ns: int) -> None:
    """Set the rate (0: unlimited), take back all that was sold, and count up the generation; one
    process only. Whoever waits for what it bought must buy again when the generation is not the one
    that it read before it bought."""

def budget_take(budget: Buffer, byte_count: int, now_ns: int, burst_ns: int) -> int:
    """Take from the budget shared by all workers; return the monotonic time when the bytes may go.

    `budget` is three 64-bit words: rate in bytes per second (0: unlimited, returns `now_ns`), the
    time up to which bandwidth is sold (virtual scheduling, GCRA; compare-and-swap), and the
    generation, which counts the rates. Time unsold longer than `burst_ns` ago is lost."""

# -- the workload guest -------------------------------------------------------------------------

Workload = NewType("Workload", object)
"""Capsule: vCPU threads over one RAM mapping; stopped and joined when the last reference goes."""

def workload_fill(ram: Buffer, first_page: int, page_count: int, contents: str, seed: int) -> None:
    """Write initial contents ("zero", "text", "heap", "random", "mixed"); zero pages stay
    untouched."""

def workload_judge(
    ram: Buffer, first_page: int, page_count: int, contents: str, seed: int, counters: Buffer
) -> tuple[int, int]:
    """Judge each page by itself; store its write counter (uint64) at `counters[8 * (page -
    first)]`, 2**64-1 for a wrong page. Return (wrong pages, first wrong page or -1). Holes should
    be skipped by the caller. A page never written whose contents are "zero" is right when it is all
    zero."""

def workload_judge_hole(
    first_page: int, page_count: int, contents: str, seed: int, counters: Buffer
) -> tuple[int, int]:
    """The same for pages that are holes, not touching them: a page whose contents are not "zero" is
    wrong. Only counters of wrong pages are stored."""

def workload_start(
    ram: Buffer,
    page_count: int,
    vcpus: int,
    pattern: str,
    rate_bytes_per_s: int,
    words_per_write: int,
    seed: int,
    written_bitmap: Buffer | None,
    is_timed: bool = False,
) -> Workload:
    """Start the vCPU threads, paused. `written_bitmap` (or None) gets a page's bit *after* each
    write."""

def workload_set_bitmap(workload: Workload, written_bitmap: Buffer | None) -> None: ...
def workload_pause(workload: Workload, wait_ns: int) -> int:
    """Park every vCPU between two page writes; return how long it took in ns.

    :raise TimeoutError: a vCPU is still within a write, for a page that is missing; all run on."""

def workload_resume(workload: Workload) -> None: ...
def workload_throttle(workload: Workload, percent: int) -> None:
    """Sleep `percent` of the time (0..99), in QEMU's 10 ms slices; pause cuts the sleep short."""

def workload_writes(workload: Workload) -> list[int]:
    """Page writes since the beginning, one count per vCPU (part of the state)."""

def workload_times(workload: Workload) -> tuple[list[tuple[int, int]], int]:
    """How long writes took, if they are timed: (ns from, count) for each bucket that is not empty,
    eight for each power of two; and the longest."""

def workload_count_dirty(workload: Workload, is_counting: bool) -> None:
    """Count the pages that each vCPU dirties, each once in a second, from now on or no more."""

def workload_limit_dirty(workload: Workload, vcpu: int, bytes_per_s: int) -> None:
    """Let a vCPU dirty no more than so many bytes a second (0: no limit); it sleeps instead of
    writing. ValueError: there is no such vCPU."""

def workload_dirtied(workload: Workload) -> list[tuple[int, int]]:
    """For each vCPU: pages dirtied while that was counted, and ns slept for its limit."""

def workload_save(workload: Workload) -> bytes:
    """Device state of all vCPUs; only while paused."""

def workload_load(workload: Workload, state: bytes) -> None:
    """Take over a state; ValueError says what is wrong with hostile bytes, nothing is changed
    then."""

def workload_end(workload: Workload) -> None:
    """Tell the threads to end, and do not wait for it; `workload_stop` does."""

def workload_stop(workload: Workload) -> None:
    """Stop and join the threads; the RAM is no longer touched. Idempotent."""

# -- holes --------------------------------------------------------------------------------------

def punch_hole(fd: int, offset: int, size: int) -> None:
    """fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""

# -- postcopy: placing behind a running guest (native/insertion.h) ------------------------------

UFFD_FEATURE_THREAD_ID: int
UFFD_FEATURE_EVENT_FORK: int
HUGE_UNIT_PAGES: int  #: 512: pages of 2 MiB are placed whole

def insert(
    uffd: int,
    address: int,
    unit_pages: int,
    received: Buffer,
    payload: Buffer,
    runs: Buffer,
    run_count: int,
    page_count: int,
) -> tuple[int, int]:
    """Place `payload`, the runs' pages in order, where nothing is yet; return (pages placed, pages
    that were there).

    `uffd` is the guest's own, registered for missing faults where the block begins in the guest,
    at `address`. A running guest sees each page whole or not at all, and is woken. Nothing is ever
    overwritten. `received` bits are set after the pages. All runs, whole units of `unit_pages` (1
    or HUGE_UNIT_PAGES), are checked before the first is placed."""

def insert_zero(
    uffd: int,
    address: int,
    unit_pages: int,
    received: Buffer,
    runs: Buffer,
    run_count: int,
    page_count: int,
) -> int:
    """The runs' pages, which were never placed, are zero: set their `received` bits and wake who
    waits; memory is had when a vCPU touches them. Return how many bits were clear."""

def discard_stale(
    fd: int, received: Buffer, stale: Buffer, page_count: int, unit_pages: int
) -> int:
    """Punch every unit of which a page's `stale` bit is set; return how many pages that were. The
    `received` bits of those units are cleared before, the `stale` bits after. EBUSY: pages are
    still there after the last of several punches. Only before the guest runs: afterwards a page
    may be there, and written, before its bit is set."""

def bitmap_widen(bitmap: Buffer, page_count: int, unit_pages: int) -> int:
    """Set all bits of each unit that has one; return how many were clear."""

# -- postcopy: the services (native/faults.h, native/page_service.h) ----------------------------

FAULTS_WOKEN: int  #: `wake_fd` can be read
FAULTS_NEWS: int  #: `faults_news` has something
FAULTS_LOST: int  #: the connection cannot be used any more; `faults_reason` says why
FAULTS_COMPLETE: int  #: after `faults_fetch_rest`: every page is received; said once
PAGES_WOKEN: int
PAGES_LOST: int

FaultService = NewType("FaultService", object)
"""Capsule: the destination's fault service; holds the buffers that it works in."""

PageService = NewType("PageService", object)
"""Capsule: the source's page service; holds the buffers that it works in."""

def faults_open(
    blocks: list[tuple[int, int, int, int, Buffer]],
    session: bytes,
    statistics: Buffer,
    vcpus: int,
    wants_news: bool,
) -> FaultService:
    """Serve faults of blocks `(uffd, address in the guest, page_count, unit_pages, received)`.

    `statistics` is a page of 64-bit words (engine.postcopy.statistics). `vcpus`: how many threads
    must wait for "all wait", 0 if unknown. With `wants_news`, `faults_run` returns after each fault
    that is within 256 pages of one of the last 16, for `faults_news`."""

def faults_wake_all(service: FaultService) -> None:
    """Have everyone who waits look again: what a killed predecessor had read is heard again."""

def faults_reconnect(service: FaultService) -> None:
    """A new connection, over which OPEN and OPENED went: send open demands again."""

def faults_run(service: FaultService, channel: int, wake_fd: int, wait_ms: int) -> int:
    """Read events, send requests, place answers, for `wait_ms` at most; return FAULTS_ bits, or 0
    when the time is over. `channel` is the connected socket, -1 while there is none.

    OSError: a page cannot be placed (ENOMEM, ENOSPC: no memory; ESRCH, ENOENT: the guest is
    gone)."""

def faults_news(service: FaultService) -> list[tuple[int, int]]:
    """Take the newest faults that asked for a page (64 are kept): (block, page), oldest first."""

def faults_prefetch(service: FaultService, block: int, first_page: int, page_count: int) -> int:
    """Ask in advance for those pages that are neither received nor asked for; return how many.
    Nothing is asked while there is no connection or too much is open."""

def faults_fetch_rest(service: FaultService) -> None:
    """From now on ask for all that is not received, behind everything else."""

def faults_reason(service: FaultService) -> str: ...
def pages_open(
    blocks: list[tuple[int, int, int, Buffer]], session: bytes, statistics: Buffer
) -> PageService:
    """Answer requests for blocks `(RAM descriptor, page_count, unit_pages, dirty)`, whose content
    does not change any more. `statistics` has at least 16 64-bit words."""

def pages_reconnect(service: PageService) -> None:
    """A new connection, over which OPEN and OPENED went."""

def pages_run(service: PageService, channel: int, wake_fd: int, wait_ms: int) -> int:
    """Answer requests for `wait_ms` at most; return PAGES_ bits, or 0 when the time is over.

    OSError: the RAM cannot be read."""

def pages_reason(service: PageService) -> str: ...
def schedule_slice(slice_ns: int) -> None:
    """Ask the scheduler for turns of `slice_ns` for this thread: short ones come sooner after a
    wake-up. Needs no privilege; resets the thread's nice value; not inherited. Kernels before
    Linux 6.12 take no notice."""
