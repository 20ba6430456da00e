/* The workload and its vCPUs, for the files of the workload alone. */
#ifndef RAMFERRY_WORKLOAD_VCPU_H
#define RAMFERRY_WORKLOAD_VCPU_H

#include "dirty_ring.h"
#include "workload.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

enum order { PAUSE, RUN, STOP };

struct vcpu {
    struct workload *workload;
    pthread_t thread;
    uint64_t first_page, page_count; /* its share: no other vCPU writes there */
    uint64_t cursor;                 /* page in the share, below page_count */
    uint64_t random;
    _Atomic uint64_t writes;
    uint64_t epoch_ns, epoch_writes; /* the rate's schedule: writes since the epoch are due by time */
    uint64_t slice_began_ns;         /* of the throttle */
    struct dirty_ring ring;
    _Atomic uint64_t times[WORKLOAD_TIMES], longest_ns; /* of writes, where they are timed */
};

struct workload {
    struct workload_options options;
    uint64_t vcpu_rate; /* bytes per second of one vCPU */
    _Atomic int order;  /* changed under `lock`, followed by a broadcast of `wake` */
    _Atomic unsigned throttle_percent;
    _Atomic bool is_counting; /* what the vCPUs dirty */
    pthread_mutex_t control; /* one caller of pause, resume, save, ... at a time */
    pthread_mutex_t lock;
    pthread_cond_t wake;   /* order or throttle changed (CLOCK_MONOTONIC) */
    pthread_cond_t parked; /* parked_count changed (CLOCK_MONOTONIC) */
    uint64_t wake_count;   /* under `lock`: tells a wait that something changed since it was planned */
    uint32_t parked_count; /* under `lock` */
    uint32_t thread_count; /* threads that were started and are not joined */
    struct vcpu vcpu[WORKLOAD_VCPUS_MAX];
};

/* Of CLOCK_MONOTONIC. */
struct timespec workload_timespec(uint64_t at_ns);
#define WORKLOAD_NO_DEADLINE ((uint64_t)INT64_MAX) /* 292 years after the boot */

/* A vCPU's thread; takes its struct vcpu. Parks at a PAUSE, ends at a STOP, returns NULL. */
void *workload_run_vcpu(void *vcpu);

#endif
