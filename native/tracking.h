/* Dirty tracking through /proc/PID/pagemap of the process that writes the RAM. */
#ifndef RAMFERRY_TRACKING_H
#define RAMFERRY_TRACKING_H

#include "bitmap.h"
#include "pages.h"

/* 1 when the running kernel knows PAGEMAP_SCAN as linux_abi.h says it, 0 when not, or -errno. */
int pagemap_scan_supported(int pagemap_fd);

/* Read and re-arm the slice's pages from `first_page` on, of the RAM at `address` in the tracked
 * process; set the bits of those written since the last call.
 *
 * Memory is never touched or allocated. The kernel cannot tell a page that was never touched from one
 * that was written and dropped from the page tables, so the first scan may report holes: all of them
 * (Linux 6.18.44: it arms them too, in page tables of 2 MiB a GiB) or those that share a page table
 * with touched pages (Linux 6.7). Later a page is reported when touched, not before.
 *
 * Returns the pages found written, or -EPERM when the range is not registered for asynchronous
 * write-protection, -ESRCH when the process is gone, -errno otherwise. Whatever the kernel reported
 * before an error is in the bitmap. If *this* process dies in the call, what was re-armed but not
 * yet in the bitmap is lost: the slice must then count as dirty. */
int64_t pagemap_scan(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                     const struct page_slice *slice, uint64_t first_page);

/* The same, and nothing is re-armed: the next scan reports these pages again, written or not. */
int64_t pagemap_peek(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                     const struct page_slice *slice, uint64_t first_page);

/* Set the bits of the slice's pages from `first_page` on whose pagemap entry says soft-dirty; nothing
 * is re-armed. Returns the pages found, -ESRCH when the process is gone, or -errno. */
int64_t soft_dirty_scan(int pagemap_fd, uint64_t address, bitmap_word *bitmap,
                        const struct page_slice *slice, uint64_t first_page);

#endif
