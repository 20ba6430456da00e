/* take_batch beside others who use the same words: an observer, an owner of the other bits, and one who takes
 * the same. */
#include "batch.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "check.h"

#define TAKEN UINT64_C(0x00000000ffffffff)  /* the slice: the lower half of the one word */
#define OTHERS UINT64_C(0xffffffff00000000) /* bits that only the second thread changes */
#define ROUNDS_MIN 60000
#define ROUNDS_MAX 20000000 /* where threads never run at the same time */
#define MOVES_SEEN 2000     /* how often the observer must have looked in the middle of a move */

static bitmap_word dirty, in_flight;
static _Atomic uint64_t round_number; /* odd while the round is being set up */
static _Atomic uint64_t moves_seen;
static _Atomic uint64_t others_share;
static atomic_bool is_over;

/* Take what is dirty into a table of so many runs. */
static struct run_table take(unsigned char *table, size_t capacity)
{
    static unsigned char unread;
    struct batch batch = {
        .ram = &unread,
        .dirty = &dirty,
        .in_flight = &in_flight,
        .slice = {32, 64, 0, 1},
        .pages_max = 64,
        .data = {table, capacity, 0, 0, {0, 0}},
    };

    take_batch(&batch);
    return batch.data;
}

static void take_all_once(void)
{
    static unsigned char table[RUN_BYTES];
    struct run_table taken = take(table, 1);

    CHECK(taken.pages == 32 && taken.count == 1);
    CHECK((dirty & TAKEN) == 0 && (in_flight & TAKEN) == TAKEN);
}

/* Every page is dirty or in flight at every instant: who dies in the middle loses none. */
static void *observe(void *unused)
{
    (void)unused;
    while (!is_over) {
        uint64_t before = round_number;
        uint64_t is_dirty = dirty & TAKEN; /* first: pages move from here ... */
        uint64_t is_in_flight = in_flight & TAKEN; /* ... to here */

        if (before % 2 != 0 || round_number != before)
            continue;
        CHECK((is_dirty | is_in_flight) == TAKEN);
        moves_seen += (is_dirty & is_in_flight) != 0;
    }
    return NULL;
}

/* Set and clear bits of the same words; nobody else does, so each must be as this thread left it. */
static void *use_the_other_bits(void *unused)
{
    uint64_t state = 5;

    (void)unused;
    while (!is_over) {
        uint64_t bits = random_word(&state) & OTHERS;

        atomic_fetch_or(&dirty, bits);
        atomic_fetch_or(&in_flight, bits);
        CHECK((dirty & OTHERS) == bits && (in_flight & OTHERS) == bits);
        atomic_fetch_and(&dirty, ~bits);
        atomic_fetch_and(&in_flight, ~bits);
        CHECK((dirty & OTHERS) == 0 && (in_flight & OTHERS) == 0);
        ++moves_seen;
    }
    return NULL;
}

static void rounds_beside(void *(*other)(void *))
{
    pthread_t thread;

    moves_seen = 0;
    is_over = false;
    dirty = TAKEN;
    in_flight = 0;
    CHECK(pthread_create(&thread, NULL, other, NULL) == 0);
    for (int i = 0; i < ROUNDS_MAX && (i < ROUNDS_MIN || moves_seen < MOVES_SEEN); ++i) {
        ++round_number;
        atomic_fetch_or(&dirty, TAKEN);
        atomic_fetch_and(&in_flight, ~TAKEN);
        ++round_number;
        take_all_once();
    }
    is_over = true;
    CHECK(pthread_join(thread, NULL) == 0);
}

/* Take some bits now and then, as a page service does. */
static void *take_some(void *unused)
{
    uint64_t state = 7;

    (void)unused;
    while (!is_over) {
        uint64_t bits = random_word(&state) & random_word(&state) & random_word(&state) & TAKEN;

        atomic_fetch_or(&others_share, bits & atomic_fetch_and(&dirty, ~bits));
    }
    return NULL;
}

static uint64_t take_share(void)
{
    static unsigned char table[16 * RUN_BYTES];
    struct run_table taken = take(table, 16);
    uint64_t share = 0;

    for (size_t i = 0; i < taken.count; ++i) {
        struct page_range run = run_at(table, i);

        share |= word_mask(0, run.first_page, run.first_page + run.page_count);
    }
    CHECK(bit_count(share) == taken.pages);
    return share;
}

/* Of two who take the same bits each gets its own, and what was in flight before stays so. */
static void each_bit_is_taken_once(void)
{
    uint64_t state = 11;
    pthread_t thread;

    moves_seen = 0;
    is_over = false;
    dirty = 0;
    CHECK(pthread_create(&thread, NULL, take_some, NULL) == 0);
    for (int i = 0; i < ROUNDS_MAX && (i < ROUNDS_MIN || moves_seen < MOVES_SEEN); ++i) {
        uint64_t before = random_word(&state) & TAKEN, share;

        others_share = 0; /* every bit of the last round is accounted for */
        in_flight = before;
        atomic_fetch_or(&dirty, TAKEN);
        share = take_share();
        while ((share | others_share) != TAKEN)
            sched_yield();
        CHECK((share & others_share) == 0 && in_flight == (before | share) && dirty == 0);
        moves_seen += share != 0 && share != TAKEN;
    }
    is_over = true;
    CHECK(pthread_join(thread, NULL) == 0);
}

int main(void)
{
    each_bit_is_taken_once();
    rounds_beside(observe);
    rounds_beside(use_the_other_bits);
    return 0;
}
