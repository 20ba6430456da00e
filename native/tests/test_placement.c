/* Random placements, clears and hostile tables against an array of what every page should hold. */
#define _GNU_SOURCE
#include "placement.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "linux_abi.h"
#include "userfault.h"

#define PAGES ((uint64_t)300)
#define WORDS (((size_t)PAGES + 63) / 64)
#define RUNS ((size_t)6)

struct destination {
    int fd;
    struct placement to;
    bitmap_word placed[WORDS];
    unsigned char expected[PAGES]; /* the byte that fills each page */
};

static unsigned char *map(int fd)
{
    void *memory =
        mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    CHECK(memory != MAP_FAILED);
    return memory;
}

static void destination_open(struct destination *destination, bool with_uffd)
{
    memset(destination, 0, sizeof *destination);
    destination->fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(destination->fd >= 0 && ftruncate(destination->fd, (off_t)(PAGES * PAGE_BYTES)) == 0);
    destination->to = (struct placement){-1, 0, map(destination->fd), destination->placed};
    if (!with_uffd)
        return;
    destination->to.fresh_address = (uint64_t)(uintptr_t)map(destination->fd);
    destination->to.uffd = uffd_open(UFFD_USER_MODE_ONLY_FLAG, UFFD_FEATURE_MISSING_SHMEM);
    CHECK(destination->to.uffd >= 0);
    CHECK(uffd_register(destination->to.uffd, destination->to.fresh_address, PAGES * PAGE_BYTES,
                        UFFDIO_REGISTER_MODE_MISSING) == 0);
}

static void destination_close(struct destination *destination)
{
    if (destination->to.uffd >= 0) {
        CHECK(uffd_unregister(destination->to.uffd, destination->to.fresh_address,
                              PAGES * PAGE_BYTES) == 0);
        close(destination->to.uffd);
        munmap((void *)(uintptr_t)destination->to.fresh_address, PAGES * PAGE_BYTES);
    }
    munmap(destination->to.ram, PAGES * PAGE_BYTES);
    close(destination->fd);
}

static bool bit_at(const bitmap_word *words, uint64_t page)
{
    return words[page / 64] >> (page % 64) & 1;
}

/* Random runs, often hostile; fills `runs` and returns whether they are acceptable. */
static bool random_runs(uint32_t *runs, uint64_t *total, uint64_t *state)
{
    bool is_good = true;

    *total = 0;
    for (size_t i = 0; i < RUNS; ++i) {
        uint64_t first = random_below(state, PAGES), count = 1 + random_below(state, 90);

        if (first + count > PAGES)
            count = PAGES - first;
        if (random_below(state, 40) == 0)
            count = random_below(state, 2) ? 0 : PAGES - first + 1;
        if (random_below(state, 80) == 0)
            first = random_word(state) >> 32;
        runs[2 * i] = (uint32_t)first;
        runs[2 * i + 1] = (uint32_t)count;
        is_good = is_good && count > 0 && first + count <= PAGES;
        *total += count;
    }
    return is_good;
}

static void place_random(struct destination *destination, uint64_t *state)
{
    uint32_t runs[2 * RUNS];
    uint64_t total, said, fresh = 0;
    bool is_good = random_runs(runs, &total, state), was_placed[PAGES];
    unsigned char *payload, *at;
    struct placed_pages counts;
    size_t bad_run;

    CHECK(is_good == (runs_check((unsigned char *)runs, RUNS, PAGES, &said, &bad_run) == 0));
    if (!is_good)
        return;
    CHECK(said == total);
    for (uint64_t page = 0; page < PAGES; ++page)
        was_placed[page] = bit_at(destination->placed, page);
    at = payload = malloc(total * PAGE_BYTES);
    for (size_t i = 0; i < RUNS; ++i)
        for (uint64_t page = runs[2 * i]; page < (uint64_t)runs[2 * i] + runs[2 * i + 1]; ++page) {
            destination->expected[page] = (unsigned char)(1 + random_below(state, 255));
            fresh += !was_placed[page];
            was_placed[page] = true;
            memset(at, destination->expected[page], PAGE_BYTES);
            at += PAGE_BYTES;
        }
    CHECK(place_runs(&destination->to, payload, (unsigned char *)runs, RUNS, &counts) == 0);
    CHECK(counts.fresh + counts.copied == total);
    CHECK(counts.fresh <= (destination->to.uffd < 0 ? 0 : fresh));
    for (uint64_t page = 0; page < PAGES; ++page)
        CHECK(bit_at(destination->placed, page) == was_placed[page]);
    free(payload);
}

static void clear_random(struct destination *destination, uint64_t *state)
{
    uint32_t runs[2 * RUNS];
    uint64_t total, expected = 0;

    if (!random_runs(runs, &total, state))
        return;
    for (size_t i = 0; i < RUNS; ++i)
        for (uint64_t page = runs[2 * i]; page < (uint64_t)runs[2 * i] + runs[2 * i + 1]; ++page)
            if (bit_at(destination->placed, page)) {
                destination->expected[page] = 0;
                ++expected;
            }
    CHECK(clear_runs(destination->to.ram, destination->placed, (unsigned char *)runs, RUNS) ==
          expected);
}

/* Write a page behind the engine's back, so that UFFDIO_COPY finds it there (EEXIST). */
static void write_behind(struct destination *destination, uint64_t *state)
{
    uint64_t page = random_below(state, PAGES);

    if (bit_at(destination->placed, page))
        return;
    memset(destination->to.ram + page * PAGE_BYTES, 0x5a, PAGE_BYTES);
    destination->expected[page] = 0x5a;
}

static void check_ram(const struct destination *destination)
{
    unsigned char page_bytes[PAGE_BYTES], wanted[PAGE_BYTES];

    for (uint64_t page = 0; page < PAGES; ++page) {
        memset(wanted, destination->expected[page], PAGE_BYTES);
        CHECK(pread(destination->fd, page_bytes, PAGE_BYTES, (off_t)(page * PAGE_BYTES)) ==
              (ssize_t)PAGE_BYTES);
        CHECK(memcmp(page_bytes, wanted, PAGE_BYTES) == 0);
    }
}

static void random_steps_leave_every_page_right(bool with_uffd, uint64_t *state)
{
    struct destination destination;

    destination_open(&destination, with_uffd);
    for (int i = 0; i < 12; ++i) {
        write_behind(&destination, state);
        if (random_below(state, 3) == 0)
            clear_random(&destination, state);
        else
            place_random(&destination, state);
    }
    check_ram(&destination);
    destination_close(&destination);
}

/* An error in the middle: what was placed keeps its bits, the rest has none. */
static void after_an_error_only_placed_pages_have_bits(void)
{
    static const unsigned char payload[200 * PAGE_BYTES] = {1};
    const uint32_t runs[] = {0, 200};
    struct destination destination;
    struct placed_pages counts;

    destination_open(&destination, true);
    CHECK(uffd_unregister(destination.to.uffd, destination.to.fresh_address + 100 * PAGE_BYTES,
                          200 * PAGE_BYTES) == 0);
    bitmap_set_range(destination.placed, 150, 1);
    CHECK(place_runs(&destination.to, payload, (const unsigned char *)runs, 1, &counts) == -ENOENT);
    for (uint64_t page = 0; page < PAGES; ++page)
        CHECK(bit_at(destination.placed, page) == (page < counts.fresh || page == 150));
    destination_close(&destination);
}

int main(void)
{
    uint64_t state = 11;
    long uffd = syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY_FLAG); /* not by what is tested */

    for (int i = 0; i < 60; ++i)
        random_steps_leave_every_page_right(false, &state);
    if (uffd < 0) {
        perror("no userfaultfd here, its half is not tested");
        return SKIPPED;
    }
    close((int)uffd);
    for (int i = 0; i < 60; ++i)
        random_steps_leave_every_page_right(true, &state);
    after_an_error_only_placed_pages_have_bits();
    return 0;
}
