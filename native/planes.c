#include "planes.h"

#include <string.h>

#define ROWS ((size_t)64)
#define ROW_BYTES (PAGE_BYTES / ROWS)

/* A quarter of a row: every CPU that we run on has registers of this size. */
typedef uint64_t words __attribute__((vector_size(16)));
#define ROW_PARTS (ROW_BYTES / sizeof(words))

/* Exchange the bits of `mask` in `lower` with those `shift` above them in `upper`: of two columns of words
 * at once. Six rounds of this, with half the distance each time, transpose 64 x 64 bits. */
static inline void exchange(words *upper, words *lower, unsigned shift, uint64_t mask)
{
    words differ = ((*upper >> shift) ^ *lower) & mask;

    *lower ^= differ;
    *upper ^= differ << shift;
}

/* Three of the six steps, over eight rows that are `step` rows apart, kept in registers. */
static inline void three_steps(words *first, size_t step, const uint64_t *masks)
{
    words rows[8];
    unsigned unit = (unsigned)step;

    for (size_t i = 0; i < 8; ++i)
        rows[i] = first[i * step * ROW_PARTS];
    for (size_t i = 0; i < 4; ++i)
        exchange(&rows[i], &rows[i + 4], 4 * unit, masks[0]);
    for (size_t i = 0; i < 8; i += 4) {
        exchange(&rows[i], &rows[i + 2], 2 * unit, masks[1]);
        exchange(&rows[i + 1], &rows[i + 3], 2 * unit, masks[1]);
    }
    for (size_t i = 0; i < 8; i += 2)
        exchange(&rows[i], &rows[i + 1], unit, masks[2]);
    for (size_t i = 0; i < 8; ++i)
        first[i * step * ROW_PARTS] = rows[i];
}

/* Transpose each of the page's eight columns of 64 words; twice is nothing. */
static void transpose(words *page)
{
    static const uint64_t coarse[] = {0x00000000ffffffff, 0x0000ffff0000ffff, 0x00ff00ff00ff00ff};
    static const uint64_t fine[] = {0x0f0f0f0f0f0f0f0f, 0x3333333333333333, 0x5555555555555555};

    for (size_t part = 0; part < ROW_PARTS; ++part) {
        for (size_t i = 0; i < 8; ++i)
            three_steps(page + i * ROW_PARTS + part, 8, coarse);
        for (size_t i = 0; i < 8; ++i)
            three_steps(page + 8 * i * ROW_PARTS + part, 1, fine);
    }
}

static uint64_t count_pages(const unsigned char *runs, size_t run_count)
{
    uint64_t pages = 0;

    for (size_t i = 0; i < run_count; ++i)
        pages += run_at(runs, i).page_count;
    return pages;
}

static uint64_t group_size(uint64_t pages_left)
{
    return pages_left < PLANE_PAGES ? pages_left : PLANE_PAGES;
}

void gather_planes(const unsigned char *ram, const unsigned char *runs, size_t run_count,
                   unsigned char *output)
{
    uint64_t left = count_pages(runs, run_count), group = group_size(left), number = 0;
    words page[ROWS * ROW_PARTS];

    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t n = 0; n < run.page_count; ++n) {
            memcpy(page, ram + (run.first_page + n) * PAGE_BYTES, PAGE_BYTES);
            transpose(page);
            for (size_t k = 0; k < ROWS; ++k)
                memcpy(output + (k * group + number) * ROW_BYTES, &page[k * ROW_PARTS], ROW_BYTES);
            if (++number == group) {
                output += group * PAGE_BYTES;
                left -= group;
                group = group_size(left);
                number = 0;
            }
        }
    }
}

void restore_planes(const unsigned char *planes, uint64_t page_count, unsigned char *pages)
{
    words page[ROWS * ROW_PARTS];

    for (uint64_t left = page_count, group; left > 0; left -= group) {
        group = group_size(left);
        for (uint64_t number = 0; number < group; ++number, pages += PAGE_BYTES) {
            for (size_t k = 0; k < ROWS; ++k)
                memcpy(&page[k * ROW_PARTS], planes + (k * group + number) * ROW_BYTES, ROW_BYTES);
            transpose(page);
            memcpy(pages, page, PAGE_BYTES);
        }
        planes += group * PAGE_BYTES;
    }
}
