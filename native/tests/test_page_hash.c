/* The hash: every byte, every seed, and half of the bits. */
#include "page_hash.h"

#include "check.h"

static struct page_hash_key key;

static unsigned differing_bits(const unsigned char *left, const unsigned char *right)
{
    unsigned count = 0;

    for (size_t i = 0; i < PAGE_HASH_BYTES; ++i)
        count += (unsigned)__builtin_popcount(left[i] ^ right[i]);
    return count;
}

/* Flip each bit of the page once: each flip must change about 64 of 128 bits. */
static void every_bit_avalanches(unsigned char *page)
{
    unsigned char before[PAGE_HASH_BYTES], after[PAGE_HASH_BYTES];
    uint64_t sum = 0;

    page_hash(&key, page, before);
    for (size_t bit = 0; bit < PAGE_BYTES * 8; ++bit) {
        unsigned count;

        page[bit / 8] ^= (unsigned char)(1 << bit % 8);
        page_hash(&key, page, after);
        page[bit / 8] ^= (unsigned char)(1 << bit % 8);
        count = differing_bits(before, after);
        CHECK(count >= 20 && count <= 108); /* 64 +- 8 standard deviations */
        sum += count;
    }
    CHECK(sum > 63 * PAGE_BYTES * 8 && sum < 65 * PAGE_BYTES * 8);
}

/* Pages that differ by order only: swapped words, shifted content. */
static void order_matters(void)
{
    unsigned char page[PAGE_BYTES] = {0}, first[PAGE_HASH_BYTES], second[PAGE_HASH_BYTES];

    for (size_t distance = 8; distance < PAGE_BYTES; distance += 8) {
        memset(page, 0, sizeof page);
        page[0] = 1;
        page_hash(&key, page, first);
        page[0] = 0;
        page[distance] = 1;
        page_hash(&key, page, second);
        CHECK(differing_bits(first, second) > 20);
    }
}

static void seeds_are_unrelated(const unsigned char *page)
{
    unsigned char first[PAGE_HASH_BYTES], second[PAGE_HASH_BYTES];
    struct page_hash_key other;

    page_hash(&key, page, first);
    for (uint64_t seed = 0; seed < 64; ++seed) {
        page_hash_key_init(&other, UINT64_C(1) << seed);
        page_hash(&other, page, second);
        CHECK(differing_bits(first, second) > 20);
    }
}

static void scan_finds_the_changed_candidate_only(void)
{
    static unsigned char ram[130 * PAGE_BYTES], hashes[130 * PAGE_HASH_BYTES];
    const uint32_t all[] = {0, 130};
    const struct page_slice slice = {130, 64, 0, 1}, second = {130, 64, 1, 2};
    bitmap_word candidates[3] = {~UINT64_C(0), ~UINT64_C(0), 1}, dirty[3] = {0};

    hash_pages(ram, 5, hashes, (const unsigned char *)all, 1);
    CHECK(hash_scan(ram, 5, hashes, candidates, dirty, &slice, 0) == 0);
    ram[10 * PAGE_BYTES + 77] = 1;
    ram[64 * PAGE_BYTES + 4095] = 1;
    ram[129 * PAGE_BYTES] = 1; /* not a candidate */
    CHECK(hash_scan(ram, 5, hashes, candidates, dirty, &second, 0) == 1 && dirty[1] == 1);
    CHECK(hash_scan(ram, 5, hashes, candidates, dirty, &slice, 11) == 0 && dirty[0] == 0);
    CHECK(hash_scan(ram, 5, hashes, candidates, dirty, &slice, 10) == 1 && dirty[0] == 1 << 10);
    CHECK(dirty[2] == 0 && hash_scan(ram, 5, hashes, candidates, dirty, &slice, 0) == 0);
}

int main(void)
{
    unsigned char page[PAGE_BYTES] = {0};
    uint64_t state = 1;

    page_hash_key_init(&key, 42);
    every_bit_avalanches(page);
    seeds_are_unrelated(page);
    for (size_t i = 0; i < PAGE_BYTES; ++i)
        page[i] = (unsigned char)random_word(&state);
    every_bit_avalanches(page);
    seeds_are_unrelated(page);
    order_matters();
    scan_finds_the_changed_candidate_only();
    return 0;
}
