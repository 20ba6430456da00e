#include "fault_statistics.h"

void statistics_set(uint64_t *words, size_t word, uint64_t value)
{
    __atomic_store_n(&words[word], value, __ATOMIC_RELAXED);
}

void statistics_add(uint64_t *words, size_t word, uint64_t amount)
{
    statistics_set(words, word, words[word] + amount);
}

/* The blocked times, after the number of waiters has changed. */
static void count_blocked(struct waiting *waiting, uint64_t now_ns)
{
    bool all = waiting->vcpus > 0 && waiting->count >= waiting->vcpus;

    if (waiting->any_since_ns == 0 && waiting->count > 0) {
        waiting->any_since_ns = now_ns;
    } else if (waiting->any_since_ns > 0 && waiting->count == 0) {
        statistics_add(waiting->words, FAULT_ANY_NS, now_ns - waiting->any_since_ns);
        waiting->any_since_ns = 0;
    }
    if (waiting->all_since_ns == 0 && all) {
        waiting->all_since_ns = now_ns;
    } else if (waiting->all_since_ns > 0 && !all) {
        statistics_add(waiting->words, FAULT_ALL_NS, now_ns - waiting->all_since_ns);
        waiting->all_since_ns = 0;
    }
}

/* The thread's triple, a new one if need be; the last one collects those beyond the maximum. */
static size_t thread_word(uint64_t *words, uint32_t thread)
{
    size_t word = FAULT_THREADS;

    while (words[word] != 0 && words[word] != (uint64_t)thread + 1 &&
           word + 3 < FAULT_THREADS + 3 * FAULT_THREADS_MAX)
        word += 3;
    if (words[word] == 0)
        statistics_add(words, word, (uint64_t)thread + 1);
    return word;
}

/* Take waiter `index` off the list and account for its time. */
static void end_wait(struct waiting *waiting, size_t index, uint64_t now_ns)
{
    struct waiter waiter = waiting->waiters[index];
    uint64_t waited_ns = now_ns - waiter.since_ns, us = waited_ns / 1000, bucket = 0;
    size_t word = thread_word(waiting->words, waiter.thread);

    while (us > 1 && bucket + 1 < FAULT_LATENCY_BUCKETS) {
        us >>= 1;
        ++bucket;
    }
    waiting->waiters[index] = waiting->waiters[--waiting->count];
    statistics_add(waiting->words, FAULT_WAITS, 1);
    statistics_add(waiting->words, FAULT_LATENCY_NS, waited_ns);
    statistics_add(waiting->words, FAULT_LATENCIES + bucket, 1);
    statistics_add(waiting->words, word + 1, 1);
    statistics_add(waiting->words, word + 2, waited_ns);
}

void waiting_begin(struct waiting *waiting, uint32_t thread, uint64_t block, uint64_t page,
                   uint64_t now_ns)
{
    for (size_t i = 0; thread != 0 && i < waiting->count; ++i)
        if (waiting->waiters[i].thread == thread) {
            end_wait(waiting, i, now_ns);
            break;
        }
    if (waiting->count < WAITERS_MAX)
        waiting->waiters[waiting->count++] = (struct waiter){block, page, now_ns, thread};
    count_blocked(waiting, now_ns);
}

void waiting_end(struct waiting *waiting, uint64_t block, uint64_t first_page, uint64_t page_count,
                 uint64_t now_ns)
{
    for (size_t i = waiting->count; i-- > 0;) {
        const struct waiter *waiter = &waiting->waiters[i];

        if (waiter->block == block && waiter->page >= first_page &&
            waiter->page - first_page < page_count)
            end_wait(waiting, i, now_ns);
    }
    count_blocked(waiting, now_ns);
}
