#define _GNU_SOURCE
#include "insertion.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "linux_abi.h"
#include "userfault.h"

/* UFFDIO_COPY says EAGAIN while the address space changes; give up after this many in a row. */
#define AGAIN_MAX 100000

/* Pages of one call: 64 KiB, about 20 us, in which a kernel without preemption runs nobody else. */
#define CALL_PAGES_MAX ((uint64_t)16)

/* A punch into a large folio of which somebody else holds a page (direct I/O, a pipe) says 0 and leaves zeros
 * there. Most let go soon: 10 ms in all, for this may be in the downtime. */
#define PUNCHES_MAX 10
#define PUNCH_PAUSE_NS 1000000L

/* Where zeros are copied from: never written, so it costs no memory. */
static unsigned char ZEROS[HUGE_UNIT_PAGES * PAGE_BYTES] __attribute__((aligned(4096)));

bool is_received(const bitmap_word *received, uint64_t first_page, uint64_t page_count)
{
    uint64_t end = first_page + page_count;

    for (uint64_t word = first_page / 64; word <= (end - 1) / 64; ++word) {
        uint64_t mask = word_mask(word, first_page, end);

        if ((atomic_load(&received[word]) & mask) != mask)
            return false;
    }
    return true;
}

int wake_pages(const struct insertion *to, uint64_t first_page, uint64_t page_count)
{
    struct uffdio_range range = {to->address + first_page * PAGE_BYTES, page_count * PAGE_BYTES};

    return ioctl(to->uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

/* One UFFDIO_COPY. Returns the pages that it is done with, 0 for "try again", or -errno. */
static int64_t copy_once(const struct insertion *to, const unsigned char *from, uint64_t page,
                         uint64_t page_count, struct inserted_pages *counts)
{
    struct uffdio_copy copy = {
        .dst = to->address + page * PAGE_BYTES,
        .src = (uint64_t)(uintptr_t)from,
        .len = page_count * PAGE_BYTES,
    };
    int error = ioctl(to->uffd, UFFDIO_COPY, &copy) < 0 ? errno : 0;
    uint64_t done = copy.copy > 0 ? (uint64_t)copy.copy / PAGE_BYTES : 0;
    int rc;

    if (done > page_count)
        return -EIO;
    counts->fresh += done;
    if (done > 0 || error == EAGAIN)
        return (int64_t)done;
    if (error != EEXIST)
        return error != 0 ? -error : -EIO;
    rc = wake_pages(to, page, to->unit_pages); /* somebody else was first, and may not wake */
    if (rc < 0)
        return rc;
    counts->present += to->unit_pages;
    return (int64_t)to->unit_pages;
}

int insert_pages(const struct insertion *to, const unsigned char *payload, uint64_t first_page,
                 uint64_t page_count, struct inserted_pages *counts)
{
    uint64_t page = first_page, end = first_page + page_count;
    uint64_t step_max = to->unit_pages > CALL_PAGES_MAX ? to->unit_pages : CALL_PAGES_MAX;
    int again = 0;

    while (page < end) {
        uint64_t step = end - page < step_max ? end - page : step_max;
        int64_t done;

        done = copy_once(to, payload ? payload + (page - first_page) * PAGE_BYTES : ZEROS, page,
                         step, counts);
        if (done < 0)
            return (int)done;
        if (done == 0 && ++again > AGAIN_MAX)
            return -EAGAIN;
        if (done == 0) {
            sched_yield();
            continue;
        }
        again = 0;
        bitmap_set_range(to->received, page, (uint64_t)done);
        page += (uint64_t)done;
    }
    return 0;
}

/* The end of the units from `page` on that are all received, or all not. */
static uint64_t alike_until(const struct insertion *to, uint64_t page, uint64_t end)
{
    bool state = is_received(to->received, page, to->unit_pages);

    do
        page += to->unit_pages;
    while (page < end && is_received(to->received, page, to->unit_pages) == state);
    return page;
}

int insert_runs(const struct insertion *to, const unsigned char *payload,
                const unsigned char *runs, size_t run_count, struct inserted_pages *counts)
{
    *counts = (struct inserted_pages){0, 0};
    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);
        uint64_t end = run.first_page + run.page_count;

        for (uint64_t page = run.first_page, next; page < end; page = next) {
            int rc = 0;

            next = alike_until(to, page, end);
            if (is_received(to->received, page, next - page))
                counts->present += next - page;
            else
                rc = insert_pages(to, payload, page, next - page, counts);
            if (rc < 0)
                return rc;
            payload += (next - page) * PAGE_BYTES;
        }
    }
    return 0;
}

int64_t insert_zero_runs(const struct insertion *to, const unsigned char *runs, size_t run_count)
{
    uint64_t newly_set = 0;

    for (size_t i = 0; i < run_count; ++i) {
        struct page_range run = run_at(runs, i);
        int rc;

        newly_set += bitmap_set_range(to->received, run.first_page, run.page_count);
        rc = wake_pages(to, run.first_page, run.page_count);
        if (rc < 0)
            return rc;
    }
    return (int64_t)newly_set;
}

static uint64_t least(uint64_t left, uint64_t right)
{
    return left < right ? left : right;
}

/* The first page from `page` on whose bit is `wanted`; `end` where there is none. */
static uint64_t next_page(const bitmap_word *bitmap, uint64_t page, uint64_t end, bool wanted)
{
    while (page < end) {
        uint64_t bits = atomic_load(&bitmap[page / 64]);

        bits = (wanted ? bits : ~bits) >> (page % 64);
        if (bits != 0)
            return least(page + (uint64_t)__builtin_ctzll(bits), end);
        page = (page / 64 + 1) * 64;
    }
    return end;
}

static void clear_range(bitmap_word *bitmap, uint64_t first, uint64_t end)
{
    for (uint64_t word = first / 64; word <= (end - 1) / 64; ++word)
        atomic_fetch_and(&bitmap[word], ~word_mask(word, first, end));
}

/* Whether nothing is left of fd[offset, end): what is left would be no fault, and read as zero. */
static int is_hole(int fd, off_t offset, off_t end)
{
    off_t data = lseek(fd, offset, SEEK_DATA);

    if (data < 0)
        return errno == ENXIO ? 1 : -errno; /* ENXIO: only holes follow */
    return data >= end;
}

/* Free pages [first, end). Returns 0, -EBUSY for those that stay, or -errno. */
static int free_pages(int fd, uint64_t first, uint64_t end, uint64_t unit_pages)
{
    off_t from = (off_t)(first * PAGE_BYTES), to = (off_t)(end * PAGE_BYTES);
    struct timespec pause = {0, PUNCH_PAUSE_NS};

    for (int punches = 1;; ++punches) {
        int rc = punch_hole(fd, from, to - from);

        if (rc < 0 || unit_pages > 1) /* whole huge pages go exactly; hugetlbfs cannot tell its holes */
            return rc;
        rc = is_hole(fd, from, to);
        if (rc != 0)
            return rc < 0 ? rc : 0;
        if (punches == PUNCHES_MAX)
            return -EBUSY;
        nanosleep(&pause, NULL);
    }
}

int64_t discard_stale(int fd, bitmap_word *received, bitmap_word *stale, uint64_t page_count,
                      uint64_t unit_pages)
{
    uint64_t page = next_page(stale, 0, page_count, true), freed = 0;

    while (page < page_count) {
        uint64_t first = page - page % unit_pages, end;
        int rc;

        do { /* as long as units are adjacent */
            end = next_page(stale, page, page_count, false) + unit_pages - 1;
            end = least(end - end % unit_pages, page_count);
            page = next_page(stale, end, page_count, true);
        } while (page < page_count && page - page % unit_pages == end);
        clear_range(received, first, end);
        rc = free_pages(fd, first, end, unit_pages);
        if (rc < 0)
            return rc;
        clear_range(stale, first, end);
        freed += end - first;
    }
    return (int64_t)freed;
}

uint64_t bitmap_widen(bitmap_word *bitmap, uint64_t page_count, uint64_t unit_pages)
{
    uint64_t newly_set = 0;

    for (uint64_t unit = 0; unit < page_count; unit += unit_pages) {
        uint64_t end = least(unit + unit_pages, page_count);

        for (uint64_t word = unit / 64; word <= (end - 1) / 64; ++word)
            if (atomic_load(&bitmap[word]) & word_mask(word, unit, end)) {
                newly_set += bitmap_set_range(bitmap, unit, end - unit);
                break;
            }
    }
    return newly_set;
}
