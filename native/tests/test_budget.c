/* The budget: arithmetic at its limits, and two threads that buy at once. */
#include "budget.h"

#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

#define SECOND UINT64_C(1000000000)

static void bandwidth_is_sold_in_sequence(void)
{
    struct budget budget = {1000, 0, 0};

    CHECK(budget_take(&budget, 500, 10 * SECOND, 0) == 10 * SECOND);
    CHECK(budget_take(&budget, 500, 10 * SECOND, 0) == 10 * SECOND + SECOND / 2);
    CHECK(budget_take(&budget, 0, 10 * SECOND, 0) == 11 * SECOND);
    CHECK(budget_take(&budget, 1, 20 * SECOND, 0) == 20 * SECOND); /* unsold time is lost */
}

static void a_burst_uses_what_was_unsold(void)
{
    struct budget budget = {1000, 0, 0};

    CHECK(budget_take(&budget, 2000, 10 * SECOND, 2 * SECOND) == 10 * SECOND);
    CHECK(budget_take(&budget, 1000, 10 * SECOND, 2 * SECOND) == 10 * SECOND);
    CHECK(budget_take(&budget, 1, 10 * SECOND, 2 * SECOND) == 11 * SECOND);
}

static void extremes_stay_in_range(void)
{
    struct budget budget = {0, 0, 0};

    CHECK(budget_take(&budget, UINT64_MAX, 7, 0) == 7 && budget.sold_until_ns == 0);
    budget.rate_bytes_per_s = 1;
    CHECK(budget_take(&budget, UINT64_MAX, UINT64_MAX, 0) == UINT64_MAX);
    CHECK(budget_take(&budget, UINT64_MAX, 0, UINT64_MAX) == UINT64_MAX);
    budget = (struct budget){UINT64_MAX, 0, 0};
    CHECK(budget_take(&budget, UINT64_MAX, 5, 9) == 5 && budget.sold_until_ns == SECOND);
    budget = (struct budget){3, 0, 0};
    budget_take(&budget, 1, 0, 0);
    CHECK(budget.sold_until_ns == SECOND / 3 + 1); /* never sells more than there is */
}

static void a_new_rate_holds_nobody_to_what_was_sold_at_the_old_one(void)
{
    struct budget budget = {1, 0, 0};

    CHECK(budget_take(&budget, 1000, 10 * SECOND, 0) == 10 * SECOND);
    CHECK(budget_take(&budget, 1000, 10 * SECOND, 0) == 1010 * SECOND);
    budget_set_rate(&budget, 1000, 20 * SECOND);
    CHECK(budget.generation == 1);
    CHECK(budget_take(&budget, 1000, 20 * SECOND, 0) == 20 * SECOND);
    CHECK(budget_take(&budget, 1000, 20 * SECOND, 0) == 21 * SECOND);
}

static struct budget shared = {1000000000, 0, 0};

/* Buy at 1 byte a second and at 10^9 while the rate changes; whoever bought across a change buys
 * again, and what is left in the account at the end was bought at the last rate alone. */
static struct budget changing = {1, 0, 0};

static void *buyer_who_follows(void *unused)
{
    for (int i = 0; i < 20000; ++i) {
        uint64_t before;

        do {
            before = atomic_load(&changing.generation);
            budget_take(&changing, 1, 0, 0);
        } while (atomic_load(&changing.generation) != before);
    }
    return unused;
}

static void purchases_across_a_change_of_the_rate_leave_no_trace(void)
{
    pthread_t threads[2];

    for (int i = 0; i < 2; ++i)
        CHECK(pthread_create(&threads[i], NULL, buyer_who_follows, NULL) == 0);
    for (uint64_t i = 1; i < 5000; ++i)
        budget_set_rate(&changing, i % 2 ? 1000000000 : 1, i);
    budget_set_rate(&changing, 1000000000, 5000);
    for (int i = 0; i < 2; ++i)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(changing.sold_until_ns <= 5000 + 2 * 20001); /* not a single second of the slow rate */
}


static void *buyer(void *unused)
{
    for (int i = 0; i < 100000; ++i)
        budget_take(&shared, 3, 0, 0);
    return unused;
}

static void nothing_is_sold_twice(void)
{
    pthread_t threads[2];

    for (int i = 0; i < 2; ++i)
        CHECK(pthread_create(&threads[i], NULL, buyer, NULL) == 0);
    for (int i = 0; i < 2; ++i)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(shared.sold_until_ns == 600000);
}

int main(void)
{
    bandwidth_is_sold_in_sequence();
    a_burst_uses_what_was_unsold();
    extremes_stay_in_range();
    nothing_is_sold_twice();
    a_new_rate_holds_nobody_to_what_was_sold_at_the_old_one();
    purchases_across_a_change_of_the_rate_leave_no_trace();
    return 0;
}
