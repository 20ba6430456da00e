#define _GNU_SOURCE
#include "bitmap.h"

#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

uint64_t bitmap_set_range(bitmap_word *bitmap, uint64_t first_page, uint64_t page_count)
{
    uint64_t end = first_page + page_count, newly_set = 0;

    if (page_count == 0)
        return 0;
    /* Always read-modify-write, even where the bit is set already: a plain look could pass the
     * page's own write, and a bit taken in between would be lost. */
    for (uint64_t word = first_page / 64; word <= (end - 1) / 64; ++word) {
        uint64_t mask = word_mask(word, first_page, end);

        newly_set += bit_count(mask & ~atomic_fetch_or(&bitmap[word], mask));
    }
    return newly_set;
}

uint64_t bitmap_clear_slice(bitmap_word *bitmap, const struct page_slice *slice)
{
    struct page_range range;
    uint64_t cleared = 0;

    for (uint64_t from = 0; slice_next(slice, from, &range);) {
        uint64_t end = range.first_page + range.page_count;

        for (uint64_t word = range.first_page / 64; word <= (end - 1) / 64; ++word) {
            uint64_t mask = word_mask(word, range.first_page, end);

            if (atomic_load_explicit(&bitmap[word], memory_order_relaxed) & mask)
                cleared += bit_count(mask & atomic_fetch_and(&bitmap[word], ~mask));
        }
        from = end;
    }
    return cleared;
}

uint64_t bitmap_count(const bitmap_word *bitmap, const struct page_slice *slice)
{
    struct page_range range;
    uint64_t count = 0;

    for (uint64_t from = 0; slice_next(slice, from, &range);) {
        uint64_t end = range.first_page + range.page_count;

        for (uint64_t word = range.first_page / 64; word <= (end - 1) / 64; ++word)
            count += bit_count(atomic_load_explicit(&bitmap[word], memory_order_relaxed) &
                               word_mask(word, range.first_page, end));
        from = end;
    }
    return count;
}

static uint64_t move_word(bitmap_word *source, bitmap_word *target, uint64_t mask)
{
    uint64_t bits = atomic_load(source) & mask;

    if (bits == 0)
        return 0;
    atomic_fetch_or(target, bits);
    atomic_fetch_and(source, ~bits);
    /* Someone may have taken the target's bit and someone else set the source's again, both before
     * it was cleared: that second setting is what the clearing ate, so it is given again. */
    if (~atomic_load(target) & bits)
        atomic_fetch_or(target, bits);
    return bit_count(bits);
}

uint64_t bitmap_move_slice(bitmap_word *source, bitmap_word *target,
                           const struct page_slice *slice, uint64_t first_page)
{
    struct page_range range;
    uint64_t moved = 0;

    for (uint64_t from = first_page; slice_next(slice, from, &range);) {
        uint64_t end = range.first_page + range.page_count;

        for (uint64_t word = range.first_page / 64; word <= (end - 1) / 64; ++word)
            moved += move_word(&source[word], &target[word],
                               word_mask(word, range.first_page, end));
        from = end;
    }
    return moved;
}

int64_t bitmap_set_data(int fd, off_t offset, off_t size, bitmap_word *bitmap)
{
    const off_t end = offset + size, page = (off_t)PAGE_BYTES;
    uint64_t newly_set = 0;

    for (off_t at = offset; at < end;) {
        off_t data = lseek(fd, at, SEEK_DATA), hole;
        uint64_t first, last;

        if (data < 0 && errno != ENXIO) /* ENXIO: only holes follow */
            return -errno;
        if (data < 0 || data >= end)
            break;
        hole = lseek(fd, data, SEEK_HOLE);
        if (hole < 0 && errno == ENXIO) { /* punched or truncated in between: look again */
            at = data + 1;
            continue;
        }
        if (hole < 0)
            return -errno;
        if (hole > end)
            hole = end;
        if (hole <= data) { /* the same race; always move on */
            at = data + 1;
            continue;
        }
        first = (uint64_t)((data - offset) / page);
        last = (uint64_t)((hole - offset - 1) / page);
        newly_set += bitmap_set_range(bitmap, first, last - first + 1);
        at = hole;
    }
    return (int64_t)newly_set;
}
