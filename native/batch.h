/* The source's side of a batch: which pages to send next, and their bytes. */
#ifndef RAMFERRY_BATCH_H
#define RAMFERRY_BATCH_H

#include "bitmap.h"
#include "pages.h"

/* One call takes no more pages than this (64 MiB, 8 ms at 8 GB/s), so that a worker which walks
 * zero pages still hears its orders. */
#define BATCH_WALK_PAGES_MAX UINT64_C(16384)

struct batch {
    const unsigned char *ram;
    bitmap_word *dirty;
    bitmap_word *in_flight;
    struct page_slice slice;
    uint64_t pages_max; /* at least 1; zero pages are not counted */
    bool detect_zero;
    uint64_t cursor;       /* in: where to begin; out: where to go on, page_count at the end */
    struct run_table data; /* each with room for at least one run; empty at the start */
    struct run_table zero; /* not used unless detect_zero */
};

/* Take dirty pages of the slice from `cursor` on.
 *
 * For each page: set its in_flight bit, then clear its dirty bit, then look at its content. A crash
 * at any point leaves the page in at least one of the two; a write after the look makes it dirty
 * again. A page whose dirty bit somebody else takes in between is theirs: it is not in a table, and not
 * in flight by this call. Stops when a table is full, pages_max or BATCH_WALK_PAGES_MAX are reached, or at the end. */
void take_batch(struct batch *batch);

/* Copy the runs' pages, in order, to `output`. The caller checked the runs against `ram`. */
void gather(const unsigned char *ram, const unsigned char *runs, size_t run_count,
            unsigned char *output);

#endif
