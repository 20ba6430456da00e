/* What a vCPU does: the next page, at its pace, until an order comes. */
#define _GNU_SOURCE
#include "workload_vcpu.h"

#include "clock.h"
#include "workload_pages.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define THROTTLE_SLICE_NS UINT64_C(10000000) /* QEMU's CPU_THROTTLE_TIMESLICE_NS */
#define BURST_NS UINT64_C(1000000)           /* a rate is kept by bursts of about 1 ms of writes */
#define BACKLOG_NS UINT64_C(100000000)       /* later than that is lost, not made up for */

#define VCPU_SLICE_NS UINT64_C(10000000)     /* longer than the scheduler's own, which is 3 ms or less */
#define CLOCK_WRITES 32u /* a throttled vCPU at full speed looks at the clock every so many writes */

enum workload_pattern workload_pattern(const char *name)
{
    static const char *const names[] = {"sweep", "random", "hotspot", "append"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum workload_pattern)(i + 1);
    return 0;
}

struct timespec workload_timespec(uint64_t at_ns)
{
    return (struct timespec){(time_t)(at_ns / SECOND_NS), (long)(at_ns % SECOND_NS)};
}

/* Sleep until `deadline_ns`, or until an order or another throttle comes. */
static void sleep_until(struct workload *workload, uint64_t deadline_ns)
{
    struct timespec deadline = workload_timespec(deadline_ns);
    pthread_mutex_lock(&workload->lock);
    uint64_t wake_count = workload->wake_count;
    while (atomic_load(&workload->order) == RUN && workload->wake_count == wake_count)
        if (pthread_cond_timedwait(&workload->wake, &workload->lock, &deadline) == ETIMEDOUT)
            break;
    pthread_mutex_unlock(&workload->lock);
}

/* Time that went by while nobody was to write is not made up for. */
static void restart_clock(struct vcpu *vcpu)
{
    vcpu->epoch_ns = vcpu->slice_began_ns = monotonic_ns();
    vcpu->epoch_writes = 0;
    dirty_ring_restart(&vcpu->ring, vcpu->epoch_ns);
}

/* Stand until there is something to do; false: to end. */
static bool park(struct vcpu *vcpu)
{
    struct workload *workload = vcpu->workload;
    pthread_mutex_lock(&workload->lock);
    workload->parked_count++;
    pthread_cond_broadcast(&workload->parked);
    while (atomic_load(&workload->order) == PAUSE)
        pthread_cond_wait(&workload->wake, &workload->lock);
    workload->parked_count--;
    bool is_run = atomic_load(&workload->order) == RUN;
    pthread_mutex_unlock(&workload->lock);
    restart_clock(vcpu);
    return is_run;
}

/* The throttle's share of sleep. True: slept, look for orders first. */
static bool throttled(struct vcpu *vcpu, uint64_t now, unsigned percent)
{
    if (percent == 0) {
        vcpu->slice_began_ns = now;
        return false;
    }
    if (now - vcpu->slice_began_ns < THROTTLE_SLICE_NS)
        return false;
    sleep_until(vcpu->workload, now + THROTTLE_SLICE_NS * percent / (100 - percent));
    vcpu->slice_began_ns = monotonic_ns();
    vcpu->epoch_ns += vcpu->slice_began_ns - now;
    return true;
}

/* Time after the epoch when `writes` of them are due; cannot overflow below 584 years of writes. */
static uint64_t due_ns(uint64_t writes, uint64_t rate)
{
    return (uint64_t)((unsigned __int128)writes * WORKLOAD_PAGE_SIZE * SECOND_NS / rate);
}

/* The rate's sleep. True: slept, look for orders first. */
static bool early(struct vcpu *vcpu, uint64_t now, uint64_t rate)
{
    uint64_t due = vcpu->epoch_ns + due_ns(vcpu->epoch_writes, rate);
    if (now >= due) {
        if (now - due > BACKLOG_NS)
            vcpu->epoch_ns += now - due - BACKLOG_NS;
        return false;
    }
    sleep_until(vcpu->workload, due > now + BURST_NS ? due : now + BURST_NS);
    return true;
}

/* The dirty limit's sleep. True: slept, look for orders first. */
static bool limited(struct vcpu *vcpu, uint64_t now)
{
    struct dirty_ring *ring = &vcpu->ring;
    dirty_ring_tick(ring, now);
    uint64_t due = dirty_ring_due(ring, now);
    if (due == 0)
        return false;
    sleep_until(vcpu->workload, due > now + BURST_NS ? due : now + BURST_NS);
    atomic_fetch_add_explicit(&ring->slept_ns, monotonic_ns() - now, memory_order_relaxed);
    return true;
}

static uint64_t choose_page(struct vcpu *vcpu, enum workload_pattern pattern)
{
    uint64_t count = vcpu->page_count;
    if (pattern == WORKLOAD_SWEEP || pattern == WORKLOAD_APPEND) {
        uint64_t page = vcpu->cursor;
        vcpu->cursor = page + 1 < count ? page + 1 : 0;
        return page;
    }
    uint64_t random = next_random(&vcpu->random);
    if (pattern == WORKLOAD_SCATTER)
        return random % count;
    uint64_t hot_count = (count + 9) / 10, hot_first = (count - hot_count) / 2;
    if ((random >> 48) % 10 != 0)
        return hot_first + (random & UINT64_C(0xffffffffffff)) % hot_count;
    if (hot_count == count)
        return random % count;
    uint64_t cold = (random & UINT64_C(0xffffffffffff)) % (count - hot_count);
    return cold < hot_first ? cold : cold + hot_count;
}

static void write_next(struct vcpu *vcpu, const struct workload_options *options)
{
    uint64_t index = vcpu->first_page + choose_page(vcpu, options->pattern);
    write_page(page_at(options->ram, index), index, options->words_per_write, options->seed);
    uint64_t *bitmap = options->written_bitmap; /* changes only while we are parked */
    if (bitmap != NULL)
        __atomic_fetch_or(bitmap + index / 64, UINT64_C(1) << index % 64, __ATOMIC_RELEASE);
    uint64_t writes = atomic_load_explicit(&vcpu->writes, memory_order_relaxed);
    atomic_store_explicit(&vcpu->writes, writes + 1, memory_order_relaxed);
    vcpu->epoch_writes++;
    dirty_ring_note(&vcpu->ring, index - vcpu->first_page);
}

/* See WORKLOAD_TIMES: three bits after the highest one tell the bucket. */
static unsigned time_bucket(uint64_t took_ns)
{
    if (took_ns < 1024)
        return 0;
    unsigned power = 63 - (unsigned)__builtin_clzll(took_ns);
    unsigned bucket = (power - 10) * 8 + (unsigned)(took_ns >> (power - 3) & 7);
    return bucket < WORKLOAD_TIMES ? bucket : WORKLOAD_TIMES - 1;
}

uint64_t workload_time_ns(unsigned bucket)
{
    return bucket == 0 ? 0 : (UINT64_C(8) + bucket % 8) << (bucket / 8 + 7);
}

/* A page that is missing is waited for within the write. */
static void write_timed(struct vcpu *vcpu, const struct workload_options *options)
{
    uint64_t began_ns = monotonic_ns();
    write_next(vcpu, options);
    uint64_t took_ns = monotonic_ns() - began_ns;
    atomic_fetch_add_explicit(&vcpu->times[time_bucket(took_ns)], 1, memory_order_relaxed);
    if (took_ns > atomic_load_explicit(&vcpu->longest_ns, memory_order_relaxed))
        atomic_store_explicit(&vcpu->longest_ns, took_ns, memory_order_relaxed);
}

/* The kernel's struct sched_attr, first version (linux/sched/types.h). */
struct scheduling {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};
_Static_assert(sizeof(struct scheduling) == 48, "SCHED_ATTR_SIZE_VER0");

/* Ask for long slices: no more time than others get, but who wakes up (to pause us, say) goes first. Needs
 * Linux 6.12; without it all is the same but slower to pause on a busy machine. */
static void prefer_long_slices(void)
{
    struct scheduling attributes = {.size = sizeof attributes};
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 ||
        attributes.policy != 0 /* SCHED_OTHER */)
        return;
    attributes.runtime = VCPU_SLICE_NS;
    syscall(SYS_sched_setattr, 0, &attributes, 0);
}

void *workload_run_vcpu(void *argument)
{
    struct vcpu *vcpu = argument;
    struct workload *workload = vcpu->workload;
    prefer_long_slices();
    restart_clock(vcpu);
    while (atomic_load(&workload->order) == RUN || park(vcpu)) {
        unsigned percent = atomic_load_explicit(&workload->throttle_percent, memory_order_relaxed);
        bool has_limit = atomic_load_explicit(&vcpu->ring.limit_bytes_per_s, memory_order_relaxed) != 0;
        bool is_counting =
            has_limit || atomic_load_explicit(&workload->is_counting, memory_order_relaxed);
        bool is_clocked = workload->vcpu_rate != 0 || has_limit;
        if (is_clocked || ((percent != 0 || is_counting) && vcpu->epoch_writes % CLOCK_WRITES == 0)) {
            uint64_t now = monotonic_ns();
            if (throttled(vcpu, now, percent))
                continue;
            if (workload->vcpu_rate != 0 && early(vcpu, now, workload->vcpu_rate))
                continue;
            if (is_counting && limited(vcpu, now))
                continue;
        }
        if (!is_counting)
            dirty_ring_rest(&vcpu->ring);
        if (workload->options.is_timed)
            write_timed(vcpu, &workload->options);
        else
            write_next(vcpu, &workload->options);
    }
    return NULL;
}
