#define _GNU_SOURCE
#include "schedule.h"

#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fault_frames.h"

/* Two cores, three rounds in turn, a guest that writes 512 MiB at random while two channels push: p99 of what
 * it waits fell from 1.28 to 0.64 ms, p50 from 75 to 41 us. */
#define SPIN_NS UINT64_C(50000)

/* struct sched_attr of Linux 3.14: newer fields stay out. */
struct attributes {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime;
    uint64_t deadline;
    uint64_t period;
};

#define RESET_ON_FORK UINT64_C(1) /* SCHED_FLAG_RESET_ON_FORK of linux/sched.h */

_Static_assert(sizeof(struct attributes) == 48, "SCHED_ATTR_SIZE_VER0");

int schedule_slice(uint64_t slice_ns)
{
    struct attributes attributes = {.size = sizeof attributes,
                                    .policy = SCHED_OTHER,
                                    .flags = RESET_ON_FORK,
                                    .runtime = slice_ns};

    return syscall(SYS_sched_setattr, 0, &attributes, 0) < 0 ? -errno : 0;
}

uint64_t spin_ns_here(void)
{
    return sysconf(_SC_NPROCESSORS_ONLN) > 1 ? SPIN_NS : 0;
}

int poll_soon(struct pollfd *polled, nfds_t count, int wait_ms, uint64_t spin_ns)
{
    uint64_t until_ns = spin_ns && wait_ms ? monotonic_ns() + spin_ns : 0;

    while (until_ns && monotonic_ns() < until_ns) {
        int rc = poll(polled, count, 0);

        if (rc != 0)
            return rc;
    }
    return poll(polled, count, wait_ms);
}
