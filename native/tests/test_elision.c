/* Unchanged pages stay out, and what is known is what was sent, also beside a writer. */
#include "elision.h"

#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

#define PAGES ((uint64_t)130)
#define ROUNDS_MIN 300
#define ROUNDS_MAX 1000000 /* where threads never run at the same time */
#define LEFT_OUT_SEEN 2000 /* pages left out while others were sent */

static unsigned char *source, *target, output[PAGES * PAGE_BYTES];
static unsigned char hashes[PAGES * PAGE_HASH_BYTES], runs_out[PAGES * RUN_BYTES];
static bitmap_word known[3];
static struct elision sent;
static atomic_bool is_over;

/* Send pages from `first` on; return how many went. */
static uint64_t send_pages(uint32_t first, uint32_t count)
{
    const uint32_t run[] = {first, count};
    const unsigned char *payload = output;

    sent = (struct elision){5, hashes, known, output, {.bytes = runs_out, .capacity = PAGES}};
    gather_changed(&sent, source, (const unsigned char *)run, 1);
    for (size_t i = 0; i < sent.changed.count; ++i) {
        struct page_range range = run_at(runs_out, i);

        memcpy(target + range.first_page * PAGE_BYTES, payload, range.page_count * PAGE_BYTES);
        payload += range.page_count * PAGE_BYTES;
    }
    return sent.changed.pages;
}

static void only_what_changed_goes(void)
{
    CHECK(send_pages(0, PAGES) == PAGES && sent.changed.count == 1);
    CHECK(send_pages(0, PAGES) == 0 && sent.changed.count == 0);
    source[3 * PAGE_BYTES] = 1;
    source[4 * PAGE_BYTES + 4095] = 1;
    source[129 * PAGE_BYTES] = 1;
    CHECK(send_pages(0, PAGES) == 3 && sent.changed.count == 2);
    CHECK(memcmp(source, target, PAGES * PAGE_BYTES) == 0);
    source[3 * PAGE_BYTES] = 0; /* what it was before is not what was sent last */
    CHECK(send_pages(3, 1) == 1 && send_pages(3, 1) == 0);
}

static void what_is_forgotten_goes_again(void)
{
    const uint32_t runs[] = {0, 2, 60, 70};

    forget_pages(known, (const unsigned char *)runs, 2);
    CHECK(known[0] == ((UINT64_C(1) << 60) - 1 - 3) && known[1] == 0 && known[2] == 0);
    CHECK(send_pages(0, PAGES) == 72);
}

/* A guest's writes keep no rule of C's: the sanitizer shall not see them. */
__attribute__((no_sanitize("thread"))) static void *write_pages(void *unused)
{
    uint64_t state = 29;

    (void)unused;
    while (!is_over) {
        uint64_t at = random_below(&state, PAGES * PAGE_BYTES);

        ((volatile unsigned char *)source)[at] = (unsigned char)random_below(&state, 2);
    }
    return NULL;
}

/* The hashes are those of what was sent, not of what is there by now. */
static void check_hashes(void)
{
    static unsigned char expected[sizeof hashes];
    const uint32_t all[] = {0, PAGES};

    hash_pages(target, 5, expected, (const unsigned char *)all, 1);
    CHECK(memcmp(expected, hashes, sizeof hashes) == 0);
}

static void a_writer_beside_loses_nothing(void)
{
    pthread_t writer;
    uint64_t left_out = 0;

    CHECK(pthread_create(&writer, NULL, write_pages, NULL) == 0);
    for (int i = 0; i < ROUNDS_MAX && (i < ROUNDS_MIN || left_out < LEFT_OUT_SEEN); ++i) {
        uint64_t pages = send_pages(0, PAGES);

        check_hashes();
        left_out += pages > 0 ? PAGES - pages : 0;
    }
    is_over = true;
    CHECK(pthread_join(writer, NULL) == 0);
    send_pages(0, PAGES);
    CHECK(memcmp(source, target, PAGES * PAGE_BYTES) == 0);
}

int main(void)
{
    source = calloc(PAGES, PAGE_BYTES);
    target = calloc(PAGES, PAGE_BYTES);
    only_what_changed_goes();
    what_is_forgotten_goes_again();
    a_writer_beside_loses_nothing();
    free(target);
    free(source);
    return 0;
}
