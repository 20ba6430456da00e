/* Who waits for which page since when, and what becomes of it in the statistics page. */
#ifndef RAMFERRY_FAULT_STATISTICS_H
#define RAMFERRY_FAULT_STATISTICS_H

#include "faults.h"

#define WAITERS_MAX ((size_t)1024) /* more are served, but not timed */

struct waiter {
    uint64_t block, page, since_ns;
    uint32_t thread;
};

struct waiting {
    uint64_t *words; /* the statistics page */
    uint64_t vcpus;
    uint64_t any_since_ns, all_since_ns; /* 0: not now */
    size_t count;
    struct waiter waiters[WAITERS_MAX];
};

/* A thread (0: unknown) began to wait. If we think that it waits already, that wait has ended. */
void waiting_begin(struct waiting *waiting, uint32_t thread, uint64_t block, uint64_t page,
                   uint64_t now_ns);

/* Pages were placed. */
void waiting_end(struct waiting *waiting, uint64_t block, uint64_t first_page, uint64_t page_count,
                 uint64_t now_ns);

/* One writer, readers in other processes: whole words, no order between them. */
void statistics_set(uint64_t *words, size_t word, uint64_t value);
void statistics_add(uint64_t *words, size_t word, uint64_t amount);

#endif
