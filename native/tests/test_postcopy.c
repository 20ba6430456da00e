/* Both services, two vCPUs and a background inserter as threads of one process: every page is the
 * source's. Then hostile bytes at either service: they are refused, or do what they say. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "faults.h"
#include "linux_abi.h"
#include "page_service.h"
#include "userfault.h"

#define PAGES ((uint64_t)2048)
#define WORDS ((size_t)PAGES / 64)
#define ROUNDS 3

static const unsigned char SESSION[16] = "session of tests";

struct world {
    int source_fd, ram_fd, uffd, pair[2], never[2];
    unsigned char *ram; /* the guest's */
    bitmap_word received[WORDS], dirty[WORDS];
    uint64_t fault_words[FAULT_WORDS], page_words[PAGE_SERVICE_WORDS];
    struct insertion to;
    struct fault_service *faults;
    struct page_service *pages;
    atomic_bool ends;
};

static void fill_page(unsigned char *page, uint64_t index)
{
    uint64_t state = index + 1;

    for (size_t i = 0; i < PAGE_BYTES; i += 8) {
        uint64_t word = index % 7 == 0 ? 0 : random_word(&state);

        memcpy(page + i, &word, 8);
    }
}

static bool world_open(struct world *world)
{
    unsigned char page[PAGE_BYTES];
    struct fault_block block = {.page_count = PAGES};
    struct page_block source = {.page_count = PAGES, .unit_pages = 1};

    memset((void *)world, 0, sizeof *world);
    world->uffd = uffd_open(UFFD_USER_MODE_ONLY_FLAG,
                            UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID);
    if (world->uffd < 0)
        return false;
    world->source_fd = memfd_create("source", MFD_CLOEXEC);
    world->ram_fd = memfd_create("ram", MFD_CLOEXEC);
    CHECK(ftruncate(world->source_fd, (off_t)(PAGES * PAGE_BYTES)) == 0);
    CHECK(ftruncate(world->ram_fd, (off_t)(PAGES * PAGE_BYTES)) == 0);
    for (uint64_t i = 0; i < PAGES; ++i) {
        fill_page(page, i);
        CHECK(pwrite(world->source_fd, page, PAGE_BYTES, (off_t)(i * PAGE_BYTES)) == PAGE_BYTES);
    }
    world->ram = mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, world->ram_fd, 0);
    CHECK(world->ram != MAP_FAILED);
    CHECK(uffd_register(world->uffd, (uint64_t)(uintptr_t)world->ram, PAGES * PAGE_BYTES,
                        UFFDIO_REGISTER_MODE_MISSING) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, world->pair) == 0);
    CHECK(pipe(world->never) == 0);
    bitmap_set_range(world->dirty, 0, PAGES);
    world->to = (struct insertion){world->uffd, (uint64_t)(uintptr_t)world->ram, 1, world->received};
    block.to = world->to;
    source.fd = world->source_fd;
    source.dirty = world->dirty;
    CHECK(faults_open(&world->faults, &block, 1, SESSION, world->fault_words, 2, true) == 0);
    CHECK(pages_open(&world->pages, &source, 1, SESSION, world->page_words) == 0);
    faults_reconnect(world->faults);
    pages_reconnect(world->pages);
    return true;
}

static void world_close(struct world *world)
{
    faults_close(world->faults);
    pages_close(world->pages);
    CHECK(uffd_unregister(world->uffd, (uint64_t)(uintptr_t)world->ram, PAGES * PAGE_BYTES) == 0);
    munmap(world->ram, PAGES * PAGE_BYTES);
    for (int i = 0; i < 2; ++i) {
        close(world->pair[i]);
        close(world->never[i]);
    }
    close(world->uffd);
    close(world->ram_fd);
    close(world->source_fd);
}

/* -- right peers ----------------------------------------------------------------------------------- */

static void *run_faults(void *argument)
{
    struct world *world = argument;
    uint64_t block, page;

    while (!atomic_load(&world->ends)) {
        int happened = faults_run(world->faults, world->pair[0], world->never[0], 20);

        CHECK(happened >= 0 && !(happened & (FAULTS_LOST | FAULTS_WOKEN)));
        while (faults_news(world->faults, &block, &page))
            faults_prefetch(world->faults, block, page, page + 8 > PAGES ? PAGES - page : 8);
    }
    return NULL;
}

static void *run_pages(void *argument)
{
    struct world *world = argument;

    while (!atomic_load(&world->ends))
        CHECK(pages_run(world->pages, world->pair[1], world->never[0], 20) == 0);
    return NULL;
}

static void *run_background(void *argument)
{
    struct world *world = argument;
    unsigned char pages[16 * PAGE_BYTES];

    for (uint32_t first = 0; first < PAGES; first += 16) {
        uint32_t run[2] = {first, 16};
        struct inserted_pages counts;

        for (uint64_t i = 0; i < 16; ++i)
            fill_page(pages + i * PAGE_BYTES, first + i);
        CHECK(insert_runs(&world->to, pages, (unsigned char *)run, 1, &counts) == 0);
        CHECK(counts.fresh + counts.present == 16);
    }
    return NULL;
}

/* Control, which looks at both statistics pages at any time. */
static void *run_reader(void *argument)
{
    struct world *world = argument;

    while (!atomic_load(&world->ends)) {
        for (size_t i = 0; i < PAGE_SERVICE_WORDS; ++i)
            CHECK(__atomic_load_n(&world->page_words[i], __ATOMIC_RELAXED) < UINT64_C(1) << 40);
        for (size_t i = 0; i < FAULT_WORDS; ++i)
            CHECK(__atomic_load_n(&world->fault_words[i], __ATOMIC_RELAXED) < UINT64_C(1) << 40);
        sched_yield();
    }
    return NULL;
}

static void *run_vcpu(void *argument)
{
    struct world *world = argument;
    uint64_t state = (uint64_t)(uintptr_t)&state;
    unsigned char expected[PAGE_BYTES];

    for (uint64_t i = 0; i < PAGES; ++i) {
        uint64_t page = random_below(&state, PAGES);

        fill_page(expected, page);
        CHECK(memcmp(world->ram + page * PAGE_BYTES, expected, PAGE_BYTES) == 0);
    }
    return NULL;
}

static void test_every_page_is_the_sources(bool with_background)
{
    void *(*roles[])(void *) = {run_vcpu, run_vcpu, run_background, run_faults, run_pages, run_reader};
    pthread_t threads[6];
    static struct world world;
    unsigned char expected[PAGE_BYTES], found[PAGE_BYTES];

    CHECK(world_open(&world));
    for (int i = 0; i < 6; ++i)
        if (i != 2 || with_background)
            CHECK(pthread_create(&threads[i], NULL, roles[i], &world) == 0);
    for (int i = 0; i < 6; ++i) {
        if (i == 3)
            atomic_store(&world.ends, true);
        if (i != 2 || with_background)
            CHECK(pthread_join(threads[i], NULL) == 0);
    }
    for (uint64_t i = 0; with_background && i < PAGES; ++i) {
        fill_page(expected, i); /* by pread: zero pages may be holes, and nobody serves any more */
        CHECK(pread(world.ram_fd, found, PAGE_BYTES, (off_t)(i * PAGE_BYTES)) == PAGE_BYTES);
        CHECK(memcmp(found, expected, PAGE_BYTES) == 0);
    }
    CHECK(world.fault_words[FAULT_STRAY_EVENTS] == 0);
    world_close(&world);
}

/* -- hostile ones ---------------------------------------------------------------------------------- */

/* A frame that is right but for a few bytes, now and then. */
static struct frame some_frame(uint64_t *state, uint64_t sequence)
{
    struct frame frame = {
        .magic = {'r', 'f', 'p', 'f'},
        .version = 1,
        .kind = (uint8_t)(FRAME_DEMAND + random_below(state, 6)),
        .codec = 1,
        .sequence = sequence,
        .request = sequence - 1,
        .first_page = (uint32_t)random_below(state, PAGES),
        .page_count = (uint32_t)(1 + random_below(state, 20)),
        .block = 1,
    };

    memcpy(frame.session, SESSION, sizeof SESSION);
    if (frame.kind == FRAME_DATA)
        frame.payload_bytes = frame.page_count * PAGE_BYTES;
    if (random_below(state, 4) == 0)
        ((unsigned char *)&frame)[random_below(state, sizeof frame)] ^=
            (unsigned char)(1 + random_below(state, 255));
    return frame;
}

static void send_hostile(int fd, uint64_t *state)
{
    unsigned char bytes[8192];

    for (uint64_t sequence = 2; sequence < 40; ++sequence) {
        struct frame frame = some_frame(state, sequence);
        size_t tail = frame.kind == FRAME_DATA ? random_below(state, sizeof bytes) : 0;

        memset(bytes, (int)sequence, sizeof bytes);
        if (send(fd, &frame, sizeof frame, MSG_NOSIGNAL) < 0 ||
            send(fd, bytes, tail, MSG_NOSIGNAL) < 0)
            return; /* given up, or full */
    }
}

static void test_hostile_bytes_do_no_harm(uint64_t seed)
{
    static struct world world;
    uint64_t state = seed;

    CHECK(world_open(&world));
    for (int i = 0; i < 300; ++i) {
        int both[2], happened;

        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, both) == 0);
        send_hostile(both[1], &state);
        shutdown(both[1], SHUT_WR);
        pages_reconnect(world.pages);
        faults_reconnect(world.faults);
        if (i % 2 == 0) {
            do
                happened = pages_run(world.pages, both[0], world.never[0], 1);
            while (happened == 0);
            CHECK(happened == PAGES_LOST && *pages_reason(world.pages));
        } else {
            CHECK(faults_prefetch(world.faults, 0, random_below(&state, PAGES - 8), 8) <= 8);
            do
                happened = faults_run(world.faults, both[0], world.never[0], 1);
            while (happened == 0);
            CHECK(happened == FAULTS_LOST && *faults_reason(world.faults));
        }
        close(both[0]);
        close(both[1]);
    }
    world_close(&world);
}

/* Serve one request on a connection of its own until the head of an answer is there, for 10 s at most. */
static int serve_request(struct page_service *pages, int never, const struct frame *frame,
                         struct frame *answer)
{
    int both[2], happened = 0;
    ssize_t got = 0;

    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, both) == 0);
    CHECK(send(both[1], frame, sizeof *frame, 0) == sizeof *frame);
    pages_reconnect(pages);
    for (int i = 0; i < 200 && happened == 0 && got != sizeof *answer; ++i) {
        happened = pages_run(pages, both[0], never, 50);
        got = recv(both[1], answer, sizeof *answer, MSG_DONTWAIT);
    }
    close(both[0]);
    close(both[1]);
    return happened;
}

static struct frame demand_of(uint32_t page)
{
    struct frame frame = {.magic = {'r', 'f', 'p', 'f'}, .version = 1, .kind = FRAME_DEMAND,
                          .codec = 1, .sequence = 2, .request = 1, .first_page = page,
                          .page_count = 1, .block = 1};

    memcpy(frame.session, SESSION, sizeof SESSION);
    return frame;
}

static void test_an_answer_is_no_request_however_large(void)
{
    static struct world world;
    struct frame frame = demand_of(0), answer;

    CHECK(world_open(&world));
    frame.kind = FRAME_DATA; /* larger than what the service takes in at once */
    frame.page_count = 512;
    frame.payload_bytes = 512 * PAGE_BYTES;
    CHECK(serve_request(world.pages, world.never[0], &frame, &answer) == PAGES_LOST);
    CHECK(strstr(pages_reason(world.pages), "kind 6") != NULL);
    world_close(&world);
}

static void test_the_last_page_of_the_largest_block_is_answered(void)
{
    const uint64_t page_count = UINT64_C(1) << 32;
    int fd = memfd_create("large", MFD_CLOEXEC), never[2];
    struct frame frame = demand_of(UINT32_MAX), answer = {.kind = 0};
    uint64_t words[PAGE_SERVICE_WORDS] = {0};
    struct page_block block = {fd, page_count, 1, NULL};
    struct page_service *pages;

    CHECK(ftruncate(fd, (off_t)(page_count * PAGE_BYTES)) == 0 && pipe(never) == 0);
    block.dirty = mmap(NULL, page_count / 8, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(block.dirty != MAP_FAILED);
    CHECK(pages_open(&pages, &block, 1, SESSION, words) == 0);
    CHECK(serve_request(pages, never[0], &frame, &answer) == 0);
    CHECK(answer.kind == FRAME_ZERO && answer.first_page == UINT32_MAX && answer.page_count == 1);
    CHECK(words[PAGE_DEMAND_PAGES] == 1);
    pages_close(pages);
    munmap((void *)block.dirty, page_count / 8);
    close(fd);
    close(never[0]);
    close(never[1]);
}

static void *read_a_page(void *page)
{
    return (void *)(uintptr_t)*(volatile unsigned char *)page;
}

static void begin_fault(struct world *world, uint64_t page, pthread_t *thread)
{
    struct pollfd polled = {world->uffd, POLLIN, 0};

    CHECK(pthread_create(thread, NULL, read_a_page, world->ram + page * PAGE_BYTES) == 0);
    CHECK(poll(&polled, 1, 60000) == 1);
}

/* By somebody else: the demand stays open. */
static void end_fault(struct world *world, uint64_t page, pthread_t thread)
{
    struct inserted_pages counts = {0, 0};

    CHECK(insert_pages(&world->to, NULL, page, 1, &counts) == 0 && counts.fresh == 1);
    CHECK(pthread_join(thread, NULL) == 0);
}

static void test_a_fault_that_finds_no_room_for_its_demand_waits(void)
{
    static struct world first, second;
    static uint64_t words[FAULT_WORDS];
    struct fault_service *faults;
    struct fault_block blocks[2];
    pthread_t threads[2];
    const uint64_t most = 1024; /* DEMANDS_MAX of native/fault_service.h */

    CHECK(world_open(&first) && world_open(&second));
    blocks[0] = (struct fault_block){.to = first.to, .page_count = PAGES};
    blocks[1] = (struct fault_block){.to = second.to, .page_count = PAGES};
    CHECK(faults_open(&faults, blocks, 2, SESSION, words, 2, false) == 0);
    for (uint64_t page = 0; page < most - 1; ++page) {
        begin_fault(&first, page, &threads[0]);
        CHECK(faults_run(faults, -1, first.never[0], 0) == 0);
        end_fault(&first, page, threads[0]);
    }
    CHECK(words[FAULT_OPEN] == most - 1);
    begin_fault(&first, most, &threads[0]);
    begin_fault(&second, 0, &threads[1]);
    for (int i = 0; i < 2; ++i) {
        CHECK(faults_run(faults, -1, first.never[0], 0) == 0);
        CHECK(words[FAULT_OPEN] == most && words[FAULT_EVENTS] == most);
    }
    end_fault(&first, most, threads[0]);
    end_fault(&second, 0, threads[1]);
    faults_close(faults);
    world_close(&first);
    world_close(&second);
}

/* Another thread changes other bits of the same words meanwhile. */
struct neighbours {
    bitmap_word *received;
    atomic_bool ends;
};

static void *change_odd_pages(void *argument)
{
    struct neighbours *neighbours = argument;

    while (!atomic_load(&neighbours->ends))
        for (uint64_t page = 1; page < PAGES; page += 2) {
            bitmap_set_range(neighbours->received, page, 1);
            atomic_fetch_and(&neighbours->received[page / 64], ~(UINT64_C(1) << (page % 64)));
        }
    return NULL;
}

static void test_discarding_frees_what_is_stale_and_changes_no_other_bit(void)
{
    static bitmap_word received[WORDS], stale[WORDS];
    struct neighbours neighbours = {received, false};
    int fd = memfd_create("ram", MFD_CLOEXEC);
    unsigned char byte;
    pthread_t thread;

    CHECK(ftruncate(fd, (off_t)(PAGES * PAGE_BYTES)) == 0);
    CHECK(pthread_create(&thread, NULL, change_odd_pages, &neighbours) == 0);
    for (int i = 0; i < 5; ++i) {
        for (uint64_t page = 0; page < PAGES; ++page) {
            CHECK(pwrite(fd, "x", 1, (off_t)(page * PAGE_BYTES)) == 1);
            bitmap_set_range(received, page, page % 2 == 0);
            bitmap_set_range(stale, page, page % 4 == 0);
        }
        CHECK(discard_stale(fd, received, stale, PAGES, 1) == (int64_t)PAGES / 4);
        for (uint64_t page = 0; page < PAGES; ++page) {
            CHECK(pread(fd, &byte, 1, (off_t)(page * PAGE_BYTES)) == 1);
            CHECK(byte == (page % 4 == 0 ? 0 : 'x'));
            CHECK(page % 2 != 0 || is_received(received, page, 1) == (page % 4 != 0));
            CHECK(!is_received(stale, page, 1));
        }
    }
    atomic_store(&neighbours.ends, true);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(ftruncate(fd, 0) == 0);
    bitmap_set_range(stale, PAGES - 1, 1);
    CHECK(discard_stale(-1, received, stale, PAGES, 1) == -EBADF && is_received(stale, PAGES - 1, 1));
    close(fd);
}

int main(void)
{
    static struct world world;

    test_discarding_frees_what_is_stale_and_changes_no_other_bit();
    if (!world_open(&world)) {
        fprintf(stderr, "no userfaultfd here\n");
        return SKIPPED;
    }
    world_close(&world);
    test_an_answer_is_no_request_however_large();
    test_the_last_page_of_the_largest_block_is_answered();
    test_a_fault_that_finds_no_room_for_its_demand_waits();
    for (int i = 0; i < ROUNDS; ++i) {
        test_every_page_is_the_sources(i % 2 == 0);
        test_hostile_bytes_do_no_harm((uint64_t)i + 1);
    }
    return 0;
}
