/* See dirty_ring.h. */
#include "dirty_ring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"

#define PAGE_BYTES 4096u
#define BACKLOG_NS UINT64_C(100000000)

__extension__ typedef unsigned __int128 uint128;

static size_t seen_words(uint64_t page_count)
{
    return (size_t)((page_count + 63) / 64);
}

int dirty_ring_init(struct dirty_ring *ring, uint64_t page_count)
{
    memset(ring, 0, sizeof *ring);
    ring->page_count = page_count;
    ring->seen = calloc(seen_words(page_count), sizeof *ring->seen);
    return ring->seen == NULL ? -ENOMEM : 0;
}

void dirty_ring_free(struct dirty_ring *ring)
{
    free(ring->seen);
    ring->seen = NULL;
}

void dirty_ring_tick(struct dirty_ring *ring, uint64_t now_ns)
{
    if (ring->period_began_ns != 0 && now_ns - ring->period_began_ns < DIRTY_RING_PERIOD_NS)
        return;
    memset(ring->seen, 0, seen_words(ring->page_count) * sizeof *ring->seen);
    ring->period_began_ns = now_ns;
}

void dirty_ring_rest(struct dirty_ring *ring)
{
    ring->period_began_ns = 0;
}

void dirty_ring_note(struct dirty_ring *ring, uint64_t page)
{
    uint64_t *word = ring->seen + page / 64, bit = UINT64_C(1) << page % 64;

    if (ring->period_began_ns == 0 || (*word & bit) != 0)
        return;
    *word |= bit;
    ring->clock_pages++;
    uint64_t pages = atomic_load_explicit(&ring->dirty_pages, memory_order_relaxed);
    atomic_store_explicit(&ring->dirty_pages, pages + 1, memory_order_relaxed);
}

void dirty_ring_restart(struct dirty_ring *ring, uint64_t now_ns)
{
    ring->clock_began_ns = now_ns;
    ring->clock_pages = 0;
}

uint64_t dirty_ring_due(struct dirty_ring *ring, uint64_t now_ns)
{
    uint64_t limit = atomic_load_explicit(&ring->limit_bytes_per_s, memory_order_relaxed);

    if (limit != ring->clock_limit) {
        ring->clock_limit = limit;
        dirty_ring_restart(ring, now_ns);
    }
    if (limit == 0)
        return 0;
    uint64_t due = ring->clock_began_ns +
                   (uint64_t)((uint128)ring->clock_pages * PAGE_BYTES * SECOND_NS / limit);
    if (now_ns < due)
        return due;
    if (now_ns - due > BACKLOG_NS)
        ring->clock_began_ns += now_ns - due - BACKLOG_NS;
    return 0;
}
