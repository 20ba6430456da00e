/* Two callers of place_runs on the same pages of one bitmap word.
 *
 * UFFDIO_COPY is played by this file: it never finds a page there, so that what place_runs believes
 * to be fresh is what it counts. Needs no userfaultfd. */
#define _GNU_SOURCE
#include "placement.h"

#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/ioctl.h>

#include "check.h"
#include "linux_abi.h"

#define PAGES ((uint64_t)64)
#define ROUNDS 6000

static _Alignas(4096) unsigned char ram[PAGES * PAGE_BYTES];
static _Alignas(4096) unsigned char payload[PAGES * PAGE_BYTES];
static bitmap_word placed;
static uint32_t runs[2 * PAGES]; /* one page each, so that the word is marked once a page */
static atomic_int arrived;

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    struct uffdio_copy *copy;

    va_start(arguments, request);
    copy = va_arg(arguments, struct uffdio_copy *);
    va_end(arguments);
    CHECK(fd == 1000 && request == UFFDIO_COPY);
    copy->copy = (int64_t)copy->len;
    return 0;
}

/* Let both threads go at the same instant; `count` is that of all arrivals until then. */
static void meet(int count)
{
    ++arrived;
    for (int i = 0; arrived < count; ++i)
        if (i % 1000 == 999)
            sched_yield();
}

static uint64_t place_all(void)
{
    const struct placement to = {1000, 0x10000000, ram, &placed};
    struct placed_pages counts;

    CHECK(place_runs(&to, payload, (unsigned char *)runs, PAGES, &counts) == 0);
    CHECK(counts.fresh + counts.copied == PAGES);
    return counts.fresh;
}

static void *second_caller(void *fresh)
{
    for (int i = 0; i < ROUNDS; ++i) {
        meet(4 * i + 2);
        *(uint64_t *)fresh = place_all();
        meet(4 * i + 4);
    }
    return NULL;
}

int main(void)
{
    uint64_t fresh, others;
    pthread_t thread;

    for (uint32_t page = 0; page < PAGES; ++page) {
        runs[2 * page] = page;
        runs[2 * page + 1] = 1;
    }
    CHECK(pthread_create(&thread, NULL, second_caller, &others) == 0);
    for (int i = 0; i < ROUNDS; ++i) {
        placed = 0;
        meet(4 * i + 2);
        fresh = place_all();
        meet(4 * i + 4);
        CHECK(fresh + others == PAGES);
        CHECK(placed == ~UINT64_C(0));
    }
    CHECK(pthread_join(thread, NULL) == 0);
    return 0;
}
