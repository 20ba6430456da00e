#define _GNU_SOURCE
#include "tracking.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "linux_abi.h"

/* 48 KiB of regions: a scan of alternating pages returns to us every 16 MiB. */
#define REGIONS_MAX ((size_t)2048)
#define ENTRIES_MAX ((size_t)2048)
/* A look ahead goes through everybody's stripes: so many workers may do that and still gain. */
#define AHEAD_WORKERS_MAX UINT64_C(8)

struct scan {
    int pagemap_fd;
    uint64_t address; /* of page 0 in the tracked process */
    bitmap_word *bitmap;
    uint64_t flags;                 /* PAGEMAP_SCAN_WP_MATCHING, or 0 */
    struct pagemap_region *regions; /* REGIONS_MAX of them, all zero between two calls */
    uint64_t found;
};

/* What we always ask for; the kernel has a fast path for exactly these masks. */
static struct pagemap_scan_request written_pages(uint64_t start, uint64_t end,
                                                 struct pagemap_region *regions, size_t region_count)
{
    return (struct pagemap_scan_request){
        .size = sizeof(struct pagemap_scan_request),
        .flags = PAGEMAP_SCAN_CHECK_WPASYNC,
        .start = start,
        .end = end,
        .regions = (uint64_t)(uintptr_t)regions,
        .region_count = region_count,
        .category_mask = PAGEMAP_PAGE_IS_WRITTEN,
        .return_mask = PAGEMAP_PAGE_IS_WRITTEN,
    };
}

int pagemap_scan_supported(int pagemap_fd)
{
    struct pagemap_scan_request request = {.size = sizeof request};

    if (ioctl(pagemap_fd, PAGEMAP_SCAN_REQUEST, &request) >= 0)
        return 1;
    return errno == ENOTTY || errno == EINVAL ? 0 : -errno;
}

/* Move what the kernel wrote into the bitmap. After an error nobody says how many regions there are,
 * but their pages are armed again already: so look until the first that is still zero. */
static void note_regions(struct scan *scan, uint64_t start, uint64_t end)
{
    for (size_t i = 0; i < REGIONS_MAX && scan->regions[i].end != 0; ++i) {
        struct pagemap_region *region = &scan->regions[i];

        if (region->start >= start && region->end <= end && region->start < region->end) {
            uint64_t page_count = (region->end - region->start) / PAGE_BYTES;

            bitmap_set_range(scan->bitmap, (region->start - scan->address) / PAGE_BYTES, page_count);
            scan->found += page_count;
        }
        *region = (struct pagemap_region){0, 0, 0};
    }
}

static int scan_range(struct scan *scan, struct page_range range)
{
    uint64_t start = scan->address + range.first_page * PAGE_BYTES;
    const uint64_t end = start + range.page_count * PAGE_BYTES;
    /* No more than there can be: the kernel makes room for them, and zeroes it. */
    const size_t region_count =
        range.page_count / 2 < REGIONS_MAX ? (size_t)(range.page_count / 2) + 1 : REGIONS_MAX;

    while (start < end) {
        struct pagemap_scan_request request =
            written_pages(start, end, scan->regions, region_count);
        int rc, error;

        request.flags |= scan->flags;
        rc = ioctl(scan->pagemap_fd, PAGEMAP_SCAN_REQUEST, &request);
        error = rc < 0 ? errno : 0;
        note_regions(scan, start, end);
        if (error == EINTR)
            continue; /* where it stopped is not told reliably; what is armed is found clean */
        if (error != 0)
            return -error;
        if (scan->flags == 0 && (size_t)rc < region_count)
            return 0; /* that was all; walk_end says less where nothing is armed (Linux 6.18.44) */
        if (request.walk_end > end || request.walk_end <= start)
            return -EIO; /* the kernel made no progress; never loop for ever */
        start = request.walk_end;
    }
    return 0;
}

/* The first page at or after `page` that may be written, whoever's it is; `page_count`: none. Nothing
 * is re-armed. -EPERM also where only another worker's memory is not registered: its scan cannot go on
 * either. */
static int64_t look_ahead(const struct scan *scan, uint64_t page, uint64_t page_count)
{
    struct pagemap_region first = {0, 0, 0};
    struct pagemap_scan_request request =
        written_pages(scan->address + page * PAGE_BYTES, scan->address + page_count * PAGE_BYTES,
                      &first, 1);
    int rc;

    request.pages_max = 1;
    rc = ioctl(scan->pagemap_fd, PAGEMAP_SCAN_REQUEST, &request);
    if (rc < 0)
        return errno == EINTR ? (int64_t)page : -errno;
    if (rc == 0 && request.walk_end == request.end)
        return (int64_t)page_count;
    if (rc == 0 || first.start < request.start || first.start >= request.end)
        return (int64_t)page;
    return (int64_t)((first.start - scan->address) / PAGE_BYTES);
}

/* Each call costs the kernel as much as 512 clean pages, and a stripe may have 256: so behind one in
 * which nothing was found, skip as far as nobody wrote. */
static int scan_slice(struct scan *scan, const struct page_slice *slice, uint64_t first_page)
{
    const bool looks_ahead = slice->worker_count > 1 && slice->worker_count <= AHEAD_WORKERS_MAX;
    bool is_clean = true; /* the last range */
    struct page_range range;
    int rc = 0;

    for (uint64_t from = first_page; rc == 0 && slice_next(slice, from, &range);) {
        const uint64_t end = range.first_page + range.page_count, found = scan->found;

        const int64_t next = looks_ahead && is_clean
                                 ? look_ahead(scan, range.first_page, slice->page_count)
                                 : (int64_t)range.first_page;

        if (next < 0)
            return (int)next;
        from = (uint64_t)next;
        if (from >= end)
            continue;
        rc = scan_range(scan, range);
        is_clean = scan->found == found;
        from = end;
    }
    return rc;
}

/* An exited process has no mappings left, so every scan of it would find "nothing written". */
static int process_is_alive(int pagemap_fd, uint64_t address)
{
    uint64_t entry;
    ssize_t size = pread(pagemap_fd, &entry, sizeof entry, (off_t)(address / PAGE_BYTES * 8));

    if (size < 0)
        return -errno;
    return size == 0 ? -ESRCH : 0;
}

static int64_t scan_written(struct scan scan, const struct page_slice *slice, uint64_t first_page)
{
    int rc;

    scan.regions = calloc(REGIONS_MAX, sizeof *scan.regions);
    if (!scan.regions)
        return -ENOMEM;
    rc = scan_slice(&scan, slice, first_page);
    free(scan.regions);
    if (rc == 0)
        rc = process_is_alive(scan.pagemap_fd, scan.address);
    return rc < 0 ? rc : (int64_t)scan.found;
}

int64_t pagemap_scan(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                     const struct page_slice *slice, uint64_t first_page)
{
    return scan_written((struct scan){.pagemap_fd = pagemap_fd,
                                      .address = address,
                                      .bitmap = bitmap,
                                      .flags = PAGEMAP_SCAN_WP_MATCHING},
                        slice, first_page);
}

int64_t pagemap_peek(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                     const struct page_slice *slice, uint64_t first_page)
{
    return scan_written(
        (struct scan){.pagemap_fd = pagemap_fd, .address = address, .bitmap = bitmap}, slice,
        first_page);
}

/* Set the bits of soft-dirty entries, contiguous ones together; return how many there are. */
static uint64_t note_entries(bitmap_word *bitmap, const uint64_t *entries, uint64_t first_page,
                             size_t count)
{
    uint64_t found = 0;

    for (size_t i = 0, end; i < count; i = end + 1) {
        for (end = i; end < count && (entries[end] & PAGEMAP_ENTRY_SOFT_DIRTY);)
            ++end;
        bitmap_set_range(bitmap, first_page + i, end - i);
        found += end - i;
    }
    return found;
}

static int64_t soft_dirty_range(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                                struct page_range range)
{
    uint64_t entries[ENTRIES_MAX], found = 0;

    while (range.page_count > 0) {
        size_t wanted = range.page_count < ENTRIES_MAX ? (size_t)range.page_count : ENTRIES_MAX;
        uint64_t at = (address / PAGE_BYTES + range.first_page) * sizeof entries[0];
        ssize_t size = pread(pagemap_fd, entries, wanted * sizeof entries[0], (off_t)at);

        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0)
            return -errno;
        if ((size_t)size < sizeof entries[0])
            return -ESRCH;
        wanted = (size_t)size / sizeof entries[0];
        found += note_entries(bitmap, entries, range.first_page, wanted);
        range.first_page += wanted;
        range.page_count -= wanted;
    }
    return (int64_t)found;
}

int64_t soft_dirty_scan(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                        const struct page_slice *slice, uint64_t first_page)
{
    struct page_range range;
    int64_t found = 0;

    for (uint64_t from = first_page; slice_next(slice, from, &range);) {
        int64_t rc = soft_dirty_range(pagemap_fd, address, bitmap, range);

        if (rc < 0)
            return rc;
        found += rc;
        from = range.first_page + range.page_count;
    }
    return found;
}
