/* What the parts of faults.h share: its state, and the requests that have no answer yet. */
#ifndef RAMFERRY_FAULT_SERVICE_H
#define RAMFERRY_FAULT_SERVICE_H

#include <poll.h>
#include <stdatomic.h>

#include "fault_statistics.h"
#include "faults.h"

/* Requests without an answer. A source takes at most so many, see native/page_service.c; threads that
 * fault beyond wait in the kernel, unread. */
#define DEMANDS_MAX ((size_t)1024)
#define ADVANCES_MAX ((size_t)64) /* prefetches and rests */
#define NEWS_MAX ((size_t)64)
#define RECENT_MAX ((size_t)16)
#define UFFDS_MAX ((size_t)256)

struct request {
    uint64_t id, block, next, end; /* pages [next, end) have no answer yet */
    uint8_t kind;
};

struct news {
    uint64_t block, page;
};

struct fault_service {
    struct stream stream;
    uint64_t last_request;
    uint64_t spin_ns; /* while a demand is open: the vCPU that waits leaves its processor to us */
    size_t open_count, demand_count, rest_count;
    uint64_t prefetch_pages; /* without an answer */
    struct request open[DEMANDS_MAX + ADVANCES_MAX];
    size_t recent_count; /* of all faults; the last RECENT_MAX are in `recent` */
    struct news recent[RECENT_MAX];
    size_t news_first, news_count;
    struct news news[NEWS_MAX];
    struct waiting waiting;
    uint64_t *words;
    bool wants_news, is_connected, fetches_rest;
    uint64_t rest_block, rest_page; /* what was not looked at yet */
    size_t uffd_count;
    struct pollfd polled[UFFDS_MAX + 2]; /* wake_fd, channel, then each userfaultfd once */
    size_t block_count;
    struct fault_block blocks[];
};

static inline bool has_bit(const bitmap_word *bitmap, uint64_t page)
{
    return atomic_load_explicit(&bitmap[page / 64], memory_order_relaxed) >> (page % 64) & 1;
}

static inline void set_bit(bitmap_word *bitmap, uint64_t page)
{
    atomic_fetch_or_explicit(&bitmap[page / 64], UINT64_C(1) << (page % 64), memory_order_relaxed);
}

static inline void clear_bit(bitmap_word *bitmap, uint64_t page)
{
    atomic_fetch_and_explicit(&bitmap[page / 64], ~(UINT64_C(1) << (page % 64)),
                              memory_order_relaxed);
}

/* Ask the source for pages [first, end). The caller made sure of room. */
void request_pages(struct fault_service *service, uint8_t kind, uint64_t block, uint64_t first,
                   uint64_t end);

/* The open request at `index` has all of its answers. */
void request_forget(struct fault_service *service, size_t index);

/* Ask for some of the rest. Returns FAULTS_COMPLETE when a whole look found nothing missing. */
int request_rest(struct fault_service *service);

/* Read what the source sends, and place it. Returns 0, -1 with a reason when the connection is lost, or
 * -errno of a page that could not be placed in *error. */
int take_answers(struct fault_service *service, int channel, int *error);

#endif
