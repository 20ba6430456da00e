/* What one vCPU dirties, and a limit for it.
 *
 * Works like KVM's dirty ring with its reaper: a page that is written counts once, and once more
 * after a second, when all pages are taken to be clean again. So the count is what a migration that
 * goes round every second would have to send, however often the same page is written.
 *
 * One thread, the vCPU's, calls all functions but those that say otherwise. Times are monotonic. */
#ifndef RAMFERRY_DIRTY_RING_H
#define RAMFERRY_DIRTY_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define DIRTY_RING_PERIOD_NS UINT64_C(1000000000) /* KVM's reaper in QEMU comes as often */

struct dirty_ring {
    _Atomic uint64_t limit_bytes_per_s; /* 0: none; any thread sets it, it acts at the next `due` */
    _Atomic uint64_t dirty_pages;       /* counted since the beginning; any thread reads it */
    _Atomic uint64_t slept_ns;          /* for the limit, since the beginning; any thread reads it */
    uint64_t *seen;                     /* owned: a bit for each page that counted in this period */
    uint64_t page_count;
    uint64_t period_began_ns;           /* 0: nothing counts */
    uint64_t clock_limit;               /* the limit that the schedule is for */
    uint64_t clock_began_ns, clock_pages; /* pages since then are due by time */
};

/* Nothing counts yet. -ENOMEM; free with dirty_ring_free, which takes a ring of zeros too. */
int dirty_ring_init(struct dirty_ring *ring, uint64_t page_count);
void dirty_ring_free(struct dirty_ring *ring);

/* Count from now on, and begin a new period when the last one is over; often enough is every few
 * dozen writes. */
void dirty_ring_tick(struct dirty_ring *ring, uint64_t now_ns);

/* Count no more, until the next tick. */
void dirty_ring_rest(struct dirty_ring *ring);

/* The vCPU has written a page of its share. */
void dirty_ring_note(struct dirty_ring *ring, uint64_t page);

/* Time that went by while the vCPU was not to write is not made up for. */
void dirty_ring_restart(struct dirty_ring *ring, uint64_t now_ns);

/* When the limit lets the next page be written: 0 for at once, else a time after now_ns. What was
 * not used is lost after 100 ms. */
uint64_t dirty_ring_due(struct dirty_ring *ring, uint64_t now_ns);

#endif
