/* Polls that look for a while before they sleep. */
#include "schedule.h"

#include <pthread.h>
#include <unistd.h>

#include "check.h"
#include "fault_frames.h"

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
    usleep(1000);
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

int main(void)
{
    what_is_ready_is_found_at_once();
    nothing_is_waited_for_as_long_as_was_said();
    what_comes_while_it_spins_or_sleeps_is_found();
    return 0;
}
