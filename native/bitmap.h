/* Page bitmaps in shared memory: bit i % 64 of native word i / 64 stands for page i.
 *
 * Other processes change the same words at the same time: every access here is atomic, and no bit
 * outside the range or slice that is named ever changes, not even to the same value. */
#ifndef RAMFERRY_BITMAP_H
#define RAMFERRY_BITMAP_H

#include <sys/types.h>

#include "pages.h"

typedef _Atomic uint64_t bitmap_word;

_Static_assert(sizeof(bitmap_word) == 8, "atomic words have no lock beside them");

/* The bits of word `word` that stand for pages first <= p < end; it has at least one. */
static inline uint64_t word_mask(uint64_t word, uint64_t first, uint64_t end)
{
    uint64_t mask = ~UINT64_C(0), start = word * 64;

    if (first > start)
        mask &= ~UINT64_C(0) << (first - start);
    if (end < start + 64)
        mask &= ~UINT64_C(0) >> (start + 64 - end);
    return mask;
}

static inline uint64_t bit_count(uint64_t word)
{
    return (uint64_t)__builtin_popcountll(word);
}

/* Set bits; return how many were clear before. What was written before is visible to whoever
 * finds the bit. */
uint64_t bitmap_set_range(bitmap_word *bitmap, uint64_t first_page, uint64_t page_count);

/* Clear the slice's bits; return how many were set. */
uint64_t bitmap_clear_slice(bitmap_word *bitmap, const struct page_slice *slice);

/* Count the slice's set bits. */
uint64_t bitmap_count(const bitmap_word *bitmap, const struct page_slice *slice);

/* Set in `target` every bit of the slice from `first_page` on that is set in `source`, then clear it
 * there; return the bits moved, set in `target` before or not.
 * A crash in between leaves bits in both; a bit set or taken meanwhile by others is never lost. */
uint64_t bitmap_move_slice(bitmap_word *source, bitmap_word *target,
                           const struct page_slice *slice, uint64_t first_page);

/* Set the bit of each page of fd[offset, offset + size) that SEEK_DATA reports, without touching
 * memory; both are multiples of the page size. Moves the descriptor's position.
 * Returns the bits newly set or -errno. */
int64_t bitmap_set_data(int fd, off_t offset, off_t size, bitmap_word *bitmap);

#endif
