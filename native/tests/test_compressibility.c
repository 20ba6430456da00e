/* Random pages are raw, all else that a codec gains on is not, and the runs add up. */
#include "compressibility.h"

#include "check.h"

#define RANDOM_PAGES 20000

static void fill_random(unsigned char *page, uint64_t *state)
{
    for (size_t at = 0; at < PAGE_BYTES; at += 8) {
        uint64_t word = random_word(state);

        memcpy(page + at, &word, sizeof word);
    }
}

static void random_pages_are_raw(uint64_t *state)
{
    unsigned char page[PAGE_BYTES];
    unsigned compressible = 0;

    for (int i = 0; i < RANDOM_PAGES; ++i) {
        fill_random(page, state);
        compressible += page_kind(page) != PAGE_RAW;
    }
    CHECK(compressible <= RANDOM_PAGES / 10000);
}

/* Whatever is in the rest: an eighth of the page that is alike, in lines or in each word, shows. */
static void sparse_pages_are_compressible(uint64_t *state)
{
    unsigned char page[PAGE_BYTES];

    for (size_t from = 0; from <= PAGE_BYTES / 2; from += 256) {
        fill_random(page, state);
        memset(page + from, 0, PAGE_BYTES / 2);
        CHECK(page_kind(page) != PAGE_RAW);
    }
    for (size_t field = 0; field < 8; ++field) {
        fill_random(page, state);
        for (size_t at = field; at < PAGE_BYTES; at += 8)
            page[at] = 0x7f;
        CHECK(page_kind(page) != PAGE_RAW);
    }
}

/* Random bytes that repeat: no histogram can tell. */
static void repeats_are_compressible(uint64_t *state)
{
    static const size_t periods[] = {16, 24, 64, 96, 100, 128, 200, 256, 512, 1024, 2048};
    unsigned char page[PAGE_BYTES];

    for (size_t i = 0; i < sizeof periods / sizeof periods[0]; ++i) {
        fill_random(page, state);
        for (size_t at = periods[i]; at < PAGE_BYTES; ++at)
            page[at] = page[at - periods[i]];
        CHECK(page_kind(page) != PAGE_RAW);
    }
}

/* An eighth of the page is one random word: too little for the histogram. */
static void a_word_that_comes_again_is_seen(uint64_t *state)
{
    unsigned char page[PAGE_BYTES];

    for (size_t from = 0; from < PAGE_BYTES; from += 512) {
        fill_random(page, state);
        for (size_t at = from + 8; at < from + 512; at += 8)
            memcpy(page + at, page + from, 8);
        CHECK(page_kind(page) != PAGE_RAW);
    }
}

/* Random choices of pages; each is in exactly one part, in order, runs as long as can be. */
static void runs_add_up(unsigned char *ram, uint64_t *state)
{
    uint32_t runs[2 * SPLIT_PAGES_MAX];
    struct split_runs split;
    bool is_zero[SPLIT_PAGES_MAX], is_asked[SPLIT_PAGES_MAX] = {false};
    size_t run_count = 0, asked = 0, found = 0;

    for (size_t page = 0; page < SPLIT_PAGES_MAX; ++page) {
        is_zero[page] = random_below(state, 2);
        fill_random(ram + page * PAGE_BYTES, state);
        if (is_zero[page])
            memset(ram + page * PAGE_BYTES, 0, PAGE_BYTES);
    }
    for (size_t page = 0, count; page < SPLIT_PAGES_MAX; page += count + random_below(state, 3)) {
        count = 1 + random_below(state, 4);
        if (page + count > SPLIT_PAGES_MAX)
            count = SPLIT_PAGES_MAX - page;
        runs[2 * run_count] = (uint32_t)page;
        runs[2 * run_count++ + 1] = (uint32_t)count;
        memset(is_asked + page, true, count);
        asked += count;
    }
    split = split_compressible(ram, (unsigned char *)runs, run_count, (unsigned char *)runs);
    CHECK(split.runs[PAGE_OF_WORDS] == 0 && split.pages[PAGE_OF_WORDS] == 0);
    for (size_t i = 0; i < split.runs[PAGE_OF_BYTES] + split.runs[PAGE_RAW]; ++i) {
        bool is_compressible = i < split.runs[PAGE_OF_BYTES];
        uint32_t first = runs[2 * i], count = runs[2 * i + 1];

        for (uint32_t page = first; page < first + count; ++page) {
            CHECK(is_asked[page] && is_zero[page] == is_compressible);
            is_asked[page] = false; /* not twice */
        }
        CHECK(i == 0 || i == split.runs[PAGE_OF_BYTES] || first > runs[2 * i - 2] + runs[2 * i - 1]);
        found += count;
        if (is_compressible)
            CHECK(found <= split.pages[PAGE_OF_BYTES]);
    }
    CHECK(found == asked);
}

int main(void)
{
    unsigned char *ram = malloc(SPLIT_PAGES_MAX * PAGE_BYTES);
    uint64_t state = 11;

    random_pages_are_raw(&state);
    sparse_pages_are_compressible(&state);
    repeats_are_compressible(&state);
    a_word_that_comes_again_is_seen(&state);
    for (int i = 0; i < 20; ++i)
        runs_add_up(ram, &state);
    free(ram);
    return 0;
}
