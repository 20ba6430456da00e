/* The destination's half of postcopy: fault events in, requests out, answers in, pages placed.
 *
 * One thread drives it; others place pages of the same RAM meanwhile (native/insertion.h). What it
 * promises: each event that it read ends with the page placed and its waiter woken, however often
 * the connection is lost in between. Events that a killed predecessor had read come again after
 * faults_wake_all. */
#ifndef RAMFERRY_FAULTS_H
#define RAMFERRY_FAULTS_H

#include "fault_frames.h"

/* What faults_run returns with, or-ed; 0 when its time is over. */
#define FAULTS_WOKEN 1    /* `wake_fd` can be read */
#define FAULTS_NEWS 2     /* faults_news has something */
#define FAULTS_LOST 4     /* the connection cannot be used: faults_reason */
#define FAULTS_COMPLETE 8 /* all pages are received: told once, after faults_fetch_rest */

/* Words of the statistics page: totals of the migration, one writer, restarts go on with them. */
enum fault_word {
    FAULT_EVENTS,        /* read from userfaultfds */
    FAULT_REQUESTS,      /* sent, of all kinds */
    FAULT_DEMAND_PAGES,  /* placed for a fault */
    FAULT_PREFETCH_PAGES,
    FAULT_REST_PAGES,
    FAULT_PRESENT_PAGES, /* came, but were placed by others before */
    FAULT_ZERO_PAGES,    /* of those placed: received as zero, filled when a vCPU came */
    FAULT_SKIPPED_PAGES, /* asked for in advance, but others had sent them */
    FAULT_STRAY_EVENTS,  /* of addresses where no block is, or of other kinds */
    FAULT_OPEN,          /* demands without an answer now */
    FAULT_WAITS,         /* that have ended; their latency: */
    FAULT_LATENCY_NS,    /* sum */
    FAULT_ANY_NS,        /* at least one thread waited */
    FAULT_ALL_NS,        /* all vCPUs waited */
    FAULT_LATENCIES = 16, /* 24 buckets: [2^i, 2^(i+1)) us, the last one collects the rest */
    FAULT_THREADS = 64,   /* FAULT_THREADS_MAX triples: thread id + 1, waits, ns */
};
#define FAULT_LATENCY_BUCKETS ((uint64_t)24)
#define FAULT_THREADS_MAX ((uint64_t)128)
#define FAULT_WORDS ((size_t)512)

struct fault_block {
    struct insertion to;
    uint64_t page_count;
    bitmap_word *demanded, *prefetched; /* asked for; ours alone */
};

struct fault_service;

/* `blocks` are copied; what they point at, and `statistics` (FAULT_WORDS words), must outlive the
 * service. `vcpus`: threads that make up "all", 0 for unknown. `wants_news`: faults_run returns after
 * each fault that was asked for near another one. Returns 0, -EINVAL for too many blocks, or -ENOMEM. */
int faults_open(struct fault_service **service, const struct fault_block *blocks, size_t count,
                const unsigned char *session, uint64_t *statistics, uint64_t vcpus,
                bool wants_news);
void faults_close(struct fault_service *service);

/* A new connection: demands are sent again, what was asked for in advance is forgotten. */
void faults_reconnect(struct fault_service *service);

/* Everybody who waits looks again, and so is heard of. Returns 0 or -errno. */
int faults_wake_all(struct fault_service *service);

/* Serve for `wait_ms` at most. `channel` is -1 while there is none. Returns FAULTS_ bits or -errno of
 * a page that could not be placed. */
int faults_run(struct fault_service *service, int channel, int wake_fd, int wait_ms);

/* Take the oldest fault not looked at yet; false when there is none. */
bool faults_news(struct fault_service *service, uint64_t *block, uint64_t *page);

/* Whether there are such pages. */
bool faults_has_range(const struct fault_service *service, uint64_t block, uint64_t first_page,
                      uint64_t page_count);

/* Ask in advance for those pages of the range that are neither received nor asked for. The caller
 * checked the range. Returns how many. */
uint64_t faults_prefetch(struct fault_service *service, uint64_t block, uint64_t first_page,
                         uint64_t page_count);

/* From now on ask for everything that is not received, until FAULTS_COMPLETE. */
void faults_fetch_rest(struct fault_service *service);

const char *faults_reason(const struct fault_service *service);

#endif
