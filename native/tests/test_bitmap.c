/* Slices and bitmaps against loops over single bits. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "check.h"

#define PAGES_MAX 700
#define WORDS ((PAGES_MAX + 63) / 64)

static bool bit_at(const uint64_t *words, uint64_t page)
{
    return words[page / 64] >> (page % 64) & 1;
}

static bool is_in_slice(const struct page_slice *slice, uint64_t page)
{
    return page < slice->page_count &&
           page / slice->stripe_pages % slice->worker_count == slice->worker_index;
}

static struct page_slice random_slice(uint64_t *state)
{
    struct page_slice slice = {
        .page_count = random_below(state, PAGES_MAX + 1),
        .stripe_pages = 64 * (1 + random_below(state, 4)),
        .worker_count = 1 + random_below(state, 5),
    };

    slice.worker_index = random_below(state, slice.worker_count);
    CHECK(slice_is_valid(&slice));
    return slice;
}

static void fill(uint64_t *words, uint64_t *state)
{
    for (size_t i = 0; i < WORDS; ++i)
        words[i] = random_word(state) & random_word(state);
}

static void ranges_of_a_slice_are_its_pages_in_order(uint64_t *state)
{
    struct page_slice slice = random_slice(state);
    struct page_range range;
    uint64_t next = random_below(state, PAGES_MAX + 1);

    for (uint64_t from = next; slice_next(&slice, from, &range);) {
        CHECK(range.page_count > 0 && range.first_page >= next);
        for (; next < range.first_page; ++next)
            CHECK(!is_in_slice(&slice, next));
        for (; next < range.first_page + range.page_count; ++next)
            CHECK(is_in_slice(&slice, next));
        from = next;
    }
    for (; next < slice.page_count; ++next)
        CHECK(!is_in_slice(&slice, next));
}

static void set_range_sets_exactly_the_range(uint64_t *state)
{
    uint64_t before[WORDS], after[WORDS], expected = 0;
    uint64_t first = random_below(state, PAGES_MAX);
    uint64_t count = random_below(state, PAGES_MAX - first + 1);

    fill(before, state);
    memcpy(after, before, sizeof after);
    for (uint64_t page = first; page < first + count; ++page)
        expected += !bit_at(before, page);
    CHECK(bitmap_set_range((bitmap_word *)after, first, count) == expected);
    for (uint64_t page = 0; page < WORDS * 64; ++page)
        CHECK(bit_at(after, page) ==
              (bit_at(before, page) || (page >= first && page < first + count)));
}

static void clear_count_and_move_touch_exactly_the_slice(uint64_t *state)
{
    struct page_slice slice = random_slice(state);
    uint64_t source[WORDS], target[WORDS], moved_source[WORDS], moved_target[WORDS];
    uint64_t set = 0;

    fill(source, state);
    fill(target, state);
    memcpy(moved_source, source, sizeof source);
    memcpy(moved_target, target, sizeof target);
    for (uint64_t page = 0; page < slice.page_count; ++page)
        set += is_in_slice(&slice, page) && bit_at(source, page);
    CHECK(bitmap_count((const bitmap_word *)source, &slice) == set);
    CHECK(bitmap_move_slice((bitmap_word *)moved_source, (bitmap_word *)moved_target, &slice,
                            0) == set);
    CHECK(bitmap_clear_slice((bitmap_word *)source, &slice) == set);
    CHECK(memcmp(source, moved_source, sizeof source) == 0);
    for (uint64_t page = 0; page < WORDS * 64; ++page)
        if (is_in_slice(&slice, page))
            CHECK(!bit_at(source, page) && bit_at(moved_target, page) >= bit_at(target, page));
        else
            CHECK(bit_at(moved_target, page) == bit_at(target, page));
}

/* Two threads throw the same bits to and fro: not one may get lost or appear. */
static bitmap_word ping[WORDS], pong[WORDS];

static void *mover(void *direction)
{
    const struct page_slice all = {PAGES_MAX, 64, 0, 1};

    for (int i = 0; i < 20000; ++i)
        if (direction)
            bitmap_move_slice(ping, pong, &all, 0);
        else
            bitmap_move_slice(pong, ping, &all, 0);
    return NULL;
}

static void concurrent_moves_lose_nothing(void)
{
    const struct page_slice all = {PAGES_MAX, 64, 0, 1};
    pthread_t threads[2];

    bitmap_set_range(ping, 3, 600);
    for (size_t i = 0; i < 2; ++i)
        CHECK(pthread_create(&threads[i], NULL, mover, i ? (void *)ping : NULL) == 0);
    for (size_t i = 0; i < 2; ++i)
        CHECK(pthread_join(threads[i], NULL) == 0);
    bitmap_move_slice(ping, pong, &all, 0);
    CHECK(bitmap_count(pong, &all) == 600 && bitmap_count(ping, &all) == 0);
}

static void set_data_reports_what_is_not_a_hole(void)
{
    int fd = memfd_create("test", MFD_CLOEXEC);
    bitmap_word bitmap[1] = {0};
    struct stat status;

    CHECK(fd >= 0 && ftruncate(fd, 20 * (off_t)PAGE_BYTES) == 0);
    CHECK(pwrite(fd, "x", 1, 3 * (off_t)PAGE_BYTES + 9) == 1);
    CHECK(pwrite(fd, "xy", 2, 7 * (off_t)PAGE_BYTES - 1) == 2);
    CHECK(bitmap_set_data(fd, 0, 20 * (off_t)PAGE_BYTES, bitmap) == 3);
    CHECK(bitmap[0] == (1 << 3 | 1 << 6 | 1 << 7));
    bitmap[0] = 0;
    CHECK(bitmap_set_data(fd, 6 * (off_t)PAGE_BYTES, (off_t)PAGE_BYTES, bitmap) == 1);
    CHECK(bitmap[0] == 1);
    CHECK(fstat(fd, &status) == 0 && status.st_blocks == 3 * 8);
    CHECK(close(fd) == 0);
    CHECK(bitmap_set_data(fd, 0, (off_t)PAGE_BYTES, bitmap) == -EBADF);
}

int main(void)
{
    uint64_t state = 20;

    for (int i = 0; i < 3000; ++i) {
        ranges_of_a_slice_are_its_pages_in_order(&state);
        set_range_sets_exactly_the_range(&state);
        clear_count_and_move_touch_exactly_the_slice(&state);
    }
    concurrent_moves_lose_nothing();
    set_data_reports_what_is_not_a_hole();
    return 0;
}
