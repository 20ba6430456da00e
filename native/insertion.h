/* Postcopy's way of placing pages: a running guest sees a page not at all, or whole.
 *
 * UFFDIO_COPY through the guest's own userfaultfd puts a finished page into the page cache and the
 * guest's page tables, and wakes who waits for it. It never overwrites: EEXIST says that the page is
 * there, and the guest may have written it since. So a page is placed once, whoever is first, and a
 * process may be killed at any instant. See docs/decisions/0005-postcopy-placement.md. */
#ifndef RAMFERRY_INSERTION_H
#define RAMFERRY_INSERTION_H

#include "bitmap.h"

#define HUGE_UNIT_PAGES ((uint64_t)512) /* 2 MiB: the largest page that can be placed */

struct insertion {
    int uffd;              /* the guest's; registered for missing faults where the block is mapped */
    uint64_t address;      /* of the block in the guest */
    uint64_t unit_pages;   /* 1, or HUGE_UNIT_PAGES: placed together, from a multiple of it on */
    bitmap_word *received; /* a set bit: the page is there, or reads as zero */
};

struct inserted_pages {
    uint64_t fresh;   /* by this call */
    uint64_t present; /* were there already */
};

/* Whether all pages [first_page, first_page + page_count) are received. */
bool is_received(const bitmap_word *received, uint64_t first_page, uint64_t page_count);

/* Place pages [first_page, first_page + page_count), whole units, from `payload` (NULL: zeros), and
 * wake who waits for them, also where they were there already. Bits are set after the pages.
 *
 * Returns 0 or -errno: -ENOMEM or -ENOSPC when memory ran out, -ESRCH or -ENOENT when the guest or
 * its mapping is gone, -EAGAIN when its mappings do not stop changing. Pages before the failing one
 * are placed then. */
int insert_pages(const struct insertion *to, const unsigned char *payload, uint64_t first_page,
                 uint64_t page_count, struct inserted_pages *counts);

/* insert_pages for a packet's runs, which the caller checked; what is received is passed over. */
int insert_runs(const struct insertion *to, const unsigned char *payload,
                const unsigned char *runs, size_t run_count, struct inserted_pages *counts);

/* The runs' pages, never placed before, are zero: they stay holes that a fault will fill. Sets their
 * bits, wakes who waits; returns how many bits were clear, or -errno. */
int64_t insert_zero_runs(const struct insertion *to, const unsigned char *runs, size_t run_count);

/* Wake who waits for the pages; they look again. Returns 0 or -errno. */
int wake_pages(const struct insertion *to, uint64_t first_page, uint64_t page_count);

/* Free the units of `fd` of which any page is stale, before the guest runs. Their received bits are
 * cleared before, their stale bits after: whoever is killed in between leaves them to be freed again.
 *
 * Returns how many pages were freed, or -errno; -EBUSY: pages stay that were punched, again and again. Moves
 * the descriptor's position. */
int64_t discard_stale(int fd, bitmap_word *received, bitmap_word *stale, uint64_t page_count,
                      uint64_t unit_pages);

/* Set all bits of each unit that has one: the source's half of freeing units whole. Returns how many
 * were clear. */
uint64_t bitmap_widen(bitmap_word *bitmap, uint64_t page_count, uint64_t unit_pages);

#endif
