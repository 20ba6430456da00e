#include "batch.h"

#include <stdatomic.h>

#include "zero_scan.h"

/* How many pages may be taken from `page` on, whatever they hold, without overfilling `table`. */
static uint64_t table_room(const struct run_table *table, uint64_t page)
{
    uint64_t room = (uint64_t)(table->capacity - table->count);

    return room == 0 && run_table_continues(table, page) ? 1 : room;
}

static uint64_t least(uint64_t left, uint64_t right)
{
    return left < right ? left : right;
}

/* The lowest `count` set bits. */
static uint64_t lowest_bits(uint64_t bits, uint64_t count)
{
    uint64_t rest = bits;

    if (count >= bit_count(bits))
        return bits;
    while (count-- > 0)
        rest &= rest - 1;
    return bits & ~rest;
}

/* Deal contiguous pages, taken already, to the two tables. */
static void deal_pages(struct batch *batch, zero_scan_fn *scan, uint64_t first, uint64_t count)
{
    unsigned char is_zero[64];

    if (!batch->detect_zero) {
        run_table_append(&batch->data, first, count);
        return;
    }
    scan(batch->ram + first * PAGE_BYTES, count, PAGE_BYTES, is_zero);
    for (uint64_t i = 0, end; i < count; i = end) {
        for (end = i + 1; end < count && is_zero[end] == is_zero[i];)
            ++end;
        run_table_append(is_zero[i] ? &batch->zero : &batch->data, first + i, end - i);
    }
}

/* Move the bits of one word from dirty to in flight; return those that nobody else has taken meanwhile. */
static uint64_t take_bits(struct batch *batch, uint64_t word, uint64_t bits)
{
    uint64_t was_in_flight = atomic_fetch_or(&batch->in_flight[word], bits);
    uint64_t lost = bits & ~atomic_fetch_and(&batch->dirty[word], ~bits);

    if (lost & ~was_in_flight) /* by us: somebody else sends these */
        atomic_fetch_and(&batch->in_flight[word], ~(lost & ~was_in_flight));
    return bits & ~lost;
}

/* Take the pages of `bits`, all of one word, as far as they are ours. */
static void take_pages(struct batch *batch, zero_scan_fn *scan, uint64_t word, uint64_t bits)
{
    bits = take_bits(batch, word, bits);
    while (bits != 0) {
        uint64_t shift = (uint64_t)__builtin_ctzll(bits);
        uint64_t ones = bits >> shift;
        uint64_t count = ones == ~UINT64_C(0) ? 64 : (uint64_t)__builtin_ctzll(~ones);

        deal_pages(batch, scan, word * 64 + shift, count);
        bits &= count == 64 ? 0 : ~(((UINT64_C(1) << count) - 1) << shift);
    }
}

/* Take what there is room for among the dirty pages of one word; true when it was all. */
static bool take_word(struct batch *batch, zero_scan_fn *scan, uint64_t word, uint64_t end)
{
    end = least(end, (word + 1) * 64);
    while (batch->cursor < end) {
        uint64_t bits = atomic_load_explicit(&batch->dirty[word], memory_order_relaxed) &
                        word_mask(word, batch->cursor, end);
        uint64_t page, room, taken;

        if (bits == 0)
            break;
        page = word * 64 + (uint64_t)__builtin_ctzll(bits);
        room = least(batch->pages_max - batch->data.pages, table_room(&batch->data, page));
        if (batch->detect_zero)
            room = least(room, table_room(&batch->zero, page));
        room = least(room, BATCH_WALK_PAGES_MAX - batch->data.pages - batch->zero.pages);
        if (room == 0) {
            batch->cursor = page;
            return false;
        }
        taken = lowest_bits(bits, room);
        take_pages(batch, scan, word, taken);
        batch->cursor = word * 64 + 64 - (uint64_t)__builtin_clzll(taken);
    }
    batch->cursor = end;
    return true;
}

void take_batch(struct batch *batch)
{
    zero_scan_fn *scan = zero_scan_default();
    struct page_range range;

    while (slice_next(&batch->slice, batch->cursor, &range)) {
        uint64_t end = range.first_page + range.page_count;

        batch->cursor = range.first_page;
        for (uint64_t word = range.first_page / 64; batch->cursor < end; ++word) {
            if (!take_word(batch, scan, word, end))
                return;
        }
    }
    batch->cursor = batch->slice.page_count;
}

void gather(const unsigned char *ram, const unsigned char *runs, size_t run_count,
            unsigned char *output)
{
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        memcpy(output, ram + run.first_page * PAGE_BYTES, run.page_count * PAGE_BYTES);
        output += run.page_count * PAGE_BYTES;
    }
}
