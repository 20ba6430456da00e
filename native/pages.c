#include "pages.h"

#include <errno.h>

bool slice_is_valid(const struct page_slice *slice)
{
    return slice->page_count <= PAGE_COUNT_MAX && slice->stripe_pages > 0 &&
           slice->stripe_pages % 64 == 0 && slice->stripe_pages <= STRIPE_PAGES_MAX &&
           slice->worker_count <= WORKER_COUNT_MAX && slice->worker_index < slice->worker_count;
}

bool slice_next(const struct page_slice *slice, uint64_t from, struct page_range *range)
{
    uint64_t first = from, end = slice->page_count;

    if (slice->worker_count > 1) {
        uint64_t stripe = from / slice->stripe_pages;
        uint64_t owner = stripe % slice->worker_count;

        if (owner != slice->worker_index) {
            stripe += (slice->worker_index + slice->worker_count - owner) % slice->worker_count;
            first = stripe * slice->stripe_pages;
        }
        if (end > (stripe + 1) * slice->stripe_pages)
            end = (stripe + 1) * slice->stripe_pages;
    }
    if (first >= slice->page_count)
        return false;
    *range = (struct page_range){first, end - first};
    return true;
}

int runs_check(const unsigned char *runs, size_t run_count, uint64_t page_count,
               uint64_t *total_pages, size_t *bad_run)
{
    uint64_t total = 0;

    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        if (run.page_count == 0 || run.first_page + run.page_count > page_count ||
            total > UINT64_MAX / PAGE_BYTES - run.page_count) {
            *bad_run = i;
            return -EINVAL;
        }
        total += run.page_count;
    }
    *total_pages = total;
    return 0;
}

int packet_runs_check(const struct packet_runs *runs, uint64_t page_count, uint64_t unit_pages,
                      struct page_range *bad)
{
    size_t at[PACKET_TABLES] = {0};
    uint64_t end = 0; /* of the runs so far, which are taken in the order of their first pages */

    for (;;) {
        struct page_range next = {UINT64_MAX, 0};
        size_t from = PACKET_TABLES;

        for (size_t i = 0; i < PACKET_TABLES; ++i) {
            if (at[i] < runs->counts[i] &&
                run_at(runs->tables[i], at[i]).first_page < next.first_page) {
                next = run_at(runs->tables[i], at[i]);
                from = i;
            }
        }
        if (from == PACKET_TABLES)
            return 0;
        if (next.first_page < end || next.page_count == 0 ||
            next.first_page + next.page_count > page_count ||
            next.first_page % unit_pages != 0 || next.page_count % unit_pages != 0) {
            *bad = next;
            return -EINVAL;
        }
        end = next.first_page + next.page_count;
        ++at[from];
    }
}

bool run_table_continues(const struct run_table *table, uint64_t first_page)
{
    return table->count > 0 && table->last.first_page + table->last.page_count == first_page &&
           table->last.page_count < UINT32_MAX - 64;
}

void run_table_append(struct run_table *table, uint64_t first_page, uint64_t page_count)
{
    uint32_t words[2];

    if (run_table_continues(table, first_page))
        table->last.page_count += page_count;
    else {
        table->last = (struct page_range){first_page, page_count};
        ++table->count;
    }
    table->pages += page_count;
    words[0] = (uint32_t)table->last.first_page;
    words[1] = (uint32_t)table->last.page_count;
    memcpy(table->bytes + (table->count - 1) * RUN_BYTES, words, RUN_BYTES);
}
