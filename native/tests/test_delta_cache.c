/* The cache's policy, and that source, cache and destination never differ, whatever happens between. */
#include "delta_cache.h"

#include <errno.h>

#include "check.h"
#include "placement.h"

#define PAGES ((uint64_t)256)
#define BATCH ((uint64_t)64)

static unsigned char *source, *target, full_pages[BATCH * PAGE_BYTES];
static unsigned char deltas[BATCH * (DELTA_LENGTH_BYTES + DELTA_BYTES_MAX)];
static unsigned char full_runs[BATCH * RUN_BYTES], delta_runs[BATCH * RUN_BYTES];
static bitmap_word placed[PAGES / 64];
static const struct page_slice ALL = {PAGES, 64, 0, 1};
static struct delta_batch batch;

static void deal(struct delta_cache *cache, uint64_t generation, uint32_t first, uint32_t count)
{
    const uint32_t run[] = {first, count};

    batch = (struct delta_batch){
        .ram = source,
        .generation = generation,
        .delta_bytes_max = DELTA_BYTES_MAX,
        .full_pages = full_pages,
        .deltas = deltas,
        .full = {.bytes = full_runs, .capacity = BATCH},
        .delta = {.bytes = delta_runs, .capacity = BATCH},
    };
    delta_batch(cache, &batch, (const unsigned char *)run, 1);
    CHECK(batch.full.pages + batch.delta.pages + batch.unchanged_pages == count);
    CHECK(batch.full.pages == batch.miss_pages + batch.overflow_pages);
}

/* What the last batch sends, done at the destination. */
static void deliver(void)
{
    const struct placement to = {-1, 0, target, placed};
    struct placed_pages counts;
    uint64_t bad;

    CHECK(place_runs(&to, full_pages, full_runs, batch.full.count, &counts) == 0);
    CHECK(place_deltas(&to, deltas, batch.deltas_size, delta_runs, batch.delta.count,
                       batch.delta.pages, &bad) == 0);
}

static struct delta_cache *new_cache(const struct page_slice *block, uint64_t slot_count)
{
    struct delta_cache *cache;

    CHECK(delta_cache_new(&cache, block, 1, slot_count) == 0);
    return cache;
}

static void hits_misses_and_overflows(void)
{
    struct delta_cache *cache = new_cache(&ALL, PAGES);

    memset(source, 0, PAGES * PAGE_BYTES);
    source[0] = 1;
    deal(cache, 1, 0, 1);
    CHECK(batch.miss_pages == 1);
    deal(cache, 2, 0, 1);
    CHECK(batch.unchanged_pages == 1 && batch.full.pages == 0);
    source[100] = 7;
    deal(cache, 3, 0, 1);
    CHECK(batch.delta.pages == 1 && batch.deltas_size == 5);
    CHECK(memcmp(deltas, "\x03\x00\x64\x01\x07", 5) == 0);
    for (size_t at = 0; at < PAGE_BYTES; at += 2)
        ++source[at];
    deal(cache, 4, 0, 1);
    CHECK(batch.overflow_pages == 1 && batch.delta.pages == 0);
    CHECK(memcmp(full_pages, source, PAGE_BYTES) == 0);
    deal(cache, 5, 0, 1);
    CHECK(batch.unchanged_pages == 1); /* the full page came into the cache */
    delta_cache_free(cache);
}

/* Two pages of one slot: the one that is there stays for two generations. */
static void a_young_page_keeps_its_slot(void)
{
    struct delta_cache *cache = new_cache(&ALL, 64);
    unsigned char page[PAGE_BYTES];

    deal(cache, 10, 3, 1);
    deal(cache, 10, 67, 1);
    CHECK(delta_cache_get(cache, 0, 3, page) && !delta_cache_get(cache, 0, 67, page));
    deal(cache, 11, 3, 1); /* a hit: young again */
    deal(cache, 12, 67, 1);
    CHECK(delta_cache_get(cache, 0, 3, page));
    deal(cache, 13, 67, 1);
    CHECK(delta_cache_get(cache, 0, 67, page) && !delta_cache_get(cache, 0, 3, page));
    delta_cache_set_zero(cache, 0, 14, (const unsigned char *)(const uint32_t[]){3, 1}, 1);
    CHECK(delta_cache_get(cache, 0, 67, page)); /* zero pages keep the rule */
    delta_cache_set_zero(cache, 0, 15, (const unsigned char *)(const uint32_t[]){3, 1}, 1);
    CHECK(delta_cache_get(cache, 0, 3, page) && page[0] == 0);
    delta_cache_free(cache);
}

/* All pages of a slice fit a cache of its size, wherever the other workers' stripes lie between. */
static void a_slice_fills_its_cache_without_conflicts(void)
{
    const struct page_slice slices[2] = {{PAGES, 64, 1, 2}, {PAGES, 64, 1, 2}};
    struct delta_cache *cache;
    unsigned char page[PAGE_BYTES];

    CHECK(delta_cache_new(&cache, slices, 2, PAGES) == 0);
    for (uint64_t block = 0; block < 2; ++block) {
        for (uint32_t first = 64; first < PAGES; first += 128) {
            const uint32_t run[] = {first, 64};

            delta_cache_set_zero(cache, block, 1, (const unsigned char *)run, 1);
        }
    }
    for (uint64_t block = 0; block < 2; ++block)
        for (uint64_t n = 0; n < PAGES; ++n)
            CHECK(delta_cache_get(cache, block, n, page) == (n / 64 % 2 == 1));
    delta_cache_free(cache);
}

static void impossible_sizes_are_refused(void)
{
    struct delta_cache *cache = new_cache(&ALL, 2), *none;

    CHECK(delta_cache_new(&none, &ALL, 1, 0) == -EINVAL);
    CHECK(delta_cache_new(&none, &ALL, 1, 3) == -EINVAL);
    CHECK(delta_cache_new(&none, &ALL, DELTA_BLOCKS_MAX + 1, 1) == -EINVAL);
    CHECK(delta_cache_resize(cache, 2 * DELTA_SLOTS_MAX) == -EINVAL);
    CHECK(delta_cache_resize(cache, 6) == -EINVAL && delta_cache_slots(cache) == 2);
    delta_cache_free(cache);
    delta_cache_free(NULL);
}

static void change_page(uint64_t page, uint64_t *state)
{
    unsigned char *bytes = source + page * PAGE_BYTES;

    switch (random_below(state, 4)) {
    case 0:
        for (size_t i = 0; i < PAGE_BYTES; ++i)
            bytes[i] = (unsigned char)random_word(state);
        break;
    case 1:
        memset(bytes, 0, PAGE_BYTES);
        break;
    case 2:
        break;
    default:
        for (uint64_t i = random_below(state, 40); i > 0; --i)
            bytes[random_below(state, PAGE_BYTES)] = (unsigned char)random_word(state);
    }
}

/* What the cache has of a page is what the destination has. */
static void check_cache(const struct delta_cache *cache)
{
    unsigned char page[PAGE_BYTES];

    for (uint64_t i = 0; i < PAGES; ++i)
        CHECK(!delta_cache_get(cache, 0, i, page) ||
              memcmp(page, target + i * PAGE_BYTES, PAGE_BYTES) == 0);
}

/* Random writes, batches, zero pages, pages sent another way, resizes and losses. */
static void the_destination_always_has_what_was_sent(uint64_t *state)
{
    struct delta_cache *cache = new_cache(&ALL, 64);
    uint64_t delta_pages = 0;

    memset(source, 0, PAGES * PAGE_BYTES);
    memset(target, 0, PAGES * PAGE_BYTES);
    memset((void *)placed, 0, sizeof placed);
    for (uint64_t step = 0; step < 1000; ++step) {
        uint32_t first = (uint32_t)random_below(state, PAGES - BATCH);
        const uint32_t run[] = {first, 1 + (uint32_t)random_below(state, BATCH)};
        size_t at = first * PAGE_BYTES, size = run[1] * PAGE_BYTES;

        for (uint32_t i = 0; i < run[1]; ++i)
            change_page(first + i, state);
        switch (random_below(state, 8)) {
        case 0:
            memset(source + at, 0, size);
            memset(target + at, 0, size);
            delta_cache_set_zero(cache, 0, step / 8, (const unsigned char *)run, 1);
            break;
        case 1:
            CHECK(delta_cache_resize(cache, UINT64_C(1) << (3 + random_below(state, 7))) == 0);
            break;
        case 2:
            if (random_below(state, 8) == 0)
                delta_cache_forget(cache);
            break;
        default:
            deal(cache, step / 8, first, run[1]);
            deliver();
            delta_pages += batch.delta.pages;
            CHECK(memcmp(source + at, target + at, size) == 0);
        }
        check_cache(cache);
    }
    CHECK(delta_pages > 1000);
    delta_cache_free(cache);
}

static void resizing_keeps_what_fits(void)
{
    struct delta_cache *cache = new_cache(&ALL, PAGES);
    unsigned char page[PAGE_BYTES];

    for (uint32_t first = 0; first < PAGES; first += BATCH)
        deal(cache, 1 + first / BATCH % 2, first, (uint32_t)BATCH);
    CHECK(delta_cache_resize(cache, PAGES / 2) == 0); /* pages 64..127 and 192..255 are younger ... */
    for (uint64_t i = 0; i < PAGES; ++i)
        CHECK(delta_cache_get(cache, 0, i, page) == (i >= PAGES / 2)); /* ... equals: the last moved */
    CHECK(delta_cache_resize(cache, 4 * PAGES) == 0);
    for (uint64_t i = 0; i < PAGES; ++i)
        CHECK(delta_cache_get(cache, 0, i, page) == (i >= PAGES / 2));
    CHECK(delta_cache_resize(cache, 1) == 0);
    CHECK(delta_cache_get(cache, 0, PAGES - 1, page));
    delta_cache_forget(cache);
    CHECK(!delta_cache_get(cache, 0, PAGES - 1, page));
    delta_cache_free(cache);
}

static void wrong_batches_write_nothing(void)
{
    static const struct {
        const char *bytes;
        size_t size;
        uint64_t bad;
    } wrong[] = {
        {"", 0, 0},
        {"\x03", 1, 0},
        {"\x00\x00\x03\x00\x00\x01x", 7, 0},                     /* empty */
        {"\x03\x00\x00\x01x", 5, 1},                             /* one of two */
        {"\x03\x00\x00\x01x\x04\x00\x00\x01x", 10, 1},           /* cut off */
        {"\x03\x00\x00\x01x\x03\x00\x00\x02x", 10, 1},           /* longer than it says */
        {"\x03\x00\x00\x01x\x03\x00\x00\x01xx", 11, 2},          /* a byte left over */
        {"\x03\x00\x00\x01x\xff\xff\x00\x01x", 10, 1},
    };
    const uint32_t run[] = {0, 2};
    const struct placement to = {-1, 0, target, placed};
    uint64_t bad;

    memset(target, 0, 2 * PAGE_BYTES);
    memset((void *)placed, 0, sizeof placed);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; ++i) {
        unsigned char *bytes = malloc(wrong[i].size ? wrong[i].size : 1);

        memcpy(bytes, wrong[i].bytes, wrong[i].size);
        CHECK(place_deltas(&to, bytes, wrong[i].size, (const unsigned char *)run, 1, 2, &bad) ==
              -EINVAL);
        CHECK(bad == wrong[i].bad && target[0] == 0 && placed[0] == 0);
        free(bytes);
    }
}

int main(void)
{
    uint64_t state = 17;

    source = aligned_alloc(PAGE_BYTES, PAGES * PAGE_BYTES);
    target = aligned_alloc(PAGE_BYTES, PAGES * PAGE_BYTES);
    hits_misses_and_overflows();
    a_young_page_keeps_its_slot();
    a_slice_fills_its_cache_without_conflicts();
    impossible_sizes_are_refused();
    resizing_keeps_what_fits();
    wrong_batches_write_nothing();
    the_destination_always_has_what_was_sent(&state);
    free(target);
    free(source);
    return 0;
}
