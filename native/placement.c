#define _GNU_SOURCE
#include "placement.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "linux_abi.h"
#include "xbzrle.h"

/* Runs are placed in chunks of this many bitmap words: 16 MiB. */
#define CHUNK_WORDS ((uint64_t)64)

/* UFFDIO_COPY says EAGAIN while the address space changes; give up after this many in a row. */
#define AGAIN_MAX 100000

/* A read fault maps so many pages, aligned (fault_around_bytes, its default). */
#define AROUND_PAGES ((uint64_t)16)

/* One chunk: pages [first, end), the words they lie in, and which were clear before. */
struct chunk {
    uint64_t first_page;
    uint64_t end_page;
    uint64_t first_word;
    uint64_t fresh[CHUNK_WORDS]; /* [i]: bits of word first_word + i that this call set */
};

static void chunk_mark(struct chunk *chunk, bitmap_word *placed)
{
    for (uint64_t word = chunk->first_word; word <= (chunk->end_page - 1) / 64; ++word) {
        uint64_t mask = word_mask(word, chunk->first_page, chunk->end_page);

        chunk->fresh[word - chunk->first_word] = mask & ~atomic_fetch_or(&placed[word], mask);
    }
}

/* Take back the bits from `page` on that this call set. */
static void chunk_unmark(const struct chunk *chunk, bitmap_word *placed, uint64_t page)
{
    for (uint64_t word = page / 64; word <= (chunk->end_page - 1) / 64; ++word)
        atomic_fetch_and(&placed[word], ~(chunk->fresh[word - chunk->first_word] &
                                          word_mask(word, page, chunk->end_page)));
}

static bool chunk_is_fresh(const struct chunk *chunk, uint64_t page)
{
    return chunk->fresh[page / 64 - chunk->first_word] >> (page % 64) & 1;
}

/* The end of the longest stretch from `page` on whose bits are alike. */
static uint64_t chunk_stretch_end(const struct chunk *chunk, uint64_t page)
{
    uint64_t same = chunk_is_fresh(chunk, page) ? ~UINT64_C(0) : 0;

    while (page < chunk->end_page) {
        uint64_t differ = (chunk->fresh[page / 64 - chunk->first_word] ^ same) >> (page % 64);

        if (differ != 0)
            return page + (uint64_t)__builtin_ctzll(differ) < chunk->end_page
                       ? page + (uint64_t)__builtin_ctzll(differ)
                       : chunk->end_page;
        page = (page / 64 + 1) * 64;
    }
    return chunk->end_page;
}

/* Place fresh pages [*page, end) with UFFDIO_COPY; *page tells how far it came. */
static int place_uffd(const struct placement *to, const unsigned char *payload, uint64_t *page,
                      uint64_t end, struct placed_pages *counts)
{
    int again = 0;

    while (*page < end) {
        struct uffdio_copy copy = {
            .dst = to->fresh_address + *page * PAGE_BYTES,
            .src = (uint64_t)(uintptr_t)payload,
            .len = (end - *page) * PAGE_BYTES,
            .mode = UFFDIO_COPY_MODE_DONTWAKE,
        };
        int error = ioctl(to->uffd, UFFDIO_COPY, &copy) < 0 ? errno : 0;
        uint64_t done = copy.copy > 0 ? (uint64_t)copy.copy / PAGE_BYTES : 0;

        if (done > end - *page)
            return -EIO;
        counts->fresh += done;
        if (error == EEXIST && done == 0) { /* somebody was first: the page has memory */
            memcpy(to->ram + *page * PAGE_BYTES, payload, PAGE_BYTES);
            ++counts->copied;
            done = 1;
        } else if (error != 0 && error != EAGAIN && done == 0) {
            return -error;
        }
        if (done == 0 && (error == 0 || ++again > AGAIN_MAX))
            return -EAGAIN;
        if (done == 0)
            sched_yield();
        else
            again = 0;
        *page += done;
        payload += done * PAGE_BYTES;
    }
    return 0;
}

/* Have memory for pages that may be holes. */
static int populate(unsigned char *start, size_t size)
{
    while (madvise(start, size, MADVISE_POPULATE_WRITE) < 0) {
        if (errno == EFAULT) /* what would have been SIGBUS: no room in the file system */
            return -ENOSPC;
        if (errno != EINTR && errno != EAGAIN)
            return -errno;
    }
    return 0;
}

/* What another mapping has brought in is not in this one's page table: a write would fault at each
 * page, a read maps all pages around it, writable as the mapping is (do_fault_around, 64 KiB). */
static void map_around(const unsigned char *ram, uint64_t page, uint64_t end)
{
    for (; page < end; page = (page / AROUND_PAGES + 1) * AROUND_PAGES)
        (void)*(const volatile unsigned char *)(ram + page * PAGE_BYTES);
}

/* Copy pages [*page, end) through the plain mapping, after their memory was had when `is_fresh`. */
static int place_memcpy(const struct placement *to, const unsigned char *payload, uint64_t *page,
                        uint64_t end, bool is_fresh, struct placed_pages *counts)
{
    unsigned char *start = to->ram + *page * PAGE_BYTES;
    size_t size = (end - *page) * PAGE_BYTES;
    int rc = is_fresh ? populate(start, size) : 0;

    if (rc < 0)
        return rc;
    if (!is_fresh)
        map_around(to->ram, *page, end);
    memcpy(start, payload, size);
    counts->copied += end - *page;
    *page = end;
    return 0;
}

static int place_chunk(const struct placement *to, struct chunk *chunk,
                       const unsigned char *payload, struct placed_pages *counts)
{
    uint64_t page = chunk->first_page;
    int rc = 0;

    chunk_mark(chunk, to->placed);
    while (rc == 0 && page < chunk->end_page) {
        const unsigned char *from = payload + (page - chunk->first_page) * PAGE_BYTES;
        bool is_fresh = chunk_is_fresh(chunk, page);
        uint64_t end = chunk_stretch_end(chunk, page);

        if (is_fresh && to->uffd >= 0)
            rc = place_uffd(to, from, &page, end, counts);
        else
            rc = place_memcpy(to, from, &page, end, is_fresh, counts);
    }
    if (rc < 0)
        chunk_unmark(chunk, to->placed, page);
    return rc;
}

int place_runs(const struct placement *to, const unsigned char *payload,
               const unsigned char *runs, size_t run_count, struct placed_pages *counts)
{
    *counts = (struct placed_pages){0, 0};
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);
        uint64_t end = run.first_page + run.page_count;

        for (uint64_t page = run.first_page; page < end;) {
            struct chunk chunk = {.first_page = page, .end_page = end, .first_word = page / 64};
            int rc;

            if (chunk.end_page > (chunk.first_word + CHUNK_WORDS) * 64)
                chunk.end_page = (chunk.first_word + CHUNK_WORDS) * 64;
            rc = place_chunk(to, &chunk, payload, counts);
            if (rc < 0)
                return rc;
            payload += (chunk.end_page - page) * PAGE_BYTES;
            page = chunk.end_page;
        }
    }
    return 0;
}

/* Set the page's bit; when it was clear, have its memory. */
static int own_page(const struct placement *to, uint64_t page)
{
    uint64_t bit = UINT64_C(1) << (page % 64);
    int rc;

    if (atomic_fetch_or(&to->placed[page / 64], bit) & bit) {
        map_around(to->ram, page, page + 1);
        return 0;
    }
    rc = populate(to->ram + page * PAGE_BYTES, PAGE_BYTES);
    if (rc < 0)
        atomic_fetch_and(&to->placed[page / 64], ~bit);
    return rc;
}

int place_deltas(const struct placement *to, const unsigned char *deltas, size_t size,
                 const unsigned char *runs, size_t run_count, uint64_t page_count,
                 uint64_t *bad_delta)
{
    int rc = deltas_check(deltas, size, page_count, bad_delta);

    for (size_t i = 0; rc == 0 && i < run_count; ++i) {
        struct page_range run = run_at(runs, i);

        for (uint64_t n = 0; n < run.page_count; ++n) {
            size_t length = delta_length(deltas);

            rc = own_page(to, run.first_page + n);
            if (rc < 0)
                break;
            deltas += DELTA_LENGTH_BYTES;
            xbzrle_apply(deltas, length, to->ram + (run.first_page + n) * PAGE_BYTES);
            deltas += length;
        }
    }
    return rc;
}

uint64_t clear_runs(unsigned char *ram, const bitmap_word *placed, const unsigned char *runs,
                    size_t run_count)
{
    uint64_t cleared = 0;

    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);
        uint64_t end = run.first_page + run.page_count;

        for (uint64_t word = run.first_page / 64; word <= (end - 1) / 64; ++word) {
            uint64_t bits = atomic_load(&placed[word]) & word_mask(word, run.first_page, end);

            cleared += bit_count(bits);
            for (; bits != 0; bits &= bits - 1)
                memset(ram + (word * 64 + (uint64_t)__builtin_ctzll(bits)) * PAGE_BYTES, 0,
                       PAGE_BYTES);
        }
    }
    return cleared;
}
