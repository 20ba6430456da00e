/* delta_batch while the guest writes the same pages: what is sent, kept and applied are one content. */
#include "delta_cache.h"

#include <pthread.h>
#include <stdatomic.h>

#include "check.h"
#include "placement.h"

#define PAGES ((uint64_t)16)
#define ROUNDS_MIN 2000
#define ROUNDS_MAX 2000000 /* where threads never run at the same time */
#define MOVED_SEEN 500     /* rounds after which a page had changed again already */

static unsigned char *source, *target;
static unsigned char full_pages[PAGES * PAGE_BYTES];
static unsigned char deltas[PAGES * (DELTA_LENGTH_BYTES + DELTA_BYTES_MAX)];
static unsigned char full_runs[PAGES * RUN_BYTES], delta_runs[PAGES * RUN_BYTES];
static bitmap_word placed[1];
static atomic_bool is_over;

/* A guest's writes keep no rule of C's: the sanitizer shall not see them. */
__attribute__((no_sanitize("thread"))) static void *write_pages(void *unused)
{
    uint64_t state = 23;

    (void)unused;
    while (!is_over)
        ((volatile unsigned char *)source)[random_below(&state, PAGES * PAGE_BYTES)] =
            (unsigned char)random_word(&state);
    return NULL;
}

/* Whether `source` is other than what was sent: the writer was beside us. */
__attribute__((no_sanitize("thread"))) static bool has_moved(void)
{
    for (size_t i = 0; i < PAGES * PAGE_BYTES; ++i)
        if (((volatile unsigned char *)source)[i] != target[i])
            return true;
    return false;
}

static void send_all(struct delta_cache *cache, uint64_t generation)
{
    const uint32_t run[] = {0, PAGES};
    const struct placement to = {-1, 0, target, placed};
    struct placed_pages counts;
    struct delta_batch batch = {
        .ram = source,
        .generation = generation,
        .delta_bytes_max = DELTA_BYTES_MAX,
        .full_pages = full_pages,
        .deltas = deltas,
        .full = {.bytes = full_runs, .capacity = PAGES},
        .delta = {.bytes = delta_runs, .capacity = PAGES},
    };
    uint64_t bad;

    delta_batch(cache, &batch, (const unsigned char *)run, 1);
    CHECK(place_runs(&to, full_pages, full_runs, batch.full.count, &counts) == 0);
    CHECK(place_deltas(&to, deltas, batch.deltas_size, delta_runs, batch.delta.count,
                       batch.delta.pages, &bad) == 0);
}

int main(void)
{
    const struct page_slice all = {PAGES, 64, 0, 1};
    unsigned char page[PAGE_BYTES];
    struct delta_cache *cache;
    pthread_t writer;
    int moved = 0;

    source = aligned_alloc(PAGE_BYTES, PAGES * PAGE_BYTES);
    target = aligned_alloc(PAGE_BYTES, PAGES * PAGE_BYTES);
    memset(source, 0, PAGES * PAGE_BYTES);
    memset(target, 0, PAGES * PAGE_BYTES);
    CHECK(delta_cache_new(&cache, &all, 1, PAGES) == 0);
    CHECK(pthread_create(&writer, NULL, write_pages, NULL) == 0);
    for (int i = 0; i < ROUNDS_MAX && (i < ROUNDS_MIN || moved < MOVED_SEEN); ++i) {
        if (i % 4 == 0)
            delta_cache_forget(cache); /* pages that miss are kept, too */
        send_all(cache, (uint64_t)i);
        moved += has_moved();
        for (uint64_t n = 0; n < PAGES; ++n)
            CHECK(delta_cache_get(cache, 0, n, page) &&
                  memcmp(page, target + n * PAGE_BYTES, PAGE_BYTES) == 0);
    }
    is_over = true;
    CHECK(pthread_join(writer, NULL) == 0);
    send_all(cache, ROUNDS_MAX);
    CHECK(memcmp(source, target, PAGES * PAGE_BYTES) == 0);
    delta_cache_free(cache);
    free(target);
    free(source);
    return 0;
}
