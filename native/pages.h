/* Pages, slices and run tables: what all kernels share.
 *
 * Page indices count 4096-byte pages from the start of one RAM block; a block has at most 2^32. */
#ifndef RAMFERRY_PAGES_H
#define RAMFERRY_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PAGE_BYTES ((size_t)4096)
#define PAGE_COUNT_MAX (UINT64_C(1) << 32)

/* A slice: the pages p < page_count with (p / stripe_pages) % worker_count == worker_index. */
struct page_slice {
    uint64_t page_count;
    uint64_t stripe_pages; /* a positive multiple of 64: a bitmap word has one worker */
    uint64_t worker_index;
    uint64_t worker_count;
};

struct page_range {
    uint64_t first_page;
    uint64_t page_count;
};

#define STRIPE_PAGES_MAX PAGE_COUNT_MAX
#define WORKER_COUNT_MAX UINT64_C(65536) /* with both maxima, a stripe's end still fits 64 bits */

/* Whether the slice keeps the rules above; every other function takes this for granted. */
bool slice_is_valid(const struct page_slice *slice);

/* Find the slice's first contiguous range at or after page `from`; false at its end.
 * With one worker the range is all the rest. Walk: from = range.first_page + range.page_count. */
bool slice_next(const struct page_slice *slice, uint64_t from, struct page_range *range);

/* A run table is bytes: little-endian (uint32 first_page, uint32 page_count) pairs, unaligned. */
#define RUN_BYTES ((size_t)8)

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "run tables are read as they lie");

static inline struct page_range run_at(const unsigned char *runs, size_t index)
{
    uint32_t words[2];
    memcpy(words, runs + index * RUN_BYTES, RUN_BYTES);
    return (struct page_range){words[0], words[1]};
}

/* Check that each of `run_count` runs has pages and ends within `page_count`.
 *
 * Returns 0 and the sum of pages, or -EINVAL and the index of the first bad run. */
int runs_check(const unsigned char *runs, size_t run_count, uint64_t page_count,
               uint64_t *total_pages, size_t *bad_run);

enum { PACKET_TABLES = 5 };

/* Check the run tables of one packet: planes, encoded, gathered, direct and zero runs. Each must be
 * ascending by itself, and no page may be in two runs, whichever their tables. Runs are whole units.
 *
 * Returns 0, or -EINVAL when a run is empty, ends behind `page_count`, cuts a unit, or has a page that
 * was there before or comes out of order; `bad` is that run. */
struct packet_runs {
    const unsigned char *tables[PACKET_TABLES];
    size_t counts[PACKET_TABLES];
};

int packet_runs_check(const struct packet_runs *runs, uint64_t page_count, uint64_t unit_pages,
                      struct page_range *bad);

/* A run table being written. `bytes` belongs to the caller; nothing is written past `capacity`. */
struct run_table {
    unsigned char *bytes;
    size_t capacity;
    size_t count;
    uint64_t pages;
    struct page_range last; /* the run that `count` ends with */
};

/* Whether `first_page` continues the last run. */
bool run_table_continues(const struct run_table *table, uint64_t first_page);

/* Append pages, as part of the last run when adjacent. The caller made sure that there is room. */
void run_table_append(struct run_table *table, uint64_t first_page, uint64_t page_count);

#endif
