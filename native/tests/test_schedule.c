#define _GNU_SOURCE
/* Polls that look for a while before they sleep. */
#include "schedule.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"

#define SPIN UINT64_C(2000000)

static void what_is_ready_is_found_at_once(void)
{
    int ends[2];
    CHECK(pipe(ends) == 0 && write(ends[1], "x", 1) == 1);
    struct pollfd polled = {ends[0], POLLIN, 0};

    CHECK(poll_soon(&polled, 1, 10000, SPIN) == 1 && polled.revents == POLLIN);
    CHECK(poll_soon(&polled, 1, 0, SPIN) == 1);
    close(ends[0]);
    close(ends[1]);
}

static void nothing_is_waited_for_as_long_as_was_said(void)
{
    int ends[2];
    CHECK(pipe(ends) == 0);
    struct pollfd polled = {ends[0], POLLIN, 0};
    uint64_t began_ns = monotonic_ns();

    CHECK(poll_soon(&polled, 1, 0, UINT64_MAX / 4) == 0); /* who does not want to wait does not spin */
    CHECK(poll_soon(&polled, 1, 5, SPIN) == 0);
    CHECK(monotonic_ns() - began_ns >= UINT64_C(5000000));
    close(ends[0]);
    close(ends[1]);
}

static void *write_late(void *fd)
{
    nanosleep(&(struct timespec){0, 1000000}, NULL);
    CHECK(write(*(int *)fd, "x", 1) == 1);
    return NULL;
}

static void what_comes_while_it_spins_or_sleeps_is_found(void)
{
    for (uint64_t spin_ns = 0; spin_ns <= 100 * SPIN; spin_ns += 100 * SPIN) {
        int ends[2];
        pthread_t writer;
        CHECK(pipe(ends) == 0);
        struct pollfd polled = {ends[0], POLLIN, 0};

        CHECK(pthread_create(&writer, NULL, write_late, &ends[1]) == 0);
        CHECK(poll_soon(&polled, 1, 10000, spin_ns) == 1);
        pthread_join(writer, NULL);
        close(ends[0]);
        close(ends[1]);
    }
}

static void a_spinner_that_rests_sleeps_at_once(void)
{
    int ends[2];
    CHECK(pipe(ends) == 0);
    struct pollfd polled = {ends[0], POLLIN, 0};
    struct spinner spinner = {.spin_ns = UINT64_MAX / 4,
                              .rests_until_ns = monotonic_ns() + UINT64_C(60000000000)};

    CHECK(poll_modestly(&spinner, &polled, 1, 5) == 0);
    CHECK(write(ends[1], "x", 1) == 1);
    CHECK(poll_modestly(&spinner, &polled, 1, 10000) == 1 && polled.revents == POLLIN);
    CHECK(spinner.spins == 0);
    spinner.rests_until_ns = 0;
    CHECK(poll_modestly(&spinner, &polled, 1, 10000) == 1 && spinner.spins == 1);
    close(ends[0]);
    close(ends[1]);
}

/* A window of 8 spins, `disturbed` of them; what it is to rest then, in ms. */
static uint64_t window_ms(struct spinner *spinner, unsigned disturbed)
{
    static uint64_t now_ns = UINT64_C(1000000000);
    const struct spinner before = *spinner;

    CHECK(spinner->spins == 0 && spinner->disturbed == 0);
    for (unsigned i = 0; i < 8; ++i) {
        CHECK(spinner->spins == i && spinner->disturbed == (i < disturbed ? i : disturbed));
        CHECK(spinner->rest_ns == before.rest_ns);
        CHECK(spinner->rests_until_ns == before.rests_until_ns);
        CHECK(spinner_judge(spinner, i < disturbed, ++now_ns) == (i == 7 && disturbed > 2));
    }
    CHECK(spinner->rests_until_ns == now_ns + spinner->rest_ns);
    return spinner->rest_ns / 1000000;
}

static void rests_double_up_to_32_ms_and_end_with_a_quiet_window(void)
{
    static const uint64_t RESTS_MS[] = {1, 2, 4, 8, 16, 32, 32, 32};
    struct spinner spinner = {.spin_ns = SPIN};

    CHECK(window_ms(&spinner, 0) == 0 && window_ms(&spinner, 2) == 0);
    for (size_t i = 0; i < sizeof RESTS_MS / sizeof RESTS_MS[0]; ++i)
        CHECK(window_ms(&spinner, i % 2 ? 3 : 8) == RESTS_MS[i]);
    CHECK(window_ms(&spinner, 2) == 0);
    CHECK(window_ms(&spinner, 3) == 1 && window_ms(&spinner, 8) == 2); /* from the start again */
    CHECK(window_ms(&spinner, 0) == 0);
}

static atomic_bool is_over;

static void *keep_busy(void *nothing)
{
    while (!is_over)
        ;
    return nothing;
}

static void a_spinner_that_shares_its_processor_comes_to_rest(void)
{
    int ends[2];
    cpu_set_t before, one;
    pthread_t busy;
    CHECK(pipe(ends) == 0 && sched_getaffinity(0, sizeof before, &before) == 0);
    struct pollfd polled = {ends[0], POLLIN, 0};
    struct spinner spinner = {.spin_ns = 10 * SPIN};
    uint64_t until_ns = monotonic_ns() + UINT64_C(60000000000);

    CPU_ZERO(&one);
    CPU_SET((size_t)sched_getcpu(), &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(pthread_create(&busy, NULL, keep_busy, NULL) == 0); /* on the same processor */
    while (spinner.rest_ns == 0 && monotonic_ns() < until_ns)
        CHECK(poll_modestly(&spinner, &polled, 1, 1) == 0);
    CHECK(spinner.rest_ns != 0 && spinner.rests_until_ns > 0);
    is_over = true;
    pthread_join(busy, NULL);
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
    close(ends[0]);
    close(ends[1]);
}

static void judge_now(struct pollfd *polled)
{
    struct spinner spinner = {.spin_ns = SPIN / 100, .spins = 7, .disturbed = 3}; /* one more, and it is judged */

    CHECK(poll_modestly(&spinner, polled, 1, 1) == 0);
    CHECK(spinner.rest_ns != 0);
}

/* Others may move it, too, so it is counted how often it moves. */
static void a_spinner_that_was_judged_is_elsewhere_and_has_the_processors_that_it_had(void)
{
    int ends[2], left = 0, polled_away = 0;
    cpu_set_t before, two, after;
    CHECK(pipe(ends) == 0 && sched_getaffinity(0, sizeof before, &before) == 0);
    struct pollfd polled = {ends[0], POLLIN, 0};

    CPU_ZERO(&two); /* of more it might stay; and what it had is not all that it could have */
    for (size_t i = 0; i < CPU_SETSIZE && CPU_COUNT(&two) < 2; ++i)
        if (CPU_ISSET(i, &before))
            CPU_SET(i, &two);
    CHECK(sched_setaffinity(0, sizeof two, &two) == 0);
    for (int i = 0; i < 100; ++i) {
        int here = sched_getcpu();
        leave_processor();
        left += sched_getcpu() != here;
        here = sched_getcpu();
        judge_now(&polled);
        polled_away += sched_getcpu() != here;
        CHECK(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&two, &after));
    }
    CHECK(CPU_COUNT(&two) < 2 ? left + polled_away == 0 : left > 50 && polled_away > 50);
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
    close(ends[0]);
    close(ends[1]);
}

int main(void)
{
    rests_double_up_to_32_ms_and_end_with_a_quiet_window();
    a_spinner_that_rests_sleeps_at_once();
    a_spinner_that_shares_its_processor_comes_to_rest();
    what_is_ready_is_found_at_once();
    nothing_is_waited_for_as_long_as_was_said();
    what_comes_while_it_spins_or_sleeps_is_found();
    a_spinner_that_was_judged_is_elsewhere_and_has_the_processors_that_it_had();
    return 0;
}
