#include "page_hash.h"

#include <stdatomic.h>

__extension__ typedef unsigned __int128 uint128;

/* splitmix64: every seed gives an unrelated key. */
static uint64_t next_key(uint64_t *state)
{
    uint64_t word = *state += UINT64_C(0x9e3779b97f4a7c15);

    word = (word ^ (word >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    word = (word ^ (word >> 27)) * UINT64_C(0x94d049bb133111eb);
    return word ^ (word >> 31);
}

void page_hash_key_init(struct page_hash_key *key, uint64_t seed)
{
    for (size_t i = 0; i < PAGE_WORDS + 2; ++i)
        key->words[i] = next_key(&seed);
    for (size_t i = 0; i < 4; ++i)
        key->fold[i] = next_key(&seed);
}

static inline uint64_t load_word(const unsigned char *at)
{
    uint64_t word;

    memcpy(&word, at, sizeof word);
    return word;
}

static inline uint128 multiply(uint64_t left, uint64_t right)
{
    return (uint128)left * right;
}

/* Fold one sum to 64 bits: multiply its keyed halves, then a full mix (murmur3's finalizer). */
static uint64_t fold(uint128 sum, uint64_t low_key, uint64_t high_key)
{
    uint128 product = multiply((uint64_t)sum ^ low_key, (uint64_t)(sum >> 64) ^ high_key);
    uint64_t word = (uint64_t)product ^ (uint64_t)(product >> 64);

    word = (word ^ (word >> 33)) * UINT64_C(0xff51afd7ed558ccd);
    word = (word ^ (word >> 33)) * UINT64_C(0xc4ceb9fe1a85ec53);
    return word ^ (word >> 33);
}

void page_hash(const struct page_hash_key *key, const unsigned char *page, unsigned char *hash)
{
    uint128 first = 0, second = 0;
    uint64_t words[2];

    for (size_t i = 0; i < PAGE_WORDS; i += 2) {
        uint64_t left = load_word(page + 8 * i), right = load_word(page + 8 * i + 8);

        first += multiply(left + key->words[i], right + key->words[i + 1]);
        second += multiply(left + key->words[i + 2], right + key->words[i + 3]);
    }
    words[0] = fold(first, key->fold[0], key->fold[1]);
    words[1] = fold(second, key->fold[2], key->fold[3]);
    memcpy(hash, words, sizeof words);
}

void hash_pages(const unsigned char *pages, uint64_t seed, unsigned char *hashes,
                const unsigned char *runs, size_t run_count)
{
    struct page_hash_key key;

    page_hash_key_init(&key, seed);
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t n = 0; n < run.page_count; ++n, pages += PAGE_BYTES)
            page_hash(&key, pages, hashes + (run.first_page + n) * PAGE_HASH_BYTES);
    }
}

/* The pages among `bits` of one word that differ from their hashes. */
static uint64_t changed_pages(const struct page_hash_key *key, const unsigned char *ram,
                              const unsigned char *hashes, uint64_t word, uint64_t bits)
{
    unsigned char hash[PAGE_HASH_BYTES];
    uint64_t changed = 0;

    for (; bits != 0; bits &= bits - 1) {
        uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(bits);

        page_hash(key, ram + page * PAGE_BYTES, hash);
        if (memcmp(hash, hashes + page * PAGE_HASH_BYTES, PAGE_HASH_BYTES) != 0)
            changed |= bits & -bits;
    }
    return changed;
}

uint64_t hash_scan(const unsigned char *ram, uint64_t seed, const unsigned char *hashes,
                   const bitmap_word *candidates, bitmap_word *dirty,
                   const struct page_slice *slice, uint64_t first_page)
{
    struct page_hash_key key;
    struct page_range range;
    uint64_t newly_set = 0;

    page_hash_key_init(&key, seed);
    for (uint64_t from = first_page; slice_next(slice, from, &range);) {
        uint64_t end = range.first_page + range.page_count;

        for (uint64_t word = range.first_page / 64; word <= (end - 1) / 64; ++word) {
            uint64_t bits = atomic_load_explicit(&candidates[word], memory_order_acquire) &
                            word_mask(word, range.first_page, end);

            bits &= ~atomic_load(&dirty[word]); /* dirty already: nothing to find out */
            bits = changed_pages(&key, ram, hashes, word, bits);
            if (bits != 0)
                newly_set += bit_count(bits & ~atomic_fetch_or(&dirty[word], bits));
        }
        from = end;
    }
    return newly_set;
}
