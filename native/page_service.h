/* The source's half of postcopy: requests in, pages out, demands before all else.
 *
 * A page's dirty bit is taken before it is sent, so that background senders pass it over. Who gets the
 * bit sends the page; a demand is answered in any case, for it waits. What is sent twice is placed
 * once (native/insertion.h), and what is taken and lost is asked for again by the destination, whose
 * received bitmap alone decides. */
#ifndef RAMFERRY_PAGE_SERVICE_H
#define RAMFERRY_PAGE_SERVICE_H

#include "fault_frames.h"

/* What pages_run returns with, or-ed; 0 when its time is over. */
#define PAGES_WOKEN 1 /* `wake_fd` can be read */
#define PAGES_LOST 4  /* the connection cannot be used: pages_reason */

/* Words of the statistics page. */
enum page_word {
    PAGE_REQUESTS,
    PAGE_DEMAND_PAGES,
    PAGE_PREFETCH_PAGES,
    PAGE_REST_PAGES,
    PAGE_ZERO_PAGES, /* of all of them */
    PAGE_SKIPPED_PAGES,
    PAGE_BYTES_SENT,
    PAGE_LAST, /* the newest demand: block << 32 | page, plus 1: where background may look first */
};
#define PAGE_SERVICE_WORDS ((size_t)16)

struct page_block {
    int fd; /* of the RAM; its content does not change any more */
    uint64_t page_count, unit_pages;
    bitmap_word *dirty;
};

struct page_service;

/* `blocks` are copied; bitmaps and `statistics` (PAGE_SERVICE_WORDS words) must outlive the service. Returns 0
 * or -ENOMEM. */
int pages_open(struct page_service **service, const struct page_block *blocks, size_t count,
               const unsigned char *session, uint64_t *statistics);
void pages_close(struct page_service *service);

/* A new connection; what the old one asked for is forgotten. */
void pages_reconnect(struct page_service *service);

/* Serve for `wait_ms` at most. Returns PAGES_ bits or -errno of RAM that could not be read. */
int pages_run(struct page_service *service, int channel, int wake_fd, int wait_ms);

const char *pages_reason(const struct page_service *service);

#endif
