/* Pages judged after real vCPU threads wrote them. Exit code 0: all held. */
#define _GNU_SOURCE
#include "../workload.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGES 1030u /* not a multiple of 64, nor of the number of vCPUs */
#define SEED UINT64_C(77)
#define LONG_NS UINT64_C(20000000000)

#define CHECK(fact)                                                                                \
    do {                                                                                           \
        if (!(fact)) {                                                                             \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #fact);                   \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static uint64_t counters[PAGES];
static uint64_t bitmap[PAGES / 64 + 1];

static void *new_ram(void)
{
    void *ram = mmap(NULL, PAGES * 4096u, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(ram != MAP_FAILED);
    return ram;
}

static void nap_ms(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static uint64_t sum_of(const uint64_t *values, unsigned count)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < count; i++)
        sum += values[i];
    return sum;
}

static uint64_t vcpu_writes(struct workload *workload)
{
    uint64_t writes[WORKLOAD_VCPUS_MAX];
    workload_writes(workload, writes);
    return sum_of(writes, workload_vcpus(workload));
}

/* Wait, at most a minute, until so many writes were made. */
static void wait_for_writes(struct workload *workload, uint64_t writes)
{
    for (int i = 0; i < 60000 && vcpu_writes(workload) < writes; i++)
        nap_ms(1);
    CHECK(vcpu_writes(workload) >= writes);
}

static void all_is_right(void *ram, enum workload_kind contents, struct workload *workload)
{
    struct workload_judgement judgement = workload_judge(ram, 0, PAGES, contents, SEED, counters);
    CHECK(judgement.wrong_pages == 0 && judgement.first_wrong == UINT64_MAX);
    if (workload != NULL)
        CHECK(sum_of(counters, PAGES) == vcpu_writes(workload));
}

static void filled_pages_are_right_and_every_changed_bit_shows(enum workload_kind contents)
{
    uint64_t *ram = new_ram();
    workload_fill(ram, 0, PAGES, contents, SEED);
    all_is_right(ram, contents, NULL);
    for (unsigned bit = 0; bit < 4096 * 8; bit += 7) {
        uint64_t page = bit % PAGES, *word = ram + page * 512 + bit / 64;
        *word ^= UINT64_C(1) << bit % 64;
        struct workload_judgement judgement =
            workload_judge(ram, page, 1, contents, SEED, counters);
        CHECK(judgement.wrong_pages == 1 && judgement.first_wrong == page);
        CHECK(counters[0] == WORKLOAD_WRONG);
        *word ^= UINT64_C(1) << bit % 64;
    }
    all_is_right(ram, contents, NULL);
    munmap(ram, PAGES * 4096u);
}

static void a_page_in_the_place_of_another_is_wrong(void)
{
    unsigned char *ram = new_ram();
    workload_fill(ram, 0, PAGES, WORKLOAD_RANDOM, SEED);
    memcpy(ram + 5 * 4096, ram + 6 * 4096, 4096);
    memset(ram + 9 * 4096, 0, 4096);
    CHECK(workload_judge(ram, 0, PAGES, WORKLOAD_RANDOM, SEED, counters).wrong_pages == 2);
    CHECK(workload_judge(ram, 0, PAGES, WORKLOAD_RANDOM, SEED + 1, counters).wrong_pages == PAGES);
    memset(counters, 0, sizeof counters);
    struct workload_judgement hole = workload_judge_hole(0, PAGES, WORKLOAD_MIXED, SEED, counters);
    for (unsigned page = 0; page < PAGES; page++)
        hole.wrong_pages -= counters[page] == WORKLOAD_WRONG;
    CHECK(hole.wrong_pages == 0 && counters[hole.first_wrong] == WORKLOAD_WRONG);
    CHECK(workload_judge_hole(0, PAGES, WORKLOAD_ZERO, SEED, counters).wrong_pages == 0);
    munmap(ram, PAGES * 4096u);
}

static struct workload *start(void *ram, enum workload_pattern pattern, uint32_t vcpus, uint32_t words,
                              uint64_t rate)
{
    struct workload *workload = NULL;
    struct workload_options options = {ram, PAGES, vcpus, pattern, rate, words, SEED, bitmap};
    CHECK(workload_start(&workload, &options) == 0);
    return workload;
}

static void written_pages_are_right_and_counted(enum workload_pattern pattern, uint32_t vcpus,
                                                uint32_t words)
{
    void *ram = new_ram();
    workload_fill(ram, 0, PAGES, WORKLOAD_MIXED, SEED);
    memset(bitmap, 0, sizeof bitmap);
    struct workload *workload = start(ram, pattern, vcpus, words, 0);
    CHECK(vcpu_writes(workload) == 0);
    for (uint64_t writes = 3000; writes <= 12000; writes += 3000) {
        workload_resume(workload);
        wait_for_writes(workload, writes);
        CHECK(workload_pause(workload, LONG_NS, NULL) == 0);
        all_is_right(ram, WORKLOAD_MIXED, workload);
    }
    for (unsigned page = 0; page < PAGES; page++)
        CHECK((counters[page] != 0) == ((bitmap[page / 64] >> page % 64 & 1) != 0));
    uint64_t before = vcpu_writes(workload);
    nap_ms(5);
    CHECK(vcpu_writes(workload) == before);
    workload_free(workload);
    munmap(ram, PAGES * 4096u);
}

static void damage_stays_visible_however_often_the_page_is_written(void)
{
    uint64_t *ram = new_ram();
    workload_fill(ram, 0, PAGES, WORKLOAD_TEXT, SEED);
    ram[100 * 512 + 300] ^= 4;
    struct workload *workload = start(ram, WORKLOAD_SWEEP, 1, 508, 0);
    workload_resume(workload);
    wait_for_writes(workload, 20 * PAGES);
    CHECK(workload_pause(workload, LONG_NS, NULL) == 0);
    struct workload_judgement judgement =
        workload_judge(ram, 0, PAGES, WORKLOAD_TEXT, SEED, counters);
    CHECK(judgement.wrong_pages == 1 && judgement.first_wrong == 100);
    workload_free(workload);
    munmap(ram, PAGES * 4096u);
}

static void pauses_cut_every_wait_short(void)
{
    void *ram = new_ram();
    struct workload *workload = start(ram, WORKLOAD_SCATTER, 3, 8, 1); /* a write in 3 hours and vCPU */
    uint64_t took_ns;
    workload_resume(workload);
    nap_ms(20);
    CHECK(workload_pause(workload, LONG_NS, &took_ns) == 0);
    CHECK(took_ns < UINT64_C(60000000000));
    workload_free(workload);
    workload = start(ram, WORKLOAD_SCATTER, 2, 8, 0);
    CHECK(workload_throttle(workload, 99) == 0 && workload_throttle(workload, 100) == -EINVAL);
    workload_resume(workload);
    uint64_t best_ns = UINT64_MAX; /* a busy machine may delay any of them, but not all */
    for (int i = 0; i < 5; i++) {
        nap_ms(30); /* now they sleep for almost a second */
        CHECK(workload_pause(workload, LONG_NS, &took_ns) == 0);
        best_ns = took_ns < best_ns ? took_ns : best_ns;
        workload_resume(workload);
    }
    CHECK(best_ns < UINT64_C(900000000));
    workload_stop(workload);
    workload_stop(workload);
    workload_resume(workload);
    workload_free(workload);
    munmap(ram, PAGES * 4096u);
}

static void a_limit_holds_its_vcpu_and_no_other(void)
{
    uint64_t pages[2], slept_ns[2], took_ns;
    void *ram = new_ram();
    struct workload *workload = start(ram, WORKLOAD_SWEEP, 2, 8, 0);
    workload_resume(workload);
    wait_for_writes(workload, 3 * PAGES);
    workload_dirtied(workload, pages, slept_ns);
    CHECK(pages[0] == 0 && pages[1] == 0); /* nobody asked for it */
    CHECK(workload_limit_dirty(workload, 2, 1) == -EINVAL);
    uint64_t began_ns = now_ns();
    CHECK(workload_limit_dirty(workload, 0, 50 * 4096u) == 0);
    workload_count_dirty(workload, true);
    do {
        nap_ms(1);
        workload_dirtied(workload, pages, slept_ns);
    } while (slept_ns[0] < UINT64_C(300000000)); /* as long as 15 pages take */
    CHECK(pages[0] >= 1 && pages[0] <= (now_ns() - began_ns) / 20000000 + 6); /* 0.1 s is made up for */
    CHECK(pages[1] >= PAGES / 2 && slept_ns[1] == 0); /* its whole share, at least once */
    CHECK(workload_limit_dirty(workload, 0, 1) == 0);
    nap_ms(30); /* now it sleeps for an hour */
    CHECK(workload_pause(workload, LONG_NS, &took_ns) == 0);
    CHECK(took_ns < UINT64_C(60000000000));
    CHECK(workload_limit_dirty(workload, 0, 0) == 0);
    workload_resume(workload);
    uint64_t before = pages[0];
    do {
        nap_ms(1);
        workload_dirtied(workload, pages, slept_ns);
    } while (pages[0] < before + PAGES / 2);
    workload_free(workload);
    munmap(ram, PAGES * 4096u);
}

static void a_bitmap_can_be_exchanged_while_it_runs(void)
{
    uint64_t *own = calloc(PAGES / 64 + 1, 8);
    void *ram = new_ram();
    struct workload *workload = start(ram, WORKLOAD_SWEEP, 2, 8, 0);
    workload_resume(workload);
    workload_set_bitmap(workload, own);
    wait_for_writes(workload, vcpu_writes(workload) + 3 * PAGES);
    workload_set_bitmap(workload, NULL);
    uint64_t any = 0;
    for (unsigned i = 0; i <= PAGES / 64; i++)
        any |= own[i];
    CHECK(any != 0);
    free(own);
    wait_for_writes(workload, vcpu_writes(workload) + PAGES);
    workload_free(workload);
    munmap(ram, PAGES * 4096u);
}

static void a_state_goes_on_elsewhere_and_a_damaged_one_changes_nothing(void)
{
    void *ram = new_ram();
    unsigned char state[4096], other[4096];
    const char *wrong = NULL;
    struct workload *source = start(ram, WORKLOAD_HOTSPOT, 3, 8, 0);
    workload_resume(source);
    wait_for_writes(source, 1000);
    CHECK(workload_save(source, state) == -EBUSY);
    CHECK(workload_pause(source, LONG_NS, NULL) == 0);
    size_t size = workload_state_size(source);
    CHECK(workload_save(source, state) == 0);

    struct workload *destination = start(ram, WORKLOAD_HOTSPOT, 3, 8, 0);
    for (size_t i = 0; i < size; i++) {
        state[i] ^= 0x10;
        CHECK(workload_load(destination, state, size, &wrong) == -EINVAL && wrong != NULL);
        CHECK(workload_load(destination, state, i, &wrong) == -EINVAL && wrong != NULL);
        state[i] ^= 0x10;
    }
    CHECK(vcpu_writes(destination) == 0);
    CHECK(workload_load(destination, state, size, &wrong) == 0 && wrong == NULL);
    CHECK(workload_save(destination, other) == 0 && memcmp(state, other, size) == 0);
    workload_resume(destination);
    wait_for_writes(destination, vcpu_writes(source) + 1000);
    CHECK(workload_pause(destination, LONG_NS, NULL) == 0);
    all_is_right(ram, WORKLOAD_ZERO, destination);
    workload_free(source);
    workload_free(destination);
    munmap(ram, PAGES * 4096u);
}

/* As a sender reads: the vCPU may write meanwhile, and the bit tells that the page must be read again. */
#if defined(__GNUC__)
__attribute__((no_sanitize_thread))
#endif
static uint64_t counter_now(const uint64_t *page)
{
    return __atomic_load_n(page + 2, __ATOMIC_RELAXED);
}

/* Whoever takes a page's bit and then reads the page has its last write, or finds the bit again. */
static void a_bit_is_set_after_its_page_was_written(void)
{
    static _Alignas(4096) uint64_t page[512];
    uint64_t written = 0, seen = 0, before = 0;
    struct workload *workload = NULL;
    struct workload_options options = {page, 1, 1, WORKLOAD_SWEEP, 0, 508, SEED, &written};

    workload_fill(page, 0, 1, WORKLOAD_RANDOM, SEED);
    CHECK(workload_start(&workload, &options) == 0);
    for (int i = 0; i < 20000; i++) {
        workload_resume(workload);
        for (int takes = 0; takes < 1 + i % 3;)
            if (__atomic_exchange_n(&written, 0, __ATOMIC_ACQUIRE) != 0) {
                seen = counter_now(page);
                takes++;
            } else if (vcpu_writes(workload) == before) {
                sched_yield(); /* it has not begun */
            }
        CHECK(workload_pause(workload, LONG_NS, NULL) == 0);
        before = vcpu_writes(workload);
        CHECK(before == page[2]);
        CHECK(seen == page[2] || written == 1);
    }
    workload_free(workload);
}

static void impossible_options_are_refused(void)
{
    static uint64_t page[512];
    struct workload *workload = NULL;
    struct workload_options right = {page, 1, 1, WORKLOAD_SWEEP, 0, 8, SEED, NULL};
    struct workload_options wrong[5] = {right, right, right, right, right};
    wrong[0].vcpus = 0;
    wrong[1].vcpus = 2; /* more than pages */
    wrong[2].words_per_write = 509;
    wrong[3].pattern = 0;
    wrong[4].page_count = 0;
    for (unsigned i = 0; i < 5; i++)
        CHECK(workload_start(&workload, &wrong[i]) == -EINVAL && workload == NULL);
    CHECK(workload_contents("mixed") == WORKLOAD_MIXED && workload_contents("") == 0);
    CHECK(workload_pattern("append") == WORKLOAD_APPEND && workload_pattern("swee") == 0);
}

int main(void)
{
    for (int contents = WORKLOAD_ZERO; contents <= WORKLOAD_MIXED; contents++)
        filled_pages_are_right_and_every_changed_bit_shows((enum workload_kind)contents);
    a_page_in_the_place_of_another_is_wrong();
    for (int pattern = WORKLOAD_SWEEP; pattern <= WORKLOAD_APPEND; pattern++) {
        written_pages_are_right_and_counted((enum workload_pattern)pattern, 1, 508);
        written_pages_are_right_and_counted((enum workload_pattern)pattern, 3, 8);
        written_pages_are_right_and_counted((enum workload_pattern)pattern, 64, 0);
    }
    damage_stays_visible_however_often_the_page_is_written();
    pauses_cut_every_wait_short();
    a_limit_holds_its_vcpu_and_no_other();
    a_bitmap_can_be_exchanged_while_it_runs();
    a_state_goes_on_elsewhere_and_a_damaged_one_changes_nothing();
    a_bit_is_set_after_its_page_was_written();
    impossible_options_are_refused();
    puts("workload: all right");
    return 0;
}
