#define _GNU_SOURCE
#include "delta_cache.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

/* A page may not be replaced by another one for so many generations. */
#define LIFETIME_GENERATIONS 2

/* While pages move to a resized cache, the old memory is given back in pieces of so many. */
#define MOVED_AT_ONCE ((uint64_t)512)

#define ZERO_FLAG (UINT64_C(1) << 63)

struct slot {
    uint64_t key; /* 0: empty; block index + 1, page (32 bits), and ZERO_FLAG: its bytes are not kept */
    uint64_t generation;
};

struct cached_block {
    struct page_slice slice;
    uint64_t first_position; /* positions number the slices' pages, one block after the other */
};

struct delta_cache {
    struct slot *slots;
    unsigned char *pages;
    uint64_t slot_count;
    size_t block_count;
    struct cached_block blocks[];
};

static const unsigned char ZERO_PAGE[PAGE_BYTES];

static uint64_t key_of(uint64_t block_index, uint64_t page)
{
    return (block_index + 1) << 32 | page;
}

/* The page's place among those of the slice, were all stripes whole. */
static uint64_t place_in_slice(const struct page_slice *slice, uint64_t page)
{
    uint64_t stripe = page / slice->stripe_pages;

    return stripe / slice->worker_count * slice->stripe_pages + page % slice->stripe_pages;
}

/* Where a key's page belongs in a cache of so many slots. */
static uint64_t slot_of(const struct delta_cache *cache, uint64_t key, uint64_t slot_count)
{
    const struct cached_block *block = &cache->blocks[((key & ~ZERO_FLAG) >> 32) - 1];

    return (block->first_position + place_in_slice(&block->slice, key & UINT32_MAX)) &
           (slot_count - 1);
}

static unsigned char *slot_page(const struct delta_cache *cache, uint64_t slot)
{
    return cache->pages + slot * PAGE_BYTES;
}

static void *map_lazily(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

/* Give the cache new empty slots; the old ones are the caller's. On failure nothing changed. */
static int map_slots(struct delta_cache *cache, uint64_t slot_count)
{
    struct slot *slots;
    unsigned char *pages;

    if (slot_count == 0 || slot_count > DELTA_SLOTS_MAX || (slot_count & (slot_count - 1)) != 0)
        return -EINVAL;
    slots = map_lazily(slot_count * sizeof *slots);
    if (!slots)
        return -ENOMEM;
    pages = map_lazily(slot_count * PAGE_BYTES);
    if (!pages) {
        munmap(slots, slot_count * sizeof *slots);
        return -ENOMEM;
    }
    cache->slots = slots;
    cache->pages = pages;
    cache->slot_count = slot_count;
    return 0;
}

static void unmap_slots(struct slot *slots, unsigned char *pages, uint64_t slot_count)
{
    munmap(slots, slot_count * sizeof *slots);
    munmap(pages, slot_count * PAGE_BYTES);
}

int delta_cache_new(struct delta_cache **made, const struct page_slice *blocks,
                    size_t block_count, uint64_t slot_count)
{
    struct delta_cache *cache;
    uint64_t position = 0;
    int rc;

    if (block_count > DELTA_BLOCKS_MAX)
        return -EINVAL;
    cache = malloc(sizeof *cache + block_count * sizeof cache->blocks[0]);
    if (!cache)
        return -ENOMEM;
    rc = map_slots(cache, slot_count);
    if (rc < 0) {
        free(cache);
        return rc;
    }
    cache->block_count = block_count;
    for (size_t i = 0; i < block_count; ++i) {
        cache->blocks[i] = (struct cached_block){blocks[i], position};
        if (blocks[i].page_count > 0)
            position += (place_in_slice(&blocks[i], blocks[i].page_count - 1) /
                             blocks[i].stripe_pages + 1) * blocks[i].stripe_pages;
    }
    *made = cache;
    return 0;
}

void delta_cache_free(struct delta_cache *cache)
{
    if (!cache)
        return;
    unmap_slots(cache->slots, cache->pages, cache->slot_count);
    free(cache);
}

/* Take one slot of the old cache over, unless a page sent later has its place. */
static void move_slot(struct delta_cache *cache, const struct slot *old, const unsigned char *page)
{
    uint64_t index = slot_of(cache, old->key, cache->slot_count);
    struct slot *slot = &cache->slots[index];

    if (slot->key != 0 && slot->generation > old->generation)
        return;
    *slot = *old;
    if (!(old->key & ZERO_FLAG))
        memcpy(slot_page(cache, index), page, PAGE_BYTES);
}

int delta_cache_resize(struct delta_cache *cache, uint64_t slot_count)
{
    struct slot *slots = cache->slots;
    unsigned char *pages = cache->pages;
    uint64_t old_count = cache->slot_count;
    int rc;

    if (slot_count == old_count)
        return 0;
    rc = map_slots(cache, slot_count);
    if (rc < 0)
        return rc;
    for (uint64_t i = 0; i < old_count; ++i) {
        if (slots[i].key != 0)
            move_slot(cache, &slots[i], pages + i * PAGE_BYTES);
        if ((i + 1) % MOVED_AT_ONCE == 0)
            madvise(pages + (i + 1 - MOVED_AT_ONCE) * PAGE_BYTES, MOVED_AT_ONCE * PAGE_BYTES,
                    MADV_DONTNEED);
    }
    unmap_slots(slots, pages, old_count);
    return 0;
}

void delta_cache_forget(struct delta_cache *cache)
{
    /* Private anonymous memory reads as zero afterwards: every slot is empty. */
    if (madvise(cache->slots, cache->slot_count * sizeof *cache->slots, MADV_DONTNEED) < 0)
        memset(cache->slots, 0, cache->slot_count * sizeof *cache->slots); /* it was locked */
    madvise(cache->pages, cache->slot_count * PAGE_BYTES, MADV_DONTNEED);
}

uint64_t delta_cache_slots(const struct delta_cache *cache)
{
    return cache->slot_count;
}

const struct page_slice *delta_cache_block(const struct delta_cache *cache, uint64_t index)
{
    return index < cache->block_count ? &cache->blocks[index].slice : NULL;
}

/* Whether a page that misses may have the slot. */
static bool may_take(const struct slot *slot, uint64_t key, uint64_t generation)
{
    return slot->key == 0 || (slot->key & ~ZERO_FLAG) == key ||
           generation >= LIFETIME_GENERATIONS + slot->generation;
}

static void append_full(struct delta_batch *batch, uint64_t page)
{
    run_table_append(&batch->full, page, 1); /* its copy is where it belongs already */
}

static void append_delta(struct delta_batch *batch, uint64_t page, size_t length)
{
    uint16_t field = (uint16_t)length;

    memcpy(batch->deltas + batch->deltas_size, &field, DELTA_LENGTH_BYTES);
    batch->deltas_size += DELTA_LENGTH_BYTES + length;
    run_table_append(&batch->delta, page, 1);
}

/* `copy` is a page of this key, in the place of the next full page. */
static void deal_hit(struct delta_cache *cache, struct delta_batch *batch, uint64_t slot_index,
                     uint64_t page, const unsigned char *copy, xbzrle_encode_fn *encode)
{
    struct slot *slot = &cache->slots[slot_index];
    unsigned char *kept = slot_page(cache, slot_index);
    const unsigned char *old_page = slot->key & ZERO_FLAG ? ZERO_PAGE : kept;
    size_t length = encode(old_page, copy, batch->deltas + batch->deltas_size + DELTA_LENGTH_BYTES,
                           batch->delta_bytes_max);

    slot->generation = batch->generation;
    if (length == 0) {
        ++batch->unchanged_pages;
        return;
    }
    memcpy(kept, copy, PAGE_BYTES);
    slot->key &= ~ZERO_FLAG;
    if (length != XBZRLE_OVERFLOW) {
        append_delta(batch, page, length);
        return;
    }
    ++batch->overflow_pages;
    append_full(batch, page);
}

static void deal_page(struct delta_cache *cache, struct delta_batch *batch, uint64_t page,
                      xbzrle_encode_fn *encode)
{
    unsigned char *copy = batch->full_pages + batch->full.pages * PAGE_BYTES;
    uint64_t key = key_of(batch->block_index, page);
    uint64_t slot_index = slot_of(cache, key, cache->slot_count);
    struct slot *slot = &cache->slots[slot_index];

    memcpy(copy, batch->ram + page * PAGE_BYTES, PAGE_BYTES);
    atomic_signal_fence(memory_order_seq_cst); /* the compiler shall not read the RAM again */
    if ((slot->key & ~ZERO_FLAG) == key) {
        deal_hit(cache, batch, slot_index, page, copy, encode);
        return;
    }
    ++batch->miss_pages;
    if (may_take(slot, key, batch->generation)) {
        memcpy(slot_page(cache, slot_index), copy, PAGE_BYTES);
        *slot = (struct slot){key, batch->generation};
    }
    append_full(batch, page);
}

void delta_batch(struct delta_cache *cache, struct delta_batch *batch, const unsigned char *runs,
                 size_t run_count)
{
    xbzrle_encode_fn *encode = xbzrle_default();

    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t n = 0; n < run.page_count; ++n)
            deal_page(cache, batch, run.first_page + n, encode);
    }
}

void delta_cache_set_zero(struct delta_cache *cache, uint64_t block_index, uint64_t generation,
                          const unsigned char *runs, size_t run_count)
{
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t n = 0; n < run.page_count; ++n) {
            uint64_t key = key_of(block_index, run.first_page + n);
            struct slot *slot = &cache->slots[slot_of(cache, key, cache->slot_count)];

            if (may_take(slot, key, generation))
                *slot = (struct slot){key | ZERO_FLAG, generation};
        }
    }
}

bool delta_cache_get(const struct delta_cache *cache, uint64_t block_index, uint64_t page,
                     unsigned char *output)
{
    uint64_t key = key_of(block_index, page);
    uint64_t index = slot_of(cache, key, cache->slot_count);

    if ((cache->slots[index].key & ~ZERO_FLAG) != key)
        return false;
    memcpy(output, cache->slots[index].key & ZERO_FLAG ? ZERO_PAGE : slot_page(cache, index),
           PAGE_BYTES);
    return true;
}
