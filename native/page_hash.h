/* A seeded 128-bit hash of one page, to tell whether its content changed. Not for adversaries who
 * know the seed.
 *
 * NH (the universal hash of UMAC) with 64-bit words and 128-bit sums, taken twice with a key that is
 * shifted (Toeplitz): two different pages of 4096 bytes collide with a chance of 2^-64 each time.
 * Each sum is then folded to 64 bits by one more multiplication and mixed. */
#ifndef RAMFERRY_PAGE_HASH_H
#define RAMFERRY_PAGE_HASH_H

#include "bitmap.h"
#include "pages.h"

#define PAGE_HASH_BYTES ((size_t)16)
#define PAGE_WORDS (PAGE_BYTES / 8)

/* Everything that follows from the seed; made once for a batch. */
struct page_hash_key {
    uint64_t words[PAGE_WORDS + 2];
    uint64_t fold[4];
};

void page_hash_key_init(struct page_hash_key *key, uint64_t seed);

/* Write the 16-byte hash of the page; neither pointer needs alignment. */
void page_hash(const struct page_hash_key *key, const unsigned char *page, unsigned char *hash);

/* Store the hash of each page of `pages`, the runs' pages in order, at hashes[16 * page index].
 * The caller checked the runs against both buffers. */
void hash_pages(const unsigned char *pages, uint64_t seed, unsigned char *hashes,
                const unsigned char *runs, size_t run_count);

/* Set the dirty bit of each page of the slice from `first_page` on whose candidates bit is set and
 * whose hash differs from `hashes`; return bits newly set. Other pages are not touched. */
uint64_t hash_scan(const unsigned char *ram, uint64_t seed, const unsigned char *hashes,
                   const bitmap_word *candidates, bitmap_word *dirty,
                   const struct page_slice *slice, uint64_t first_page);

#endif
