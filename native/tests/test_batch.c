/* Random rounds of take_batch against the pages one by one, and hostile run tables. */
#include "batch.h"

#include <errno.h>

#include "check.h"

#define PAGES_MAX ((uint64_t)400)
#define WORDS (((size_t)PAGES_MAX + 63) / 64)
#define RUNS_MAX ((size_t)40)

static unsigned char ram[PAGES_MAX * PAGE_BYTES];

struct round {
    struct batch batch;
    bitmap_word dirty[WORDS], in_flight[WORDS];
    unsigned char data[(RUNS_MAX + 1) * RUN_BYTES], zero[(RUNS_MAX + 1) * RUN_BYTES];
    bool expected[PAGES_MAX]; /* still to come */
};

static bool is_zero_page(uint64_t page)
{
    return ram[page * PAGE_BYTES + page % PAGE_BYTES] == 0;
}

static void random_round(struct round *round, uint64_t *state)
{
    uint64_t worker_count = 1 + random_below(state, 4);
    uint64_t density = 1 + random_below(state, 4);

    memset(round, 0, sizeof *round);
    round->batch = (struct batch){
        .ram = ram,
        .dirty = round->dirty,
        .in_flight = round->in_flight,
        .slice = {random_below(state, PAGES_MAX + 1), 64 * (1 + random_below(state, 3)),
                  random_below(state, worker_count), worker_count},
        .pages_max = 1 + random_below(state, 100),
        .detect_zero = random_below(state, 4) > 0,
    };
    for (uint64_t page = 0; page < PAGES_MAX; ++page) {
        const struct page_slice *slice = &round->batch.slice;

        ram[page * PAGE_BYTES + page % PAGE_BYTES] = random_below(state, 3) > 0;
        if (random_below(state, density) > 0)
            continue;
        round->dirty[page / 64] |= UINT64_C(1) << (page % 64);
        round->expected[page] =
            page < slice->page_count &&
            page / slice->stripe_pages % slice->worker_count == slice->worker_index;
    }
}

/* Check one table against what was expected; return its pages. */
static uint64_t check_table(struct round *round, const struct run_table *table, bool holds_zero)
{
    uint64_t pages = 0, last_end = 0;

    CHECK(table->count <= table->capacity);
    for (size_t i = 0; i < table->count; ++i) {
        struct page_range run = run_at(table->bytes, i);

        CHECK(run.page_count > 0 && (i == 0 || run.first_page > last_end)); /* merged, ascending */
        last_end = run.first_page + run.page_count;
        for (uint64_t page = run.first_page; page < last_end; ++page, ++pages) {
            CHECK(round->expected[page]);
            CHECK(!round->batch.detect_zero || is_zero_page(page) == holds_zero);
            CHECK(!(round->dirty[page / 64] >> (page % 64) & 1));
            CHECK(round->in_flight[page / 64] >> (page % 64) & 1);
            round->expected[page] = false;
        }
    }
    CHECK(table->bytes[table->capacity * RUN_BYTES] == 0xee); /* nothing behind the table */
    return pages;
}

static void batches_take_each_dirty_page_once(uint64_t *state)
{
    static struct round round;
    struct batch *batch = &round.batch;

    random_round(&round, state);
    while (batch->cursor < batch->slice.page_count) {
        uint64_t cursor = batch->cursor;

        memset(round.data, 0xee, sizeof round.data);
        memset(round.zero, 0xee, sizeof round.zero);
        batch->data = (struct run_table){round.data, 1 + random_below(state, RUNS_MAX), 0, 0, {0, 0}};
        batch->zero = (struct run_table){round.zero, 1 + random_below(state, RUNS_MAX), 0, 0, {0, 0}};
        take_batch(batch);
        CHECK(check_table(&round, &batch->data, false) == batch->data.pages);
        CHECK(check_table(&round, &batch->zero, true) == batch->zero.pages);
        CHECK(batch->data.pages <= batch->pages_max);
        CHECK(batch->cursor > cursor && batch->cursor <= batch->slice.page_count);
        for (uint64_t page = 0; page < batch->cursor; ++page)
            CHECK(!round.expected[page]);
    }
    for (uint64_t page = 0; page < PAGES_MAX; ++page)
        CHECK(!round.expected[page]);
}

static void gather_copies_runs_in_order(uint64_t *state)
{
    const uint32_t runs[] = {9, 2, 0, 1, 399, 1};
    unsigned char output[4 * PAGE_BYTES];

    for (size_t i = 0; i < sizeof ram; i += 8)
        ram[i] = (unsigned char)random_word(state);
    gather(ram, (const unsigned char *)runs, 3, output);
    CHECK(memcmp(output, ram + 9 * PAGE_BYTES, 2 * PAGE_BYTES) == 0);
    CHECK(memcmp(output + 2 * PAGE_BYTES, ram, PAGE_BYTES) == 0);
    CHECK(memcmp(output + 3 * PAGE_BYTES, ram + 399 * PAGE_BYTES, PAGE_BYTES) == 0);
}

static void hostile_runs_are_refused(uint64_t *state)
{
    for (int i = 0; i < 20000; ++i) {
        uint32_t runs[6];
        uint64_t page_count = random_below(state, 3) ? random_below(state, 1000) : PAGE_COUNT_MAX;
        uint64_t total = 0, said = 0;
        size_t bad_run = 99, first_bad = 3;

        for (size_t n = 0; n < 6; ++n)
            runs[n] = (uint32_t)(random_below(state, 3) ? random_below(state, 600)
                                                        : random_word(state) | 0xfffffff0u);
        for (size_t n = 3; n-- > 0;)
            if (runs[2 * n + 1] == 0 || (uint64_t)runs[2 * n] + runs[2 * n + 1] > page_count)
                first_bad = n;
            else
                total += runs[2 * n + 1];
        if (first_bad == 3) {
            CHECK(runs_check((const unsigned char *)runs, 3, page_count, &said, &bad_run) == 0);
            CHECK(said == total);
        } else {
            CHECK(runs_check((const unsigned char *)runs, 3, page_count, &said, &bad_run) ==
                  -EINVAL);
            CHECK(bad_run == first_bad);
        }
    }
}

int main(void)
{
    uint64_t state = 3;

    for (int i = 0; i < 1500; ++i)
        batches_take_each_dirty_page_once(&state);
    gather_copies_runs_in_order(&state);
    hostile_runs_are_refused(&state);
    return 0;
}
