/* Starting the vCPUs, and orders for them: see workload.h. */
#define _GNU_SOURCE
#include "workload_vcpu.h"

#include "clock.h"
#include "workload_pages.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

static void tell(struct workload *workload, enum order order)
{
    atomic_store(&workload->order, order);
    workload->wake_count++;
    pthread_cond_broadcast(&workload->wake);
}

static void give_order(struct workload *workload, enum order order)
{
    pthread_mutex_lock(&workload->lock);
    tell(workload, order);
    pthread_mutex_unlock(&workload->lock);
}

/* Or end. */
static bool all_stand(const struct workload *workload)
{
    return workload->parked_count == workload->thread_count || atomic_load(&workload->order) == STOP;
}

/* Until all are parked, or -ETIMEDOUT: then they run on. */
static int park_all(struct workload *workload, uint64_t deadline_ns)
{
    struct timespec deadline = workload_timespec(deadline_ns);
    int rc = 0;
    pthread_mutex_lock(&workload->lock);
    tell(workload, PAUSE);
    while (!all_stand(workload) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&workload->parked, &workload->lock, &deadline);
    bool is_late = !all_stand(workload);
    if (is_late)
        tell(workload, RUN);
    pthread_mutex_unlock(&workload->lock);
    return is_late ? -ETIMEDOUT : 0;
}

int workload_pause(struct workload *workload, uint64_t wait_ns, uint64_t *took_ns)
{
    uint64_t took = 0;
    int rc = 0;
    pthread_mutex_lock(&workload->control);
    if (atomic_load(&workload->order) == RUN) {
        uint64_t began = monotonic_ns();
        rc = park_all(workload, began + wait_ns);
        took = monotonic_ns() - began;
    }
    pthread_mutex_unlock(&workload->control);
    if (took_ns != NULL)
        *took_ns = took;
    return rc;
}

void workload_resume(struct workload *workload)
{
    pthread_mutex_lock(&workload->control);
    if (atomic_load(&workload->order) == PAUSE)
        give_order(workload, RUN);
    pthread_mutex_unlock(&workload->control);
}

int workload_throttle(struct workload *workload, unsigned percent)
{
    if (percent > 99)
        return -EINVAL;
    pthread_mutex_lock(&workload->lock);
    atomic_store(&workload->throttle_percent, percent);
    workload->wake_count++;
    pthread_cond_broadcast(&workload->wake);
    pthread_mutex_unlock(&workload->lock);
    return 0;
}

void workload_count_dirty(struct workload *workload, bool is_counting)
{
    atomic_store(&workload->is_counting, is_counting);
}

int workload_limit_dirty(struct workload *workload, uint32_t vcpu, uint64_t bytes_per_s)
{
    if (vcpu >= workload->options.vcpus)
        return -EINVAL;
    pthread_mutex_lock(&workload->lock);
    atomic_store(&workload->vcpu[vcpu].ring.limit_bytes_per_s, bytes_per_s);
    workload->wake_count++;
    pthread_cond_broadcast(&workload->wake);
    pthread_mutex_unlock(&workload->lock);
    return 0;
}

void workload_dirtied(const struct workload *workload, uint64_t *pages, uint64_t *slept_ns)
{
    for (uint32_t i = 0; i < workload->options.vcpus; i++) {
        const struct dirty_ring *ring = &workload->vcpu[i].ring;
        pages[i] = atomic_load_explicit(&ring->dirty_pages, memory_order_relaxed);
        slept_ns[i] = atomic_load_explicit(&ring->slept_ns, memory_order_relaxed);
    }
}

void workload_set_bitmap(struct workload *workload, uint64_t *written_bitmap)
{
    pthread_mutex_lock(&workload->control);
    bool was_running = atomic_load(&workload->order) == RUN;
    if (was_running)
        park_all(workload, WORKLOAD_NO_DEADLINE);
    workload->options.written_bitmap = written_bitmap;
    if (was_running)
        give_order(workload, RUN);
    pthread_mutex_unlock(&workload->control);
}

uint32_t workload_vcpus(const struct workload *workload)
{
    return workload->options.vcpus;
}

uint64_t workload_page_count(const struct workload *workload)
{
    return workload->options.page_count;
}

void workload_writes(struct workload *workload, uint64_t *writes)
{
    for (uint32_t i = 0; i < workload->options.vcpus; i++)
        writes[i] = atomic_load_explicit(&workload->vcpu[i].writes, memory_order_relaxed);
}

void workload_times(const struct workload *workload, struct workload_times *times)
{
    *times = (struct workload_times){0};
    for (uint32_t i = 0; i < workload->options.vcpus; i++) {
        const struct vcpu *vcpu = &workload->vcpu[i];
        uint64_t longest_ns = atomic_load_explicit(&vcpu->longest_ns, memory_order_relaxed);
        for (unsigned bucket = 0; bucket < WORKLOAD_TIMES; bucket++)
            times->counts[bucket] += atomic_load_explicit(&vcpu->times[bucket], memory_order_relaxed);
        if (longest_ns > times->longest_ns)
            times->longest_ns = longest_ns;
    }
}

void workload_end(struct workload *workload)
{
    pthread_mutex_lock(&workload->lock);
    tell(workload, STOP);
    pthread_cond_broadcast(&workload->parked); /* who waits there waits for nothing */
    pthread_mutex_unlock(&workload->lock);
}

void workload_stop(struct workload *workload)
{
    pthread_mutex_lock(&workload->control);
    give_order(workload, STOP);
    while (workload->thread_count > 0)
        pthread_join(workload->vcpu[--workload->thread_count].thread, NULL);
    pthread_mutex_unlock(&workload->control);
}

void workload_free(struct workload *workload)
{
    if (workload == NULL)
        return;
    workload_stop(workload);
    pthread_cond_destroy(&workload->parked);
    pthread_cond_destroy(&workload->wake);
    pthread_mutex_destroy(&workload->lock);
    pthread_mutex_destroy(&workload->control);
    for (uint32_t i = 0; i < workload->options.vcpus; i++)
        dirty_ring_free(&workload->vcpu[i].ring);
    free(workload);
}

/* -ENOMEM. */
static int deal_shares(struct workload *workload)
{
    const struct workload_options *options = &workload->options;
    uint64_t share = options->page_count / options->vcpus, rest = options->page_count % options->vcpus;
    uint64_t first_page = 0;
    for (uint32_t i = 0; i < options->vcpus; i++) {
        struct vcpu *vcpu = &workload->vcpu[i];
        vcpu->workload = workload;
        vcpu->first_page = first_page;
        vcpu->page_count = share + (i < rest ? 1 : 0);
        vcpu->random = mix(options->seed, UINT64_C(0x76637075) + i);
        if (options->pattern == WORKLOAD_SWEEP)
            vcpu->cursor = next_random(&vcpu->random) % vcpu->page_count;
        first_page += vcpu->page_count;
        if (dirty_ring_init(&vcpu->ring, vcpu->page_count) != 0)
            return -ENOMEM;
    }
    return 0;
}

static int start_threads(struct workload *workload)
{
    sigset_t all, before;
    int rc = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (uint32_t i = 0; i < workload->options.vcpus && rc == 0; i++) {
        rc = pthread_create(&workload->vcpu[i].thread, NULL, workload_run_vcpu, &workload->vcpu[i]);
        if (rc == 0)
            workload->thread_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

int workload_start(struct workload **workload, const struct workload_options *options)
{
    if (options->vcpus < 1 || options->vcpus > WORKLOAD_VCPUS_MAX ||
        options->page_count < options->vcpus || options->page_count > UINT64_C(1) << 32 ||
        options->pattern < WORKLOAD_SWEEP || options->pattern > WORKLOAD_APPEND ||
        options->words_per_write > WORKLOAD_BODY_WORDS || (uintptr_t)options->ram % 8 != 0)
        return -EINVAL;
    struct workload *made = calloc(1, sizeof *made);
    if (made == NULL)
        return -ENOMEM;
    made->options = *options;
    made->vcpu_rate = options->rate_bytes_per_s / options->vcpus;
    if (options->rate_bytes_per_s != 0 && made->vcpu_rate == 0)
        made->vcpu_rate = 1;
    atomic_store(&made->order, PAUSE);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&made->control, NULL);
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->wake, &monotonic);
    pthread_cond_init(&made->parked, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int rc = deal_shares(made);
    if (rc == 0)
        rc = start_threads(made);
    if (rc != 0) {
        workload_free(made);
        return rc;
    }
    *workload = made;
    return 0;
}
