/* What the destination has of a sender's pages, so that a page written again goes as a delta.
 *
 * QEMU's cache: direct-mapped; a slot holds a copy of one page and the generation (round) when it was
 * last sent. A page that misses takes its slot, but not from another page of this generation or the
 * one before. One thread at a time uses a cache.
 *
 * The copies are true as long as all that is sent of these pages goes through here, in order: tell of
 * zero pages and of pages sent another way, and forget all when it is not known what arrived. */
#ifndef RAMFERRY_DELTA_CACHE_H
#define RAMFERRY_DELTA_CACHE_H

#include "pages.h"
#include "xbzrle.h"

#define DELTA_BLOCKS_MAX ((size_t)65536)
#define DELTA_SLOTS_MAX PAGE_COUNT_MAX

/* One call takes no more pages than this: a batch. */
#define DELTA_PAGES_MAX UINT64_C(512)

struct delta_cache;

/* Make an empty cache of `slot_count` pages, a power of two up to DELTA_SLOTS_MAX, for the slices that
 * one worker has of `block_count` RAM blocks. Memory is taken page by page when it is used.
 * Returns 0, -EINVAL or -ENOMEM. */
int delta_cache_new(struct delta_cache **cache, const struct page_slice *blocks,
                    size_t block_count, uint64_t slot_count);

/* Free it; NULL is allowed. */
void delta_cache_free(struct delta_cache *cache);

/* Change the number of slots, keeping the pages that fit: of two for one slot the one sent later.
 * Returns 0, or -EINVAL or -ENOMEM, and nothing changed then. */
int delta_cache_resize(struct delta_cache *cache, uint64_t slot_count);

/* Forget all pages and give their memory back. */
void delta_cache_forget(struct delta_cache *cache);

uint64_t delta_cache_slots(const struct delta_cache *cache);

/* The slice of block `index`, or NULL. */
const struct page_slice *delta_cache_block(const struct delta_cache *cache, uint64_t index);

struct delta_batch {
    const unsigned char *ram; /* of the block; may be written meanwhile */
    uint64_t block_index;
    uint64_t generation;
    size_t delta_bytes_max; /* a longer delta overflows: 1 to DELTA_BYTES_MAX */
    unsigned char *full_pages;
    unsigned char *deltas;
    struct run_table full; /* both with room for a run of each page; empty at the start */
    struct run_table delta;
    size_t deltas_size;
    uint64_t miss_pages;      /* full, because not in the cache */
    uint64_t overflow_pages;  /* full, because the delta was too long */
    uint64_t unchanged_pages; /* in neither table */
};

/* Deal the runs' pages to `full`, with their bytes in `full_pages`, and `delta`, with `deltas`.
 *
 * Each page is read once, into a copy that is what is compared, sent and kept. The caller checked the
 * runs against block and RAM, and made room: a page in `full_pages`, and DELTA_LENGTH_BYTES +
 * delta_bytes_max in `deltas`, for each page. */
void delta_batch(struct delta_cache *cache, struct delta_batch *batch, const unsigned char *runs,
                 size_t run_count);

/* The runs' pages are sent as zero pages now; they come into the cache, taking no memory, by the same
 * rule. The caller checked the runs against the block. */
void delta_cache_set_zero(struct delta_cache *cache, uint64_t block_index, uint64_t generation,
                          const unsigned char *runs, size_t run_count);

/* Copy what the cache has of a page to `output`; false when it has nothing. */
bool delta_cache_get(const struct delta_cache *cache, uint64_t block_index, uint64_t page,
                     unsigned char *output);

#endif
