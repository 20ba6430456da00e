#include "elision.h"

#include <stdatomic.h>

/* Whether the page is what was sent last; it is from now on. */
static bool is_unchanged(const struct elision *to, const struct page_hash_key *key, uint64_t page,
                         const unsigned char *copy)
{
    unsigned char *sent = to->hashes + page * PAGE_HASH_BYTES, hash[PAGE_HASH_BYTES];
    uint64_t bit = UINT64_C(1) << (page % 64);
    bool was_known = atomic_fetch_or_explicit(&to->known[page / 64], bit, memory_order_relaxed) & bit;

    page_hash(key, copy, hash);
    if (was_known && memcmp(sent, hash, PAGE_HASH_BYTES) == 0)
        return true;
    memcpy(sent, hash, PAGE_HASH_BYTES);
    return false;
}

void gather_changed(struct elision *to, const unsigned char *ram, const unsigned char *runs,
                    size_t run_count)
{
    struct page_hash_key key;

    page_hash_key_init(&key, to->seed);
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t page = run.first_page; page < run.first_page + run.page_count; ++page) {
            unsigned char *copy = to->output + to->changed.pages * PAGE_BYTES;

            memcpy(copy, ram + page * PAGE_BYTES, PAGE_BYTES);
            atomic_signal_fence(memory_order_seq_cst); /* the compiler shall not read the RAM again */
            if (!is_unchanged(to, &key, page, copy))
                run_table_append(&to->changed, page, 1);
        }
    }
}

void forget_pages(bitmap_word *known, const unsigned char *runs, size_t run_count)
{
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);
        uint64_t end = run.first_page + run.page_count;

        for (uint64_t word = run.first_page / 64; word <= (end - 1) / 64; ++word)
            atomic_fetch_and_explicit(&known[word], ~word_mask(word, run.first_page, end),
                                      memory_order_relaxed);
    }
}
