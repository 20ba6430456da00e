#define _GNU_SOURCE
#include "schedule.h"

#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

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

_Static_assert(sizeof(struct attributes) == 48, "SCHED_ATTR_SIZE_VER0");

int schedule_slice(uint64_t slice_ns)
{
    struct attributes attributes = {
        .size = sizeof attributes, .policy = SCHED_OTHER, .runtime = slice_ns};

    return syscall(SYS_sched_setattr, 0, &attributes, 0) < 0 ? -errno : 0;
}
