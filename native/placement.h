/* The destination's side of a batch: put pages into RAM, or make them zero.
 *
 * A clear `placed` bit means: nobody wrote this page, it is a hole or reads as zero. A set bit means:
 * it has memory (but for the instant between bit and content, when a process may be killed). */
#ifndef RAMFERRY_PLACEMENT_H
#define RAMFERRY_PLACEMENT_H

#include "bitmap.h"
#include "pages.h"

struct placement {
    int uffd;               /* -1: everything goes through `ram` */
    uint64_t fresh_address; /* a mapping of the same RAM, registered for missing faults on uffd */
    unsigned char *ram;     /* a mapping that is not registered, page-aligned */
    bitmap_word *placed;
};

struct placed_pages {
    uint64_t fresh;  /* by UFFDIO_COPY */
    uint64_t copied; /* by memcpy */
};

/* Put `payload`, the pages of the runs in order, into RAM. The caller checked the runs against the
 * RAM and the payload. A page's bit is set before its content is written.
 *
 * A full file system is an error, never SIGBUS: memory is had by UFFDIO_COPY or
 * MADV_POPULATE_WRITE before a byte is copied where no page may be. Pages with a set bit are copied
 * into with no system call.
 *
 * Returns 0, or -ENOMEM or -ENOSPC when memory ran out, or -errno. After an error the pages before
 * the failing one are placed, the others of the call have their old content and old bits. */
int place_runs(const struct placement *to, const unsigned char *payload,
               const unsigned char *runs, size_t run_count, struct placed_pages *counts);

/* Make the runs' pages, in order, what a batch of deltas (xbzrle.h) says. The caller checked the runs,
 * of `page_count` pages, against the RAM; the deltas are all checked before a byte is written.
 *
 * A page whose bit is clear reads as zero; its bit is set and it is given memory before the delta is
 * applied. Returns 0, or -EINVAL and the index of the first wrong delta (`page_count`: bytes are left
 * over), or -ENOMEM or -ENOSPC or -errno; the pages before the failing one then have their deltas. */
int place_deltas(const struct placement *to, const unsigned char *deltas, size_t size,
                 const unsigned char *runs, size_t run_count, uint64_t page_count,
                 uint64_t *bad_delta);

/* Zero the runs' pages whose bit is set; return how many. The caller checked the runs. */
uint64_t clear_runs(unsigned char *ram, const bitmap_word *placed, const unsigned char *runs,
                    size_t run_count);

#endif
