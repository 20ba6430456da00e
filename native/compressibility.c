#include "compressibility.h"

/* 16 pieces of 16 bytes, one in each 256 bytes of the page: 16 cache lines of its 64. */
#define PIECES ((size_t)16)
#define PIECE_WORDS ((size_t)2)
#define PIECE_STEP (PAGE_BYTES / PIECES)
#define SAMPLE_WORDS (PIECES * PIECE_WORDS)

/* Pairs of equal bytes among those sampled: n(n-1)/2 pairs, each equal once in 256 when bytes are
 * random. After 64 bytes 7.9 +- 2.8 are, so 32 show at once that they are not; after all 256 bytes
 * 127.5 +- 11.3 are, and 195 once in 10^6 pages (of 8 million counted). */
#define EARLY_PIECES ((size_t)4)
#define EARLY_PAIRS 32u
#define ALL_PAIRS 195u

/* So many of the sampled words that were there before tell of repeats that a histogram cannot see. */
#define REPEATED_WORDS 2u

/* Load pieces [first, end), each fourth one before the ones between them. A piece's place in its step
 * changes, so that no field of records is looked at alone, and is never the page's header or trailer; the
 * halves of the page are alike, so that a repeat at half a page, or any power of two below, is met in
 * every word. */
static void load_pieces(const unsigned char *page, size_t first, size_t end, uint64_t *words)
{
    for (size_t i = first; i < end; ++i) {
        size_t piece = i % 4 * 4 + i / 4;

        memcpy(words + i * PIECE_WORDS, page + piece * PIECE_STEP + (piece % 8 * 5 + 8) % 16 * 16,
               PIECE_WORDS * sizeof *words);
    }
}

/* Count the bytes of `count` words into `seen`; return the pairs of equal ones that they make. */
static unsigned count_pairs(unsigned char *seen, const uint64_t *words, size_t count)
{
    unsigned pairs = 0;

    for (size_t i = 0; i < count; ++i) {
        for (unsigned shift = 0; shift < 64; shift += 8)
            pairs += seen[words[i] >> shift & 0xff]++;
    }
    return pairs;
}

static unsigned count_repeated(const uint64_t *words)
{
    unsigned char place[64] = {0};
    unsigned repeated = 0;

    for (size_t i = 0; i < SAMPLE_WORDS; ++i) {
        unsigned char *before = &place[words[i] * UINT64_C(0x9e3779b97f4a7c15) >> 58];

        repeated += i > 0 && words[*before] == words[i];
        *before = (unsigned char)i;
    }
    return repeated;
}

bool page_is_compressible(const unsigned char *page)
{
    unsigned char seen[256] = {0}; /* never full: at most 8 of the first 64, then 192 */
    uint64_t words[SAMPLE_WORDS];
    unsigned pairs;

    load_pieces(page, 0, EARLY_PIECES, words);
    pairs = count_pairs(seen, words, EARLY_PIECES * PIECE_WORDS);
    if (pairs >= EARLY_PAIRS)
        return true;
    load_pieces(page, EARLY_PIECES, PIECES, words);
    pairs += count_pairs(seen, words + EARLY_PIECES * PIECE_WORDS,
                         (PIECES - EARLY_PIECES) * PIECE_WORDS);
    return pairs >= ALL_PAIRS || count_repeated(words) >= REPEATED_WORDS;
}

/* Append the pages whose flag is `wanted`; return how many. */
static uint64_t append_pages(struct run_table *table, const uint32_t *pages, const bool *flags,
                             size_t count, bool wanted)
{
    for (size_t i = 0; i < count; ++i)
        if (flags[i] == wanted)
            run_table_append(table, pages[i], 1);
    return table->pages;
}

struct split_runs split_compressible(const unsigned char *ram, const unsigned char *runs,
                                     size_t run_count, unsigned char *output)
{
    uint32_t pages[SPLIT_PAGES_MAX];
    bool flags[SPLIT_PAGES_MAX];
    struct run_table compressible = {.bytes = output, .capacity = SPLIT_PAGES_MAX}, raw;
    struct split_runs split;
    size_t count = 0;

    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t n = 0; n < run.page_count && count < SPLIT_PAGES_MAX; ++n, ++count) {
            pages[count] = (uint32_t)(run.first_page + n);
            flags[count] = page_is_compressible(ram + (run.first_page + n) * PAGE_BYTES);
        }
    }
    split.compressible_pages = append_pages(&compressible, pages, flags, count, true);
    raw = (struct run_table){.bytes = output + compressible.count * RUN_BYTES,
                             .capacity = SPLIT_PAGES_MAX - compressible.count};
    append_pages(&raw, pages, flags, count, false);
    split.compressible_runs = compressible.count;
    split.raw_runs = raw.count;
    return split;
}
