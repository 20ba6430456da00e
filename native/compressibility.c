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

/* A page is one of words when the planes of those sampled take at most 24 of 64 bits, enough are not zero
 * (a sparse page is best left to a codec), and at most one of these was there before. With more bits than
 * this that are not alike in all, planes hardly take so few. */
#define WORDS_NOT_ZERO_MIN 8u
#define PLANES_COST_MAX (24u * 16u)
#define WORDS_REPEATED_MAX 1u
#define VARYING_BITS_MAX 48

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

/* What 32 bits of which so many are set can be encoded in, in sixteenths of a bit for each. */
static const unsigned char BIT_COST[SAMPLE_WORDS / 2 + 1] = {0,  3,  5,  7,  9,  10, 11, 12, 13,
                                                             14, 14, 15, 15, 16, 16, 16, 16};

static unsigned bit_cost(uint32_t bits)
{
    unsigned set = (unsigned)__builtin_popcount(bits);

    return BIT_COST[set > SAMPLE_WORDS / 2 ? SAMPLE_WORDS - set : set];
}

/* Transpose both halves of the words: afterwards those of words[i] are the planes i and i + 32. */
static void transpose_halves(uint64_t *words)
{
    static const uint64_t masks[] = {0x0000ffff0000ffff, 0x00ff00ff00ff00ff, 0x0f0f0f0f0f0f0f0f,
                                     0x3333333333333333, 0x5555555555555555};
    const uint64_t *mask = masks;

    for (size_t step = SAMPLE_WORDS / 2; step > 0; step /= 2, ++mask) {
        for (size_t i = 0; i < SAMPLE_WORDS; i = (i + step + 1) & ~step) {
            uint64_t differ = ((words[i] >> step) ^ words[i + step]) & *mask;

            words[i + step] ^= differ;
            words[i] ^= differ << step;
        }
    }
}

/* What the planes of the sampled words can be encoded in, in sixteenths of a bit for each word. A plane that
 * is the one before it, but for those that are all alike, costs nothing. */
static unsigned planes_cost(uint64_t *words)
{
    uint32_t before = 0;
    unsigned cost = 0;

    transpose_halves(words);
    for (size_t plane = 0; plane < 64; ++plane) {
        uint32_t bits = (uint32_t)(words[plane % SAMPLE_WORDS] >> plane / SAMPLE_WORDS * 32);

        if (bits == before || bit_cost(bits) == 0)
            continue;
        cost += bit_cost(bits);
        before = bits;
    }
    return cost;
}

/* Whether the page does better as planes; the sample is used up. */
static bool are_words(uint64_t *words)
{
    uint64_t all = words[0], any = words[0];
    unsigned not_zero = words[0] != 0, repeated = 0;

    for (size_t i = 1; i < SAMPLE_WORDS; ++i) {
        all &= words[i];
        any |= words[i];
        not_zero += words[i] != 0;
    }
    if (__builtin_popcountll(any & ~all) > VARYING_BITS_MAX || not_zero < WORDS_NOT_ZERO_MIN)
        return false;
    for (size_t i = 1; i < SAMPLE_WORDS; ++i) {
        size_t other = 0;

        while (words[other] != words[i])
            ++other;
        repeated += other < i && words[i] != 0;
    }
    return repeated <= WORDS_REPEATED_MAX && planes_cost(words) <= PLANES_COST_MAX;
}

enum page_kind page_kind(const unsigned char *page)
{
    unsigned char seen[256] = {0}; /* never full: at most 8 of the first 64, then 192 */
    uint64_t words[SAMPLE_WORDS];
    unsigned pairs;

    load_pieces(page, 0, PIECES, words);
    pairs = count_pairs(seen, words, EARLY_PIECES * PIECE_WORDS);
    if (pairs < EARLY_PAIRS) {
        pairs += count_pairs(seen, words + EARLY_PIECES * PIECE_WORDS,
                             (PIECES - EARLY_PIECES) * PIECE_WORDS);
        if (pairs < ALL_PAIRS && count_repeated(words) < REPEATED_WORDS)
            return PAGE_RAW;
    }
    return are_words(words) ? PAGE_OF_WORDS : PAGE_OF_BYTES;
}

/* Append the pages of one kind; return the table, behind which the next one may lie. */
static struct run_table append_pages(unsigned char *output, size_t used, const uint32_t *pages,
                                     const unsigned char *kinds, size_t count, enum page_kind kind)
{
    struct run_table table = {.bytes = output + used * RUN_BYTES, .capacity = SPLIT_PAGES_MAX - used};

    for (size_t i = 0; i < count; ++i)
        if (kinds[i] == kind)
            run_table_append(&table, pages[i], 1);
    return table;
}

struct split_runs split_compressible(const unsigned char *ram, const unsigned char *runs,
                                     size_t run_count, unsigned char *output)
{
    uint32_t pages[SPLIT_PAGES_MAX];
    unsigned char kinds[SPLIT_PAGES_MAX];
    struct split_runs split;
    size_t count = 0, used = 0;

    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t n = 0; n < run.page_count && count < SPLIT_PAGES_MAX; ++n, ++count) {
            pages[count] = (uint32_t)(run.first_page + n);
            kinds[count] = (unsigned char)page_kind(ram + (run.first_page + n) * PAGE_BYTES);
        }
    }
    for (enum page_kind kind = 0; kind < PAGE_KINDS; ++kind) {
        struct run_table table = append_pages(output, used, pages, kinds, count, kind);

        split.runs[kind] = table.count;
        split.pages[kind] = table.pages;
        used += table.count;
    }
    return split;
}
